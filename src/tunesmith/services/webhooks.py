"""The project's webhooks: what an audit entry says to other systems; send, show, repeat and test them.

Events name things by number, name and digest. No reason, message or row is in them: what people wrote stays here.
"""

from __future__ import annotations

import contextlib
import json
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from datetime import datetime
from typing import NamedTuple

from sqlalchemy import select
from sqlalchemy.orm import Session

from tunesmith.core.clock import now
from tunesmith.core.errors import NotThere
from tunesmith.core.reading.strict_json import Fields, JsonObject
from tunesmith.core.view import View
from tunesmith.project import Project
from tunesmith.services.actions import Acting, Named, Request, action
from tunesmith.services.fine_tuning import JOB, KIND
from tunesmith.store.locks import LockHeld
from tunesmith.store.people.identities import require
from tunesmith.store.tables import AuditRow, DeliveryRow, JobRow, RolloutRow, VersionRow
from tunesmith.webhooks import deliveries
from tunesmith.webhooks.deliveries import Event
from tunesmith.webhooks.sending import Outgoing, secret_of, send
from tunesmith.webhooks.settings import TEST, EventType, WebhookSettings

_POLL = 1.0  # seconds between two looks at the audit log and at what is due
_HELD = 20.0  # seconds until another worker's lock is tried again


class WebhookView(View):
    """A webhook. host: of its URL. waiting: events to be sent, now or again; given_up: those that failed too often."""

    name: str
    host: str
    events: tuple[str, ...]
    waiting: int
    given_up: int


class FailedDelivery(View):
    """An event that did not arrive. error: what went wrong last."""

    webhook: str
    event: str
    type: str
    attempts: int
    given_up: bool
    error: str


class WebhookList(View):
    """The project's webhooks, and the newest events that did not arrive."""

    webhooks: tuple[WebhookView, ...]
    failed: tuple[FailedDelivery, ...]


class Retried(View):
    """How many events of a webhook a worker tries again now."""

    webhook: str
    events: int


class Tested(View):
    """An event of the type webhook.test that was sent. problem: why it did not arrive, "" where it did."""

    webhook: str
    event: str
    problem: str


class RetryWebhook(Request):
    """What did not arrive at a webhook, to be sent again."""

    webhook: Named


class TestWebhook(Request):
    """An event of the type webhook.test, to be sent to a webhook."""

    webhook: Named


class Deliverer:
    """Sends a project's events. One process does so at a time, as long as it holds the project's lock.

    Raises UsageError where a secret is missing.
    """

    def __init__(self, project: Project, say: Callable[[str], None] = lambda _: None) -> None:
        self._store, self._project, self._say = project.store, project.settings.name, say
        self._webhooks = project.settings.webhooks
        self._secrets = check_secrets(project)
        self._wanted = {name: frozenset(webhook.events) for name, webhook in self._webhooks.items()}
        self.stopping = threading.Event()

    def run(self) -> None:
        """Send until `stopping` is set, whenever no other process does."""
        while not self.stopping.is_set():
            try:
                with self._store.lock(f"webhooks {self._project}", "sending webhooks"):
                    while not self.stopping.wait(_POLL):
                        self.turn()
                    self.turn()  # what the last job of a worker that ends came to
            except LockHeld:
                self.stopping.wait(_HELD)
            except Exception as error:  # noqa: BLE001 - one turn that fails must not end the thread
                self._say(f"webhooks wait: {error}")
                self.stopping.wait(_HELD)

    def turn(self) -> None:
        """Note what is new in the audit log, and send what is due."""
        while deliveries.note_events(self._store, self._project, self._wanted, event_of, time.time()):
            continue
        queues = list(deliveries.due(self._store, self._project, self._wanted, time.time()).values())
        if not queues:
            return
        problems = send([[self._outgoing(delivery) for delivery in queue] for queue in queues])
        results = {
            delivery: problem
            for queue, found in zip(queues, problems, strict=True)
            for delivery, problem in zip(queue, found, strict=False)
        }
        deliveries.record(self._store, self._project, results, time.time())
        for delivery, problem in results.items():
            if problem:
                self._say(f"webhook {delivery.webhook}: {delivery.type} {delivery.event}: {problem}")

    def _outgoing(self, delivery: DeliveryRow) -> Outgoing:
        name = delivery.webhook
        return Outgoing(self._webhooks[name].url, self._secrets[name], delivery.event, delivery.body)


def check_secrets(project: Project) -> dict[str, bytes]:
    """The secrets of the project's webhooks, by name. Raises UsageError where one is missing."""
    return {name: _secret(name, webhook) for name, webhook in project.settings.webhooks.items()}


@contextlib.contextmanager
def delivering(project: Project, say: Callable[[str], None] = lambda _: None) -> Iterator[None]:
    """Send the project's events in a thread meanwhile. Raises UsageError where a secret is missing."""
    if not project.settings.webhooks:
        yield
        return
    deliverer = Deliverer(project, say)
    thread = threading.Thread(target=deliverer.run, name="webhooks", daemon=True)
    thread.start()
    try:
        yield
    finally:
        deliverer.stopping.set()
        thread.join()


def list_webhooks(project: Project) -> WebhookList:
    """The project's webhooks, and what did not arrive."""
    found = deliveries.count(project.store, project.settings.name)
    shown = tuple(
        WebhookView.of(webhook, name=name, waiting=found.get((name, False), 0), given_up=found.get((name, True), 0))
        for name, webhook in project.settings.webhooks.items()
    )
    failed = deliveries.failed(project.store, project.settings.name)
    return WebhookList(webhooks=shown, failed=tuple(FailedDelivery.of(each) for each in failed))


@action(
    "webhook.retry", says="sent a webhook's failed requests again", permission="webhook.retry", tokens=("operate",),
    at="/webhooks/{webhook}/retry", whole=True, form=True,
)  # fmt: skip
def retry(acting: Acting, asked: RetryWebhook) -> Retried:
    """Let a worker try again at once what did not arrive, given up or not."""
    name, project, detail = asked.webhook, acting.project, {"events": 0}
    _named(project, name)
    with acting.store.change(acting.actor, "webhook.retry", name, detail) as session:
        require(session, acting.actor, "webhook.retry")
        detail["events"] = deliveries.try_again(session, project.settings.name, name, time.time())
    return Retried(webhook=name, events=detail["events"])


@action("webhook.test", permission="webhook.retry", whole=True)
def test(acting: Acting, asked: TestWebhook) -> Tested:
    """Send an event of the type webhook.test now. Raises UsageError where the secret is missing."""
    name, project = asked.webhook, acting.project
    webhook = _named(project, name)
    event = f"evt_{uuid.uuid4().hex}"
    body = event_body(event, TEST, now(), {"project": project.settings.name, "webhook": name})
    ((problem,),) = send([[Outgoing(webhook.url, _secret(name, webhook), event, body)]])
    return Tested(webhook=name, event=event, problem=problem)


def _named(project: Project, name: str) -> WebhookSettings:
    webhooks = project.settings.webhooks
    if name not in webhooks:
        known = f"they are {', '.join(webhooks)}" if webhooks else "the project file has none"
        raise NotThere(f"there is no webhook {name[:40]!r}; {known}", where="webhooks", fix="add it to tunesmith.yaml")
    return webhooks[name]


def _secret(name: str, webhook: WebhookSettings) -> bytes:
    return secret_of(webhook.secret, f"webhooks.{name}.secret")


_ENDED: Mapping[tuple[bool, str], EventType] = {
    (True, "succeeded"): "fine_tuning.job.succeeded",
    (True, "failed"): "fine_tuning.job.failed",
    (True, "cancelled"): "fine_tuning.job.cancelled",
    (False, "succeeded"): "job.succeeded",
    (False, "failed"): "job.failed",
    (False, "cancelled"): "job.cancelled",
}


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
    fine_tuning = job is not None and job.kind == KIND
    kind = _ENDED.get((fine_tuning, entry.detail.get("state", "")))
    if job is None or kind is None:
        return None
    if fine_tuning:  # as OpenAI's: the client reads the job
        return _Said(kind, {"id": f"{JOB}{job.id}"})
    data = _about(job) | {"error": entry.detail.get("error") or None}
    return _Said(kind, data | {"version": job.result.get("register", {}).get("version")})


def _job_added(session: Session, entry: AuditRow) -> _Said | None:
    """A run that a cause queued. An idempotency key that gave a job again adds no arguments."""
    job = session.get(JobRow, entry.detail.get("job"))
    if job is None or "arguments" not in entry.detail or not job.arguments.get("cause"):
        return None
    kind: EventType = "drift.detected" if job.arguments["cause"].startswith("drift: ") else "retraining.queued"
    return _Said(kind, _about(job))


def _about(job: JobRow) -> JsonObject:
    scope = {"project": job.project, "tenant": job.tenant, "region": job.region}
    return {"job": job.id, "kind": job.kind, **scope, "cause": job.arguments.get("cause")}


def _registered(session: Session, entry: AuditRow) -> _Said | None:
    return _Said("version.waiting_for_approval", _version(session, entry.detail["version"]["digest"]))


def _decided(session: Session, entry: AuditRow) -> _Said | None:
    kind: EventType = "version.approved" if entry.action == "version.approve" else "version.refused"
    return _Said(kind, _version(session, entry.subject))


def _version(session: Session, digest: str) -> JsonObject:
    row = session.scalars(select(VersionRow).where(VersionRow.digest == digest)).first()
    if row is None:
        return {"version": None, "digest": digest}
    label = f"{row.name}@v{row.number}"
    return {"version": label, "digest": digest, "name": row.name, "tenant": row.tenant, "region": row.region}


def _rollout_started(session: Session, entry: AuditRow) -> _Said | None:
    return _rollout(session, entry, "rollout.promoted" if entry.detail["status"] == "promoted" else "rollout.started")


def _rollout(session: Session, entry: AuditRow, kind: EventType) -> _Said | None:
    row = session.get(RolloutRow, entry.detail.get("rollout"))
    if row is None:
        return None
    arms = {"version": _label(session, row.canary), "replaces": _label(session, row.stable)}
    where = {"name": row.name, "tenant": row.tenant, "region": row.region}
    return _Said(kind, {"rollout": row.id, **where, **arms})


def _label(session: Session, digest: str) -> str | None:
    label: str | None = _version(session, digest)["version"]
    return label


def _champion(entry: AuditRow, kind: EventType) -> _Said:
    stated = ("tenant", "region", "version", "digest")
    return _Said(kind, {"name": entry.subject.partition("@")[0], **{key: entry.detail.get(key) for key in stated}})


def _recalled(_session: Session, entry: AuditRow) -> _Said | None:
    reached = [one for one in entry.detail.get("reached", ()) if one["kind"] == "version"]
    champions = [one for one in entry.detail.get("aliases", ()) if one["alias"] == "champion"]
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
