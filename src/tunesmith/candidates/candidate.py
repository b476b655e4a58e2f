"""A candidate: a complete way to answer, as a record."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field

from tunesmith.core.messages import Message
from tunesmith.core.settings import Settings
from tunesmith.store.records import Record
from tunesmith.store.store import Store


class Retrieve(Settings):
    """Take the k most similar training examples into the prompt, found for each request by BM25."""

    from_: Annotated[Literal["train"], Field(alias="from", description="where examples are found")] = "train"
    k: Annotated[int, Field(ge=1, le=64, description="how many examples")] = 6


class Candidate(Settings):
    """What a candidate record states. base, dataset and training are digests of its parents."""

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

    @property
    def tuned(self) -> bool:
        """Whether its weights differ from the base's."""
        return self.training is not None


def put_candidate(store: Store, candidate: Candidate) -> str:
    """Keep a candidate; returns the record's digest."""
    body: dict[str, Any] = candidate.model_dump(mode="json", by_alias=True)
    parents = {role: body.pop(role) for role in ("base", "dataset", "training") if body[role] is not None}
    for role in ("dataset", "training"):
        body.pop(role, None)
    return store.put_record(Record(kind="candidate", parents=parents, body=body))


def load_candidate(store: Store, digest: str) -> Candidate:
    """Read a candidate record."""
    record = store.record(digest, kind="candidate")
    return Candidate.model_validate({**record.body, **record.parents})
