"""What versions, approvals and exports state. The first two are signed, so a key that they do not name is refused."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime
from typing import Annotated, ClassVar, Literal, get_args

from pydantic import AfterValidator, ConfigDict, Field, model_validator

from tunesmith.core.access import Name, OptionalName
from tunesmith.core.text.names import version_label
from tunesmith.core.values import Digest, Frozen
from tunesmith.records.body import Body, Part
from tunesmith.records.candidate import StoredFile
from tunesmith.records.dataset import Duties, IfAny
from tunesmith.records.evaluation import Outcome
from tunesmith.store.audit import Head
from tunesmith.store.people.roles import Role

MOST_APPROVERS = 20
RiskClass = Literal["low", "limited", "high"]
Decision = Literal["approve", "refuse"]
Paper = Literal["card", "bom", "provenance", "ai-act"]
PAPERS: tuple[Paper, ...] = get_args(Paper)
Form = Literal["peft", "merged", "gguf", "ollama"]
Dtype = Literal["bf16", "fp32"]


def _time(text: str) -> str:
    if datetime.fromisoformat(text).tzinfo is None:
        raise ValueError(f"{text!r} has no time zone")
    return text


Time = Annotated[str, AfterValidator(_time)]


class Requirement(Frozen):
    """What a version takes to serve; a part of its signed record.

    approvers: how many different people with the role approver. roles: roles that some of these people have besides;
    each entry takes a person of its own, whatever other roles that person has.
    """

    risk_class: RiskClass
    approvers: int = Field(ge=1, le=MOST_APPROVERS, strict=True)
    roles: tuple[Role, ...] = ()

    @model_validator(mode="after")
    def _fits(self) -> Requirement:
        if len(self.roles) > self.approvers:
            raise ValueError(f"{len(self.roles)} roles need as many approvers, not {self.approvers}")
        return self


class VersionBody(Body):
    """A signed version.

    base, fingerprint: the base record's digest and the fingerprint of its rendering. signer: who registered it.
    override: why it was registered without a passing verdict. records, blobs: sorted digests of what it was made from.
    audit: the newest entry of the audit log when it was signed. duties: what the licences of its rows require
    of people who use it or pass it on; None if it was made from no dataset. marks: warnings for the people who serve
    it. risk: the project's risk class and what it takes to serve; None takes one approver. papers: that must be written
    before its approval.
    """

    model_config = ConfigDict(extra="forbid", strict=True)
    kind: ClassVar = "version"

    name: Name
    number: int = Field(ge=1)
    tenant: OptionalName
    region: OptionalName
    base: Digest
    fingerprint: str
    signer: Name
    override: Annotated[str, Field(min_length=1)] | None
    created_at: Time
    expires_at: Time | None
    records: tuple[Digest, ...]
    blobs: tuple[Digest, ...]
    audit: Head
    duties: Duties | None = None
    marks: tuple[str, ...] = ()
    risk: Requirement | None = None
    papers: IfAny[tuple[Paper, ...]] = ()

    @property
    def line(self) -> str:
        """Its label."""
        return version_label(self.name, self.number)


class ApprovalBody(Body):
    """An approval or a refusal, and the predicate that its envelope signs.

    override: why the version was registered although its gates did not pass, so that the approver knows of it.
    audit: the newest entry of the audit log when it was signed. until: when it may be submitted last; nonce: random, so
    that it is recorded once. papers: those that the version takes -> the records that the approver saw.
    """

    model_config = ConfigDict(extra="forbid", strict=True)
    kind: ClassVar = "approval"

    approver: str
    role: Literal["approver"]
    decision: Decision
    reason: str
    override: str | None
    at: str
    audit: Head
    until: str
    nonce: str
    papers: IfAny[Mapping[Paper, Digest]] = Field(default_factory=dict)

    @property
    def line(self) -> str:
        """Who decided what."""
        return f"{self.decision} by {self.approver}"


class PaperField(Part):
    """Where a field of a paper comes from. kind, record, field: the record's kind, its digest, "" where the version was
    made without one, and its field. A person's entry has the file's name and digest, and the entry's name."""

    kind: str
    record: str
    field: str


class PaperBody(Body):
    """A paper about a version for people outside, and the predicate that its envelope signs.

    by, at: who signed it, and when. fields: each field of the paper -> where it comes from. missing: entries of
    papers.yaml that it needs and nobody made.
    """

    model_config = ConfigDict(extra="forbid", strict=True)
    kind: ClassVar = "paper"

    paper: Paper
    by: Name
    at: Time
    fields: Mapping[str, tuple[PaperField, ...]]
    missing: tuple[str, ...]

    @property
    def line(self) -> str:
        """Which one it is."""
        return f"{self.paper} by {self.by}" + (f", {len(self.missing)} entries missing" if self.missing else "")


class AdapterMoves(Part):
    """How far the adapter moves log-probabilities, in nats. None: not finite."""

    max_difference: float | None
    mean_difference: float | None


class ExportDifference(AdapterMoves):
    """How far the export differs from the weights as trained. equal_answers: greedy answers that are the same."""

    equal_answers: int


class ServedDifference(Part):
    """How far the serving engine differs from the weights as trained. scored: answers whose log-probability it gave."""

    scored: int
    max_difference: float | None
    equal_answers: int


class Equality(Part):
    """An export compared with the weights as trained. probes: held-out requests; tokens: of their answers. engine: the
    kind that serves."""

    probes: int
    tokens: int
    adapter_moves: AdapterMoves
    export: ExportDifference
    served: ServedDifference
    engine: str


class Tolerance(Part):
    """The largest differences that are allowed. export, served: max or mean -> nats."""

    export: Mapping[str, float]
    served: Mapping[str, float]


class ExportBody(Body):
    """A version's weights as files for other programs, compared with what was measured."""

    kind: ClassVar = "export"

    form: Form
    dtype: Dtype
    files: Mapping[str, StoredFile]
    equality: Equality
    tolerance: Tolerance
    outcome: Outcome
    reason: str

    @property
    def line(self) -> str:
        """The comparison."""
        export, served, count = self.equality.export, self.equality.served, self.equality.probes
        allowed, served_allowed = self.tolerance.export["max"], self.tolerance.served["max"]
        return (
            f"{self.form} {self.dtype}: {self.outcome}, log-probabilities within {export.max_difference} of "
            f"those trained ({allowed} allowed), {export.equal_answers} of {count} greedy answers equal; "
            f"{self.equality.engine} engine within {served.max_difference} ({served_allowed}), "
            f"{served.equal_answers} equal"
        )
