"""What bases and candidates state."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, ClassVar, Literal

from pydantic import ConfigDict, Field

from tunesmith.core.messages import Turns
from tunesmith.core.values import Settings
from tunesmith.records.body import Body, Part

Method = Literal["model", "nearest", "classifier"]
PromptSource = Literal["candidate", "request", "none"]
_LONGEST_TITLE = 60


class StoredFile(Part):
    """A file by its digest. bytes: its size."""

    digest: str
    bytes: int


class BaseBody(Body):
    """A base's files, which stay in place. fingerprint: of what rendering depends on, tokenizer and template. files:
    path in the base's folder -> file."""

    kind: ClassVar = "base"

    spec: str
    family: str
    context_length: int
    fingerprint: str
    files: Mapping[str, StoredFile]

    @property
    def line(self) -> str:
        """How a project file names it."""
        return self.spec

    @property
    def weight_bytes(self) -> int:
        """The size of the weights' files."""
        return sum(file.bytes for path, file in self.files.items() if path.endswith(".safetensors"))

    @property
    def title(self) -> str:
        """The same, short enough for a table."""
        return self.spec if len(self.spec) <= _LONGEST_TITLE else f"{self.spec[:_LONGEST_TITLE]}…"


class Retrieve(Settings):
    """Put the k examples or passages that are most similar to the request into the prompt."""

    from_: Annotated[
        Literal["train", "documents"],
        Field(alias="from", description="what is searched: the training examples, or the project's documents"),
    ] = "train"
    k: int = Field(default=6, ge=1, le=64, description="how many examples or passages")
    by: Literal["bm25", "dense", "fused"] = Field(
        default="bm25",
        description="similarity by words (bm25), by MiniLM embeddings (dense), or by the ranks of both (fused)",
    )


class RemoteModel(Settings):
    """The model behind an endpoint: where it is and what it is called there."""

    url: str
    model: str


class CandidateFields(Settings):
    """One complete way to answer requests.

    prompt: the system prompt; "" leaves the request's own system turn in place. answer_schema: JSON Schema as text,
    since some engines write keys in its order; None: answers are not constrained. answer_grammar: Lark, instead of a
    schema. copied: paths of the fields whose values are words of the request's user turns. method: nearest and
    classifier are baselines that use no language model. embedder: digest of the embedding model.
    """

    name: str
    max_tokens: int
    prompt: str = ""
    shots: tuple[Turns, ...] = ()
    retrieve: Retrieve | None = None
    answer_schema: str | None = None
    answer_grammar: str | None = None
    copied: tuple[str, ...] = ()
    method: Method = "model"
    endpoint: RemoteModel | None = None
    embedder: str | None = None


class CandidateBody(CandidateFields, Body):
    """A candidate. A key that is not known is refused: it may decide how requests are answered.

    prompt_source: where the system prompt comes from.
    """

    model_config = ConfigDict(extra="forbid")
    kind: ClassVar = "candidate"

    prompt_source: PromptSource

    @property
    def line(self) -> str:
        """Its name."""
        return self.name
