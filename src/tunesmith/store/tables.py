"""The database's tables: an index of the records, and all state that changes."""

from __future__ import annotations

from typing import Annotated, Literal, get_args
from uuid import uuid4

from sqlalchemy import JSON, BigInteger, Float, Index, String, Text, UniqueConstraint
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column, relationship

from tunesmith.core.reading.strict_json import JsonObject
from tunesmith.core.text.names import Scope, version_label

# Raise it with each new file in migrations/versions.
HEAD_REVISION = "0014"
OLDEST_REVISION = "0012"  # from which these files lead to the newest one


# Texts of at most so many characters, a digest, and a text of any length.
Str8 = Annotated[str, mapped_column(String(8))]
Str16 = Annotated[str, mapped_column(String(16))]
Str32 = Annotated[str, mapped_column(String(32))]
Str64 = Annotated[str, mapped_column(String(64))]
Digest = Annotated[str, mapped_column(String(71))]
Str128 = Annotated[str, mapped_column(String(128))]
Str256 = Annotated[str, mapped_column(String(256))]
Long = Annotated[str, mapped_column(Text)]
# The same as primary keys, and a number that begins at 0.
Key64 = Annotated[str, mapped_column(String(64), primary_key=True)]
DigestKey = Annotated[str, mapped_column(String(71), primary_key=True)]
Key128 = Annotated[str, mapped_column(String(128), primary_key=True)]
IntKey = Annotated[int, mapped_column(primary_key=True)]
FromZero = Annotated[int, mapped_column(default=0)]


class Table(DeclarativeBase):
    """The base class of all tables."""

    type_annotation_map = {JsonObject: JSON, list[str]: JSON, float: Float}  # noqa: RUF012


class ForScope:
    """The columns of what is for a tenant and a region; "" stands for all."""

    tenant: Mapped[Str64] = mapped_column(default="")
    region: Mapped[Str64] = mapped_column(default="")

    @property
    def scope(self) -> Scope:
        """Whom it is for."""
        return Scope(self.tenant, self.region)


class StoreRow(Table):
    """The store's id, in one row, which its files and its backups hold too. Without the row a copy is under way."""

    __tablename__ = "store"
    id: Mapped[str] = mapped_column(String(32), primary_key=True, default=lambda: uuid4().hex)


class RecordRow(Table):
    """An index of the records."""

    __tablename__ = "records"
    digest: Mapped[DigestKey]
    kind: Mapped[Str32] = mapped_column(index=True)
    created_at: Mapped[Str32]


class EdgeRow(Table):
    """A record (child) that names another (parent) under a role."""

    __tablename__ = "edges"
    child: Mapped[DigestKey]
    role: Mapped[Key128]
    parent: Mapped[Digest] = mapped_column(index=True)


class MemoRow(Table):
    """The record that a stage made for a key, the digest of its inputs and settings: `run` skips such a stage."""

    __tablename__ = "memos"
    key: Mapped[DigestKey]
    digest: Mapped[Digest]


class AuditRow(Table):
    """An entry of the audit log. digest: over all other columns. previous: the digest of the entry before."""

    __tablename__ = "audit"
    seq: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    at: Mapped[Str32]
    actor: Mapped[Str128]
    action: Mapped[Str64] = mapped_column(index=True)
    subject: Mapped[Str256] = mapped_column(index=True)
    detail: Mapped[JsonObject]
    previous: Mapped[Digest]
    digest: Mapped[Digest]


class AuditHeadRow(Table):
    """The newest entry of the audit log, in one row: a log whose tail was cut no longer reaches it."""

    __tablename__ = "audit_head"
    id: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    seq: Mapped[int]
    digest: Mapped[Digest]


class LockRow(Table):
    """A lock between processes. until: when the lease runs out, in seconds since 1970.

    started: a number for when the process started (locks.py).
    """

    __tablename__ = "locks"
    name: Mapped[Key128]
    owner: Mapped[Str32]
    purpose: Mapped[Str256]
    host: Mapped[Str256]
    pid: Mapped[int]
    started: Mapped[float]
    until: Mapped[float]


class UserRow(ForScope, Table):
    """A person or a service. tenant, region: what the user may act for; "" means all.

    groups: whose documents the user may see.
    """

    __tablename__ = "users"
    name: Mapped[Key128]
    roles: Mapped[list[str]]
    groups: Mapped[list[str]] = mapped_column(default=list)
    active: Mapped[bool] = mapped_column(default=True)
    # Without a constraint in the database: a key whose user's row was deleted must stay known.
    keys: Mapped[list[KeyRow]] = relationship(
        primaryjoin="UserRow.name == foreign(KeyRow.user)", order_by="KeyRow.enrolled", lazy="selectin"
    )
    tokens: Mapped[list[TokenRow]] = relationship(
        primaryjoin="UserRow.name == foreign(TokenRow.user)", order_by="TokenRow.created", viewonly=True
    )


class KeyRow(Table):
    """A public key (PEM) of a user. Never deleted, so that nobody can enrol it again.

    status: active, retired or revoked. enrolled: the number of the audit entry that enrolled it. proven_by: the
    fingerprint of the user's older key that proved the enrolment, "" without such a proof. until: the number of the
    first audit entry that no longer records a signature by it; None while it is active.
    """

    __tablename__ = "keys"
    fingerprint: Mapped[DigestKey]
    user: Mapped[Str128] = mapped_column(index=True)
    label: Mapped[Str64]
    public_key: Mapped[Long]
    status: Mapped[Str16] = mapped_column(default="active")
    enrolled: Mapped[int]
    proven_by: Mapped[Digest] = mapped_column(default="")
    until: Mapped[int | None]


class LoginLinkRow(Table):
    """A one-time link to the console. digest: of the secret in it. until: when it ends, in seconds since 1970."""

    __tablename__ = "login_links"
    digest: Mapped[DigestKey]
    user: Mapped[Str128]
    made_by: Mapped[Str128]
    until: Mapped[float]


class SessionRow(Table):
    """A session of the console. digest: of the cookie's secret; before: of the one that it replaced at `changed`.

    Times are seconds since 1970. until: when the session ends. used: of its last request, to a minute.
    """

    __tablename__ = "sessions"
    id: Mapped[Str32] = mapped_column(primary_key=True)
    digest: Mapped[Digest] = mapped_column(unique=True)
    before: Mapped[Digest | None] = mapped_column(unique=True)
    user: Mapped[Str128] = mapped_column(index=True)
    opened: Mapped[float]
    changed: Mapped[float]
    used: Mapped[float]
    until: Mapped[float]


class TokenRow(Table):
    """A token of a user for the HTTP interface. digest: the SHA-256 of its 256 random bits.

    Times are seconds since 1970. expires: None never. revoked: when it was ended, None if it was not. used: about when
    it was used last, None if it was not; the only column that changes without an audit entry.
    """

    __tablename__ = "tokens"
    __table_args__ = (UniqueConstraint("user", "name"),)
    digest: Mapped[DigestKey]
    user: Mapped[Str128]
    name: Mapped[Str64]
    scopes: Mapped[list[str]]
    created: Mapped[float]
    expires: Mapped[float | None]
    revoked: Mapped[float | None]
    used: Mapped[float | None]


class VersionRow(ForScope, Table):
    """The version record of NAME@vNUMBER. Never updated. key: the fingerprint of the key that signed it.

    tenant and region repeat the record's, so that one query gives the same answer for another tenant's version and for
    none.
    """

    __tablename__ = "versions"
    name: Mapped[Key128]
    number: Mapped[IntKey]
    digest: Mapped[Digest] = mapped_column(unique=True)
    key: Mapped[Digest]

    @property
    def label(self) -> str:
        """NAME@v3."""
        return version_label(self.name, self.number)


CHAMPION = "champion"  # the alias that rollouts set


class AliasRow(Table):
    """The version that NAME@ALIAS means for a tenant and region. revision: for compare-and-set.

    tenant and region are "" in a project without them. override_by: the user who lets the version serve without an
    approval, "" where nobody does.
    """

    __tablename__ = "aliases"
    name: Mapped[Key128]
    alias: Mapped[Str32] = mapped_column(primary_key=True)
    tenant: Mapped[Str64] = mapped_column(primary_key=True, default="")
    region: Mapped[Str64] = mapped_column(primary_key=True, default="")
    version: Mapped[Digest]
    override_by: Mapped[Str128] = mapped_column(default="")
    revision: Mapped[int]


Live = Literal["running", "paused"]
LIVE: tuple[Live, ...] = get_args(Live)  # rollouts with these statuses divide traffic


class RolloutRow(ForScope, Table):
    """A rollout and its state. revision: for compare-and-set."""

    __tablename__ = "rollouts"
    id: Mapped[IntKey]
    name: Mapped[Str128] = mapped_column(index=True)
    stable: Mapped[Digest]
    canary: Mapped[Digest]
    status: Mapped[Str16] = mapped_column(index=True)
    step: Mapped[FromZero]
    weight: Mapped[FromZero]
    state: Mapped[JsonObject]
    revision: Mapped[FromZero]
    started_at: Mapped[Str32]


class RequestRow(ForScope, Table):
    """One served request: measurements, never its text.

    caller: the user whose token it came with. end_user: a hash of the request's `user`, while a rollout is live. cut:
    the request's own max_tokens, stop text, format or tools shaped the answer, so it is not scored.
    """

    __tablename__ = "requests"
    id: Mapped[Key64]
    at: Mapped[Str32] = mapped_column(index=True)
    name: Mapped[Str128]
    caller: Mapped[Str128] = mapped_column(default="")
    end_user: Mapped[Str16] = mapped_column(default="")
    version: Mapped[Digest]
    rollout: Mapped[int | None]
    arm: Mapped[Str8]
    ok: Mapped[bool]
    cut: Mapped[bool] = mapped_column(default=False)
    seconds: Mapped[float]
    prompt_tokens: Mapped[FromZero]
    completion_tokens: Mapped[FromZero]
    # scores: metric name -> number (json_valid at serving time, others once feedback arrives);
    # features: what drift monitoring compares (nearest, characters).
    scores: Mapped[JsonObject]
    features: Mapped[JsonObject]


class RecallRow(Table):
    """A record or blob that was recalled, and the cause of the recall."""

    __tablename__ = "recalls"
    digest: Mapped[DigestKey]
    cause: Mapped[Str256] = mapped_column(primary_key=True)
    reason: Mapped[Long]
    at: Mapped[Str32]


JobState = Literal["queued", "running", "paused", "succeeded", "failed", "cancelled"]


# A kind of jobs, and what the ids that its clients know begin with.
FINE_TUNING, FINE_TUNING_JOB = "fine_tuning", "ftjob-"


class JobRow(ForScope, Table):
    """A job of the queue (jobs/). Times are seconds since 1970, None for what has not happened.

    project: the name of the project whose workers may take it. wanted: the state that a person asked a running job to
    go to, "" where nobody did. key: the idempotency key that its creator gave. due: not to be taken before. fence: the
    fencing token, raised whenever the job is taken or taken back. worker, until: who performs it, and the end of the
    lease. result and error are empty where there is none.
    """

    __tablename__ = "jobs"
    __table_args__ = (UniqueConstraint("created_by", "key"),)
    id: Mapped[IntKey]
    project: Mapped[Str64]
    kind: Mapped[Str32]
    arguments: Mapped[JsonObject]
    state: Mapped[JobState] = mapped_column(String(16))
    wanted: Mapped[Str16] = mapped_column(default="")
    priority: Mapped[FromZero]
    created_by: Mapped[Str128]
    key: Mapped[Str128 | None]
    attempts: Mapped[FromZero]
    most_attempts: Mapped[int]
    due: Mapped[float]
    fence: Mapped[FromZero]
    worker: Mapped[Str256] = mapped_column(default="")
    until: Mapped[float | None]
    progress: Mapped[JsonObject]
    result: Mapped[JsonObject]
    error: Mapped[JsonObject]
    created: Mapped[float]
    started: Mapped[float | None]
    ended: Mapped[float | None]

    @property
    def cause(self) -> str:
        """Why it was queued, where no person did it; "" where one did."""
        return str(self.arguments.get("cause", ""))

    @property
    def changes(self) -> JsonObject:
        """Training settings, by candidate, that differ from the project file."""
        return dict(self.arguments.get("changes", {}))


class JobEventRow(Table):
    """A line of a job's log. number: from 1 for each job."""

    __tablename__ = "job_events"
    job: Mapped[IntKey]
    number: Mapped[IntKey]
    at: Mapped[float]
    message: Mapped[Long]


class JobCurveRow(Table):
    """The curve of one of a job's trainings (jobs/queue.py). training: its name."""

    __tablename__ = "job_curves"
    job: Mapped[IntKey]
    training: Mapped[Str256] = mapped_column(primary_key=True)
    curve: Mapped[JsonObject]


class FileRow(ForScope, Table):
    """A file that a client uploaded, or that a job made for one (store/uploads.py). Its bytes are under `files/`.

    number: the order in which files came. file: the id that clients know. created: seconds since 1970.
    """

    __tablename__ = "files"
    number: Mapped[IntKey]
    file: Mapped[Str64] = mapped_column(unique=True)
    created_by: Mapped[Str128]
    name: Mapped[Str256]
    purpose: Mapped[Str32]
    size: Mapped[int] = mapped_column(BigInteger)
    digest: Mapped[Digest]
    created: Mapped[float]


class WebhookRow(Table):
    """How far a project's webhook has read the audit log. seq: the newest entry that it has seen."""

    __tablename__ = "webhooks"
    project: Mapped[Key64]
    name: Mapped[Key64]
    seq: Mapped[int]


class DeliveryRow(Table):
    """An event that did not arrive at a webhook yet. seq: its audit entry. due: not to be sent before, in seconds since
    1970. given_up: it failed as often as it may. error: what went wrong last.
    """

    __tablename__ = "deliveries"
    project: Mapped[Key64]
    webhook: Mapped[Key64]
    event: Mapped[Key64]
    seq: Mapped[int]
    type: Mapped[Str64]
    body: Mapped[Long]
    attempts: Mapped[FromZero]
    given_up: Mapped[bool] = mapped_column(default=False)
    due: Mapped[float]
    error: Mapped[Str256] = mapped_column(default="")


class HeldRow(ForScope, Table):
    """An answer that waits for a reviewer, or that one decided on, until `until` (seconds since 1970, as all times).

    id: the request's. caller: the user whose token it came with. reasons: the rules that hold it. digest, given: of the
    answer's text, and of the text that left or "". texts: the conversation, the answer, what an edited one must fit,
    and the response. at_deadline: refuse or release. state: waiting, released, replaced or refused.
    """

    __tablename__ = "held_answers"
    id: Mapped[Key64]
    name: Mapped[Str128]
    version: Mapped[Digest]
    caller: Mapped[Str128]
    reasons: Mapped[list[str]]
    digest: Mapped[Digest]
    given: Mapped[Digest] = mapped_column(default="")
    texts: Mapped[JsonObject]
    at: Mapped[float]
    deadline: Mapped[float]
    until: Mapped[float] = mapped_column(index=True)
    at_deadline: Mapped[Str8]
    state: Mapped[Str16]
    decided_by: Mapped[Str128] = mapped_column(default="")
    reason: Mapped[Long] = mapped_column(default="")
    decided: Mapped[float | None]


Index("held_by_state", HeldRow.state, HeldRow.deadline)


class ReviewItemRow(Table):
    """A row or a kept request that people review (data/review/queue.py).

    kind: `row` or `case`. subject: the row's id, or the request's. dataset, split: where the row was found; "" for a
    case. why: what was found -> detail. messages: the row's turns at that time; empty for a case, whose text stays with
    it. wanted: how many people decide. state: open, conflict, accept, edit or reject. revision: raised by a decision.
    """

    __tablename__ = "review_items"
    __table_args__ = (UniqueConstraint("kind", "subject"),)
    id: Mapped[IntKey]
    kind: Mapped[Str16]
    subject: Mapped[Str128]
    dataset: Mapped[Digest] = mapped_column(default="")
    split: Mapped[Str16] = mapped_column(default="")
    why: Mapped[JsonObject]
    messages: Mapped[JsonObject]
    wanted: Mapped[int]
    state: Mapped[Str16] = mapped_column(index=True)
    revision: Mapped[FromZero]


class ReviewDecisionRow(Table):
    """What one person decided on an item. number: from 1. messages: the edited turns; empty unless it is an edit.

    settles: it ended a conflict of the others.
    """

    __tablename__ = "review_decisions"
    item: Mapped[IntKey]
    number: Mapped[IntKey]
    reviewer: Mapped[Str128]
    decision: Mapped[Str16]
    reason: Mapped[Long]
    messages: Mapped[JsonObject]
    settles: Mapped[bool]
    at: Mapped[Str32]


class ErasureRow(Table):
    """An erasure (monitoring/erasure.py): planned by one person, confirmed by another, then carried out.

    plan: what was shown to both. state: planned, running or done. statement: the digest of the signed statement, ""
    while it is planned.
    """

    __tablename__ = "erasures"
    id: Mapped[IntKey]
    cause: Mapped[Str256]
    reason: Mapped[Long]
    planned_by: Mapped[Str128]
    at: Mapped[Str32]
    plan: Mapped[JsonObject]
    state: Mapped[Str16] = mapped_column(default="planned")
    confirmed_by: Mapped[Str128] = mapped_column(default="")
    statement: Mapped[Digest] = mapped_column(default="")


class ErasedRow(Table):
    """A blob or record that an erasure rewrote (old), and the digest of what is left of it (new)."""

    __tablename__ = "erased"
    old: Mapped[DigestKey]
    new: Mapped[Digest]


Index("jobs_by_state", JobRow.project, JobRow.state, JobRow.priority, JobRow.id)
Index("requests_by_rollout", RequestRow.rollout, RequestRow.at)
Index("requests_by_version", RequestRow.version, RequestRow.at, RequestRow.tenant, RequestRow.region, RequestRow.ok)
