"""The database's tables: an index of the records, and all state that changes."""

from __future__ import annotations

from typing import Literal, get_args

from sqlalchemy import JSON, BigInteger, Boolean, Float, Index, Integer, String, Text, UniqueConstraint
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column, relationship

from tunesmith.core.reading.strict_json import JsonObject
from tunesmith.core.scope import Scope

# Raise it with each new file in migrations/versions.
HEAD_REVISION = "0012"
OLDEST_REVISION = "0012"  # from which these files lead to the newest one


class Table(DeclarativeBase):
    """The base class of all tables."""

    type_annotation_map = {JsonObject: JSON, list[str]: JSON}  # noqa: RUF012


class RecordRow(Table):
    """An index of the records."""

    __tablename__ = "records"
    digest: Mapped[str] = mapped_column(String(71), primary_key=True)
    kind: Mapped[str] = mapped_column(String(32), index=True)
    created_at: Mapped[str] = mapped_column(String(32))


class EdgeRow(Table):
    """A record (child) that names another (parent) under a role."""

    __tablename__ = "edges"
    child: Mapped[str] = mapped_column(String(71), primary_key=True)
    role: Mapped[str] = mapped_column(String(128), primary_key=True)
    parent: Mapped[str] = mapped_column(String(71), index=True)


class MemoRow(Table):
    """The record that a stage made for a key, the digest of its inputs and settings: `run` skips such a stage."""

    __tablename__ = "memos"
    key: Mapped[str] = mapped_column(String(71), primary_key=True)
    digest: Mapped[str] = mapped_column(String(71))


class AuditRow(Table):
    """An entry of the audit log. digest: over all other columns. previous: the digest of the entry before."""

    __tablename__ = "audit"
    seq: Mapped[int] = mapped_column(Integer, primary_key=True, autoincrement=False)
    at: Mapped[str] = mapped_column(String(32))
    actor: Mapped[str] = mapped_column(String(128))
    action: Mapped[str] = mapped_column(String(64), index=True)
    subject: Mapped[str] = mapped_column(String(256), index=True)
    detail: Mapped[JsonObject] = mapped_column()
    previous: Mapped[str] = mapped_column(String(71))
    digest: Mapped[str] = mapped_column(String(71))


class AuditHeadRow(Table):
    """The newest entry of the audit log, in one row: a log whose tail was cut no longer reaches it."""

    __tablename__ = "audit_head"
    id: Mapped[int] = mapped_column(Integer, primary_key=True, autoincrement=False)
    seq: Mapped[int] = mapped_column(Integer)
    digest: Mapped[str] = mapped_column(String(71))


class LockRow(Table):
    """A lock between processes. until: when the lease runs out, in seconds since 1970.

    started: a number for when the process started (locks.py).
    """

    __tablename__ = "locks"
    name: Mapped[str] = mapped_column(String(128), primary_key=True)
    owner: Mapped[str] = mapped_column(String(32))
    purpose: Mapped[str] = mapped_column(String(256))
    host: Mapped[str] = mapped_column(String(256))
    pid: Mapped[int] = mapped_column(Integer)
    started: Mapped[float] = mapped_column(Float)
    until: Mapped[float] = mapped_column(Float)


class UserRow(Table):
    """A person or a service. tenant, region: what the user may act for; "" means all.

    groups: whose documents the user may see.
    """

    __tablename__ = "users"
    name: Mapped[str] = mapped_column(String(128), primary_key=True)
    roles: Mapped[list[str]] = mapped_column()
    tenant: Mapped[str] = mapped_column(String(64), default="")
    region: Mapped[str] = mapped_column(String(64), default="")
    groups: Mapped[list[str]] = mapped_column(default=list)
    active: Mapped[bool] = mapped_column(Boolean, default=True)
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
    fingerprint: Mapped[str] = mapped_column(String(71), primary_key=True)
    user: Mapped[str] = mapped_column(String(128), index=True)
    label: Mapped[str] = mapped_column(String(64))
    public_key: Mapped[str] = mapped_column(Text)
    status: Mapped[str] = mapped_column(String(16), default="active")
    enrolled: Mapped[int] = mapped_column(Integer)
    proven_by: Mapped[str] = mapped_column(String(71), default="")
    until: Mapped[int | None] = mapped_column(Integer, default=None)


class LoginLinkRow(Table):
    """A one-time link to the console. digest: of the secret in it. until: when it ends, in seconds since 1970."""

    __tablename__ = "login_links"
    digest: Mapped[str] = mapped_column(String(71), primary_key=True)
    user: Mapped[str] = mapped_column(String(128))
    made_by: Mapped[str] = mapped_column(String(128))
    until: Mapped[float] = mapped_column(Float)


class SessionRow(Table):
    """A session of the console. digest: of the cookie's secret; before: of the one that it replaced at `changed`.

    Times are seconds since 1970. until: when the session ends. used: of its last request, to a minute.
    """

    __tablename__ = "sessions"
    id: Mapped[str] = mapped_column(String(32), primary_key=True)
    digest: Mapped[str] = mapped_column(String(71), unique=True)
    before: Mapped[str | None] = mapped_column(String(71), unique=True, default=None)
    user: Mapped[str] = mapped_column(String(128), index=True)
    opened: Mapped[float] = mapped_column(Float)
    changed: Mapped[float] = mapped_column(Float)
    used: Mapped[float] = mapped_column(Float)
    until: Mapped[float] = mapped_column(Float)


class TokenRow(Table):
    """A token of a user for the HTTP interface. digest: the SHA-256 of its 256 random bits.

    Times are seconds since 1970. expires: None never. revoked: when it was ended, None if it was not. used: about when
    it was used last, None if it was not; the only column that changes without an audit entry.
    """

    __tablename__ = "tokens"
    __table_args__ = (UniqueConstraint("user", "name"),)
    digest: Mapped[str] = mapped_column(String(71), primary_key=True)
    user: Mapped[str] = mapped_column(String(128))
    name: Mapped[str] = mapped_column(String(64))
    scopes: Mapped[list[str]] = mapped_column()
    created: Mapped[float] = mapped_column(Float)
    expires: Mapped[float | None] = mapped_column(Float, default=None)
    revoked: Mapped[float | None] = mapped_column(Float, default=None)
    used: Mapped[float | None] = mapped_column(Float, default=None)


class VersionRow(Table):
    """The version record of NAME@vNUMBER. Never updated. key: the fingerprint of the key that signed it.

    tenant and region repeat the record's, so that one query gives the same answer for another tenant's version and for
    none.
    """

    __tablename__ = "versions"
    name: Mapped[str] = mapped_column(String(128), primary_key=True)
    number: Mapped[int] = mapped_column(Integer, primary_key=True)
    digest: Mapped[str] = mapped_column(String(71), unique=True)
    key: Mapped[str] = mapped_column(String(71))
    tenant: Mapped[str] = mapped_column(String(64), default="")
    region: Mapped[str] = mapped_column(String(64), default="")


class AliasRow(Table):
    """The version that NAME@ALIAS means for a tenant and region. revision: for compare-and-set.

    tenant and region are "" in a project without them. override_by: the user who lets the version serve without an
    approval, "" where nobody does.
    """

    __tablename__ = "aliases"
    name: Mapped[str] = mapped_column(String(128), primary_key=True)
    alias: Mapped[str] = mapped_column(String(32), primary_key=True)
    tenant: Mapped[str] = mapped_column(String(64), primary_key=True, default="")
    region: Mapped[str] = mapped_column(String(64), primary_key=True, default="")
    version: Mapped[str] = mapped_column(String(71))
    override_by: Mapped[str] = mapped_column(String(128), default="")
    revision: Mapped[int] = mapped_column(Integer)


Live = Literal["running", "paused"]
LIVE: tuple[Live, ...] = get_args(Live)  # rollouts with these statuses divide traffic


class RolloutRow(Table):
    """A rollout and its state. revision: for compare-and-set."""

    __tablename__ = "rollouts"
    id: Mapped[int] = mapped_column(Integer, primary_key=True, autoincrement=True)
    name: Mapped[str] = mapped_column(String(128), index=True)
    tenant: Mapped[str] = mapped_column(String(64), default="")
    region: Mapped[str] = mapped_column(String(64), default="")
    stable: Mapped[str] = mapped_column(String(71))
    canary: Mapped[str] = mapped_column(String(71))
    status: Mapped[str] = mapped_column(String(16), index=True)
    step: Mapped[int] = mapped_column(Integer, default=0)
    weight: Mapped[int] = mapped_column(Integer, default=0)
    state: Mapped[JsonObject] = mapped_column()
    revision: Mapped[int] = mapped_column(Integer, default=0)
    started_at: Mapped[str] = mapped_column(String(32))


class RequestRow(Table):
    """One served request: measurements, never its text.

    caller: the user whose token it came with. end_user: a hash of the request's `user`, while a rollout is live. cut:
    the request's own max_tokens, stop text, format or tools shaped the answer, so it is not scored.
    """

    __tablename__ = "requests"
    id: Mapped[str] = mapped_column(String(64), primary_key=True)
    at: Mapped[str] = mapped_column(String(32), index=True)
    name: Mapped[str] = mapped_column(String(128))
    tenant: Mapped[str] = mapped_column(String(64), default="")
    region: Mapped[str] = mapped_column(String(64), default="")
    caller: Mapped[str] = mapped_column(String(128), default="")
    end_user: Mapped[str] = mapped_column(String(16), default="")
    version: Mapped[str] = mapped_column(String(71))
    rollout: Mapped[int | None] = mapped_column(Integer, default=None)
    arm: Mapped[str] = mapped_column(String(8))
    ok: Mapped[bool] = mapped_column(Boolean)
    cut: Mapped[bool] = mapped_column(Boolean, default=False)
    seconds: Mapped[float] = mapped_column(Float)
    prompt_tokens: Mapped[int] = mapped_column(Integer, default=0)
    completion_tokens: Mapped[int] = mapped_column(Integer, default=0)
    # scores: metric name -> number (json_valid at serving time, others once feedback arrives);
    # features: what drift monitoring compares (nearest, characters).
    scores: Mapped[JsonObject] = mapped_column()
    features: Mapped[JsonObject] = mapped_column()


class RecallRow(Table):
    """A record or blob that was recalled, and the cause of the recall."""

    __tablename__ = "recalls"
    digest: Mapped[str] = mapped_column(String(71), primary_key=True)
    cause: Mapped[str] = mapped_column(String(256), primary_key=True)
    reason: Mapped[str] = mapped_column(Text)
    at: Mapped[str] = mapped_column(String(32))


JobState = Literal["queued", "running", "paused", "succeeded", "failed", "cancelled"]


class JobRow(Table):
    """A job of the queue (jobs/). Times are seconds since 1970, None for what has not happened.

    project: the name of the project whose workers may take it. wanted: the state that a person asked a running job to
    go to, "" where nobody did. key: the idempotency key that its creator gave. due: not to be taken before. fence: the
    fencing token, raised whenever the job is taken or taken back. worker, until: who performs it, and the end of the
    lease. result and error are empty where there is none.
    """

    __tablename__ = "jobs"
    __table_args__ = (UniqueConstraint("created_by", "key"),)
    id: Mapped[int] = mapped_column(Integer, primary_key=True, autoincrement=True)
    project: Mapped[str] = mapped_column(String(64))
    kind: Mapped[str] = mapped_column(String(32))
    arguments: Mapped[JsonObject] = mapped_column()
    state: Mapped[JobState] = mapped_column(String(16))
    wanted: Mapped[str] = mapped_column(String(16), default="")
    priority: Mapped[int] = mapped_column(Integer, default=0)
    tenant: Mapped[str] = mapped_column(String(64), default="")
    region: Mapped[str] = mapped_column(String(64), default="")
    created_by: Mapped[str] = mapped_column(String(128))
    key: Mapped[str | None] = mapped_column(String(128), default=None)
    attempts: Mapped[int] = mapped_column(Integer, default=0)
    most_attempts: Mapped[int] = mapped_column(Integer)
    due: Mapped[float] = mapped_column(Float)
    fence: Mapped[int] = mapped_column(Integer, default=0)
    worker: Mapped[str] = mapped_column(String(256), default="")
    until: Mapped[float | None] = mapped_column(Float, default=None)
    progress: Mapped[JsonObject] = mapped_column()
    result: Mapped[JsonObject] = mapped_column()
    error: Mapped[JsonObject] = mapped_column()
    created: Mapped[float] = mapped_column(Float)
    started: Mapped[float | None] = mapped_column(Float, default=None)
    ended: Mapped[float | None] = mapped_column(Float, default=None)

    @property
    def scope(self) -> Scope:
        """Whom it is for."""
        return Scope(self.tenant, self.region)


class JobEventRow(Table):
    """A line of a job's log. number: from 1 for each job."""

    __tablename__ = "job_events"
    job: Mapped[int] = mapped_column(Integer, primary_key=True, autoincrement=False)
    number: Mapped[int] = mapped_column(Integer, primary_key=True, autoincrement=False)
    at: Mapped[float] = mapped_column(Float)
    message: Mapped[str] = mapped_column(Text)


class JobCurveRow(Table):
    """The curve of one of a job's trainings (jobs/curves.py). training: its name."""

    __tablename__ = "job_curves"
    job: Mapped[int] = mapped_column(Integer, primary_key=True, autoincrement=False)
    training: Mapped[str] = mapped_column(String(256), primary_key=True)
    curve: Mapped[JsonObject] = mapped_column()


class FileRow(Table):
    """A file that a client uploaded, or that a job made for one (store/uploads.py). Its bytes are under `files/`.

    number: the order in which files came. file: the id that clients know. created: seconds since 1970.
    """

    __tablename__ = "files"
    number: Mapped[int] = mapped_column(Integer, primary_key=True, autoincrement=True)
    file: Mapped[str] = mapped_column(String(64), unique=True)
    tenant: Mapped[str] = mapped_column(String(64), default="")
    region: Mapped[str] = mapped_column(String(64), default="")
    created_by: Mapped[str] = mapped_column(String(128))
    name: Mapped[str] = mapped_column(String(256))
    purpose: Mapped[str] = mapped_column(String(32))
    size: Mapped[int] = mapped_column(BigInteger)
    digest: Mapped[str] = mapped_column(String(71))
    created: Mapped[float] = mapped_column(Float)

    @property
    def scope(self) -> Scope:
        """Whom it is for."""
        return Scope(self.tenant, self.region)


class WebhookRow(Table):
    """How far a project's webhook has read the audit log. seq: the newest entry that it has seen."""

    __tablename__ = "webhooks"
    project: Mapped[str] = mapped_column(String(64), primary_key=True)
    name: Mapped[str] = mapped_column(String(64), primary_key=True)
    seq: Mapped[int] = mapped_column(Integer)


class DeliveryRow(Table):
    """An event that did not arrive at a webhook yet. seq: its audit entry. due: not to be sent before, in seconds since
    1970. given_up: it failed as often as it may. error: what went wrong last.
    """

    __tablename__ = "deliveries"
    project: Mapped[str] = mapped_column(String(64), primary_key=True)
    webhook: Mapped[str] = mapped_column(String(64), primary_key=True)
    event: Mapped[str] = mapped_column(String(64), primary_key=True)
    seq: Mapped[int] = mapped_column(Integer)
    type: Mapped[str] = mapped_column(String(64))
    body: Mapped[str] = mapped_column(Text)
    attempts: Mapped[int] = mapped_column(Integer, default=0)
    given_up: Mapped[bool] = mapped_column(Boolean, default=False)
    due: Mapped[float] = mapped_column(Float)
    error: Mapped[str] = mapped_column(String(256), default="")


class HeldRow(Table):
    """An answer that waits for a reviewer, or that one decided on, until `until` (seconds since 1970, as all times).

    id: the request's. caller: the user whose token it came with. reasons: the rules that hold it. digest, given: of the
    answer's text, and of the text that left or "". texts: the conversation, the answer, what an edited one must fit,
    and the response. at_deadline: refuse or release. state: waiting, released, replaced or refused.
    """

    __tablename__ = "held_answers"
    id: Mapped[str] = mapped_column(String(64), primary_key=True)
    name: Mapped[str] = mapped_column(String(128))
    version: Mapped[str] = mapped_column(String(71))
    tenant: Mapped[str] = mapped_column(String(64), default="")
    region: Mapped[str] = mapped_column(String(64), default="")
    caller: Mapped[str] = mapped_column(String(128))
    reasons: Mapped[list[str]] = mapped_column()
    digest: Mapped[str] = mapped_column(String(71))
    given: Mapped[str] = mapped_column(String(71), default="")
    texts: Mapped[JsonObject] = mapped_column()
    at: Mapped[float] = mapped_column(Float)
    deadline: Mapped[float] = mapped_column(Float)
    until: Mapped[float] = mapped_column(Float, index=True)
    at_deadline: Mapped[str] = mapped_column(String(8))
    state: Mapped[str] = mapped_column(String(16))
    decided_by: Mapped[str] = mapped_column(String(128), default="")
    reason: Mapped[str] = mapped_column(Text, default="")
    decided: Mapped[float | None] = mapped_column(Float, default=None)


Index("held_by_state", HeldRow.state, HeldRow.deadline)


class ReviewItemRow(Table):
    """A row or a kept request that people review (data/review/queue.py).

    kind: `row` or `case`. subject: the row's id, or the request's. dataset, split: where the row was found; "" for a
    case. why: what was found -> detail. messages: the row's turns at that time; empty for a case, whose text stays with
    it. wanted: how many people decide. state: open, conflict, accept, edit or reject. revision: raised by a decision.
    """

    __tablename__ = "review_items"
    __table_args__ = (UniqueConstraint("kind", "subject"),)
    id: Mapped[int] = mapped_column(Integer, primary_key=True, autoincrement=True)
    kind: Mapped[str] = mapped_column(String(16))
    subject: Mapped[str] = mapped_column(String(128))
    dataset: Mapped[str] = mapped_column(String(71), default="")
    split: Mapped[str] = mapped_column(String(16), default="")
    why: Mapped[JsonObject] = mapped_column()
    messages: Mapped[JsonObject] = mapped_column()
    wanted: Mapped[int] = mapped_column(Integer)
    state: Mapped[str] = mapped_column(String(16), index=True)
    revision: Mapped[int] = mapped_column(Integer, default=0)


class ReviewDecisionRow(Table):
    """What one person decided on an item. number: from 1. messages: the edited turns; empty unless it is an edit.

    settles: it ended a conflict of the others.
    """

    __tablename__ = "review_decisions"
    item: Mapped[int] = mapped_column(Integer, primary_key=True, autoincrement=False)
    number: Mapped[int] = mapped_column(Integer, primary_key=True, autoincrement=False)
    reviewer: Mapped[str] = mapped_column(String(128))
    decision: Mapped[str] = mapped_column(String(16))
    reason: Mapped[str] = mapped_column(Text)
    messages: Mapped[JsonObject] = mapped_column()
    settles: Mapped[bool] = mapped_column(Boolean)
    at: Mapped[str] = mapped_column(String(32))


Index("jobs_by_state", JobRow.project, JobRow.state, JobRow.priority, JobRow.id)
Index("requests_by_rollout", RequestRow.rollout, RequestRow.at)
Index("requests_by_version", RequestRow.version, RequestRow.at, RequestRow.tenant, RequestRow.region, RequestRow.ok)
