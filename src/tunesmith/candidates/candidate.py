"""The candidate record: one complete way to answer requests."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field

from tunesmith.core.messages import Message
from tunesmith.core.settings import Settings
from tunesmith.store.records import Record
from tunesmith.store.store import Store

Method = Literal["model", "nearest", "classifier"]
PromptSource = Literal["candidate", "request", "none"]
Kind = Literal["model", "baseline", "endpoint"]
_PARENTS = ("base", "dataset", "training", "documents", "search")


class Retrieve(Settings):
    """Put the k examples or passages that are most similar to the request into the prompt."""

    from_: Annotated[
        Literal["train", "documents"],
        Field(alias="from", description="what is searched: the training examples, or the project's documents"),
    ] = "train"
    k: Annotated[int, Field(ge=1, le=64, description="how many examples or passages")] = 6
    by: Annotated[
        Literal["bm25", "dense", "fused"],
        Field(description="similarity by words (bm25), by MiniLM embeddings (dense), or by the ranks of both (fused)"),
    ] = "bm25"


class RemoteModel(Settings):
    """The model behind an endpoint: where it is and what it is called there."""

    url: str
    model: str


class Candidate(Settings):
    """What a candidate record states. base, dataset, training, documents and search are digests of its parents.

    prompt: the system prompt; "" leaves the request's own system turn in place.
    """

    name: str
    base: str
    max_tokens: int
    prompt: str = ""
    shots: tuple[tuple[Message, ...], ...] = ()
    retrieve: Retrieve | None = None
    # JSON Schema as text: some engines write keys in its order. None: answers are not constrained.
    answer_schema: str | None = None
    answer_grammar: str | None = None  # Lark, instead of a schema
    copied: tuple[str, ...] = ()  # paths of the fields whose values are words of the request's user turns
    dataset: str | None = None  # of the shots and retrieved examples
    training: str | None = None  # of the adapter; None: the base model alone
    method: Method = "model"  # nearest and classifier: baselines that use no language model
    endpoint: RemoteModel | None = None
    documents: str | None = None
    embedder: str | None = None  # digest of the embedding model
    search: str | None = None  # the search that chose its prompt and shots

    @property
    def tuned(self) -> bool:
        """Whether it has trained weights."""
        return self.training is not None

    @property
    def documents_parent(self) -> dict[str, str]:
        """The documents that it retrieves from, as a parent of records that its prompts went into; empty without."""
        return {} if self.documents is None else {"documents": self.documents}

    @property
    def kind(self) -> Kind:
        """What answers: the base model, with its adapter if there is one, a baseline or an endpoint."""
        if self.endpoint is not None:
            return "endpoint"
        return "model" if self.method == "model" else "baseline"

    @property
    def asks_base(self) -> bool:
        """Whether the base model answers, and not a baseline or an endpoint."""
        return self.kind == "model"

    @property
    def prompt_source(self) -> PromptSource:
        """Where the system prompt comes from: the candidate, the request's own system turn, or nowhere (baselines)."""
        if self.method != "model":
            return "none"
        return "candidate" if self.prompt else "request"


def put_candidate(store: Store, candidate: Candidate) -> str:
    """Store a candidate; returns the record's digest."""
    body: dict[str, Any] = candidate.model_dump(mode="json", by_alias=True, exclude_none=True)
    parents = {role: body.pop(role) for role in _PARENTS if role in body}
    return store.put_record(
        Record(kind="candidate", parents=parents, body={**body, "prompt_source": candidate.prompt_source})
    )


def load_candidate(store: Store, digest: str) -> Candidate:
    """Read a candidate record."""
    record = store.record(digest, kind="candidate")
    body = {key: value for key, value in record.body.items() if key != "prompt_source"}
    return Candidate.model_validate({**body, **record.parents})
