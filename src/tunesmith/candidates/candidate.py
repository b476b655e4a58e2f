"""A candidate: a complete way to answer, as a record."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field

from tunesmith.core.messages import Message
from tunesmith.core.settings import Settings
from tunesmith.store.records import Record
from tunesmith.store.store import Store

Method = Literal["model", "nearest", "classifier"]
_PARENTS = ("base", "dataset", "training", "documents", "search")


class Retrieve(Settings):
    """Take the k passages most like the request into the prompt."""

    from_: Annotated[
        Literal["train", "documents"],
        Field(alias="from", description="what is looked up: the training examples, or the project's documents"),
    ] = "train"
    k: Annotated[int, Field(ge=1, le=64, description="how many examples or passages")] = 6
    by: Annotated[
        Literal["bm25", "dense", "fused"],
        Field(description="how likeness is found: by words, by MiniLM's vectors, or by the ranks of both"),
    ] = "bm25"


class RemoteModel(Settings):
    """The model behind an outside endpoint, as far as it can be named from here."""

    url: str
    model: str


class Candidate(Settings):
    """What a candidate record states. base, dataset, training, documents and search are digests of its parents."""

    name: str
    base: str
    prompt: str
    max_tokens: int
    shots: tuple[tuple[Message, ...], ...] = ()
    retrieve: Retrieve | None = None
    # JSON Schema, as text: the order of its keys is the order that answers are held to. None leaves answers free.
    answer_schema: str | None = None
    dataset: str | None = None  # where shots and retrieved examples come from
    training: str | None = None  # the weights; None answers with the base alone
    method: Method = "model"  # nearest and classifier answer from the training examples, without a language model
    endpoint: RemoteModel | None = None
    documents: str | None = None
    embedder: str | None = None  # digest of the model that makes the vectors
    search: str | None = None  # what chose its prompt and shots on the validation rows

    @property
    def tuned(self) -> bool:
        """Whether its weights differ from the base's."""
        return self.training is not None

    @property
    def asks_base(self) -> bool:
        """Whether the project's base model answers: no floor, and no endpoint."""
        return self.method == "model" and self.endpoint is None


def put_candidate(store: Store, candidate: Candidate) -> str:
    """Keep a candidate; returns the record's digest. What is left at its default and came later is left out."""
    body: dict[str, Any] = candidate.model_dump(mode="json", by_alias=True)
    parents = {role: body.pop(role) for role in _PARENTS if body[role] is not None}
    for role in _PARENTS:
        body.pop(role, None)
    for later, default in (("method", "model"), ("endpoint", None), ("embedder", None)):
        if body[later] == default:
            del body[later]
    if body["retrieve"] is not None and body["retrieve"]["by"] == "bm25":
        del body["retrieve"]["by"]
    return store.put_record(Record(kind="candidate", parents=parents, body=body))


def load_candidate(store: Store, digest: str) -> Candidate:
    """Read a candidate record."""
    record = store.record(digest, kind="candidate")
    return Candidate.model_validate({**record.body, **record.parents})
