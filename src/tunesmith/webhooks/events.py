"""What an audit entry says to other systems: an event, in the form of OpenAI's.

Events name things by number, name and digest. No reason, message or row is in them: what people wrote stays here.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from datetime import datetime
from typing import NamedTuple

from sqlalchemy import select
from sqlalchemy.orm import Session

from tunesmith.core.reading.strict_json import Fields, JsonObject
from tunesmith.store.tables import CHAMPION, FINE_TUNING, FINE_TUNING_JOB, AuditRow, JobRow, RolloutRow, VersionRow
from tunesmith.webhooks.settings import EVENT_TYPES, EventType


class Event(NamedTuple):
    """What an audit entry says to other systems. id: the same whenever the entry is read."""

    id: str
    type: str
    body: str


class _Said(NamedTuple):
    type: EventType
    data: JsonObject


def event_of(session: Session, entry: AuditRow) -> Event | None:
    """The event of an entry; None where it is of no interest to other systems."""
    reader = _READERS.get(entry.action)
    said = reader(session, entry) if reader else None
    if said is None:
        return None
    identifier = f"evt_{entry.digest.removeprefix('sha256:')[:32]}"
    return Event(identifier, said.type, event_body(identifier, said.type, datetime.fromisoformat(entry.at), said.data))


def event_body(identifier: str, kind: str, at: datetime, data: Fields) -> str:
    """An event in the form of OpenAI's, as JSON."""
    document = {"id": identifier, "object": "event", "created_at": int(at.timestamp()), "type": kind, "data": data}
    return json.dumps(document, separators=(",", ":"))


def _job_ended(session: Session, entry: AuditRow) -> _Said | None:
    job = session.get(JobRow, int(entry.subject.removeprefix("job ")))
    tunes = job is not None and job.kind == FINE_TUNING
    ended = f"{'fine_tuning.' if tunes else ''}job.{entry.detail.get('state')}"
    kind = next((each for each in EVENT_TYPES if each == ended), None)
    if job is None or kind is None:
        return None
    if tunes:  # as OpenAI's: the client reads the job
        return _Said(kind, {"id": f"{FINE_TUNING_JOB}{job.id}"})
    data = _about(job) | {"error": entry.detail.get("error") or None}
    return _Said(kind, data | {"version": job.result.get("register", {}).get("version")})


def _job_added(session: Session, entry: AuditRow) -> _Said | None:
    """A run that a cause queued. An idempotency key that gave a job again adds no arguments."""
    job = session.get(JobRow, entry.detail.get("job"))
    if job is None or "arguments" not in entry.detail or not job.cause:
        return None
    kind: EventType = "drift.detected" if job.cause.startswith("drift: ") else "retraining.queued"
    return _Said(kind, _about(job))


def _about(job: JobRow) -> JsonObject:
    what = {"job": job.id, "kind": job.kind, "project": job.project}
    return {**what, **job.scope.fields(), "cause": job.cause or None}


def _registered(session: Session, entry: AuditRow) -> _Said | None:
    return _Said("version.waiting_for_approval", _version(session, entry.detail["version"]["digest"]))


def _decided(session: Session, entry: AuditRow) -> _Said | None:
    kind: EventType = "version.approved" if entry.action == "version.approve" else "version.refused"
    return _Said(kind, _version(session, entry.subject))


def _version(session: Session, digest: str) -> JsonObject:
    row = session.scalars(select(VersionRow).where(VersionRow.digest == digest)).first()
    if row is None:
        return {"version": None, "digest": digest}
    return {"version": row.label, "digest": digest, "name": row.name, **row.scope.fields()}


def _rollout_started(session: Session, entry: AuditRow) -> _Said | None:
    return _rollout(session, entry, "rollout.promoted" if entry.detail["status"] == "promoted" else "rollout.started")


def _rollout(session: Session, entry: AuditRow, kind: EventType) -> _Said | None:
    row = session.get(RolloutRow, entry.detail.get("rollout"))
    if row is None:
        return None
    arms = {"version": _label(session, row.canary), "replaces": _label(session, row.stable)}
    return _Said(kind, {"rollout": row.id, "name": row.name, **row.scope.fields(), **arms})


def _label(session: Session, digest: str) -> str | None:
    label: str | None = _version(session, digest)["version"]
    return label


def _champion(entry: AuditRow, kind: EventType) -> _Said:
    stated = ("tenant", "region", "version", "digest")
    return _Said(kind, {"name": entry.subject.partition("@")[0], **{key: entry.detail.get(key) for key in stated}})


def _recalled(_session: Session, entry: AuditRow) -> _Said | None:
    reached = [one for one in entry.detail.get("reached", ()) if one["kind"] == "version"]
    champions = [one for one in entry.detail.get("aliases", ()) if one["alias"] == CHAMPION]
    versions = [{"version": one["label"], "digest": one["digest"]} for one in reached]
    stopped = [{key: one[key] for key in ("name", "tenant", "region")} for one in champions]
    return _Said("recall.started", {"versions": versions, "champions_stopped": stopped, "audit_entry": entry.seq})


_READERS: Mapping[str, Callable[[Session, AuditRow], _Said | None]] = {
    "job.end": _job_ended,
    "job.cancel": _job_ended,
    "job.add": _job_added,
    "version.register": _registered,
    "version.approve": _decided,
    "version.refuse": _decided,
    "rollout.start": _rollout_started,
    "rollout.promote": lambda session, entry: _rollout(session, entry, "rollout.promoted"),
    "rollout.abort": lambda session, entry: _rollout(session, entry, "rollout.aborted"),
    "rollout.rollback": lambda session, entry: _rollout(session, entry, "rollout.rolled_back"),
    "champion.refused": lambda _, entry: _champion(entry, "champion.refused"),
    "champion.restored": lambda _, entry: _champion(entry, "champion.restored"),
    "recall.start": _recalled,
}
