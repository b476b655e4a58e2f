"""The candidate record: one complete way to answer requests."""

from __future__ import annotations

from typing import Literal

from tunesmith.records.candidate import CandidateBody, CandidateFields, PromptSource
from tunesmith.store.store import Store

Kind = Literal["model", "baseline", "endpoint"]
_PARENTS = ("base", "dataset", "training", "documents", "search")


class Candidate(CandidateFields):
    """A candidate with the digests of its record's parents.

    dataset: of the shots and retrieved examples. training: of the adapter; None: the base model alone. search: the one
    that chose its prompt and shots.
    """

    base: str
    dataset: str | None = None
    training: str | None = None
    documents: str | None = None
    search: str | None = None

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
    stated = candidate.model_dump(mode="json", by_alias=True, exclude_none=True)
    parents = {role: stated.pop(role) for role in _PARENTS if role in stated}
    body = CandidateBody.model_validate({**stated, "prompt_source": candidate.prompt_source})
    return store.put_record(body.record(parents))


def load_candidate(store: Store, digest: str) -> Candidate:
    """Read a candidate record. Raises Refused for one that is damaged."""
    record = store.record(digest, kind="candidate")
    body = dict(CandidateBody.of(record))
    del body["prompt_source"]
    return Candidate.model_validate({**body, **record.parents})
