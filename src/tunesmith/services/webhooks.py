"""Sends the project's webhooks, and shows, repeats and tests them."""

from __future__ import annotations

import contextlib
import threading
import time
import uuid
from collections.abc import Callable, Iterator

from tunesmith.core.clock import now
from tunesmith.core.errors import NotThere
from tunesmith.core.view import View
from tunesmith.project import Project
from tunesmith.services.actions import Acting, Named, Request, action
from tunesmith.services.webhook_events import event_body, event_of
from tunesmith.store.locks import LockHeld
from tunesmith.store.people.identities import require
from tunesmith.webhooks import deliveries
from tunesmith.webhooks.deliveries import Delivery
from tunesmith.webhooks.sending import Outgoing, secret_of, send
from tunesmith.webhooks.settings import TEST, WebhookSettings

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

    def _outgoing(self, delivery: Delivery) -> Outgoing:
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
    "webhook.retry", permission="webhook.retry", tokens=("operate",), at="/webhooks/{webhook}/retry", whole=True,
    form=True,
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
