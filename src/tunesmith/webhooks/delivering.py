"""Sends a project's events to its webhooks while a worker runs."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator, Mapping

from tunesmith.store.locks import LockHeld
from tunesmith.store.store import Store
from tunesmith.store.tables import DeliveryRow
from tunesmith.webhooks import deliveries
from tunesmith.webhooks.events import event_of
from tunesmith.webhooks.sending import Outgoing, secrets_of, send
from tunesmith.webhooks.settings import WebhookSettings

_POLL = 1.0  # seconds between two looks at the audit log and at what is due
_HELD = 20.0  # seconds until another worker's lock is tried again


class Deliverer:
    """Sends a project's events. One process does so at a time, as long as it holds the project's lock.

    Raises UsageError where a secret is missing.
    """

    def __init__(
        self, store: Store, project: str, webhooks: Mapping[str, WebhookSettings], say: Callable[[str], None]
    ) -> None:
        self._store, self._project, self._webhooks, self._say = store, project, webhooks, say
        self._secrets = secrets_of(webhooks)
        self._wanted = {name: frozenset(webhook.events) for name, webhook in webhooks.items()}
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
            for queue, said in zip(queues, problems, strict=True)
            for delivery, problem in zip(queue, said, strict=False)
        }
        deliveries.record(self._store, self._project, results, time.time())
        for delivery, problem in results.items():
            if problem:
                self._say(f"webhook {delivery.webhook}: {delivery.type} {delivery.event}: {problem}")

    def _outgoing(self, delivery: DeliveryRow) -> Outgoing:
        name = delivery.webhook
        return Outgoing(self._webhooks[name].url, self._secrets[name], delivery.event, delivery.body)


@contextlib.contextmanager
def delivering(
    store: Store, project: str, webhooks: Mapping[str, WebhookSettings], say: Callable[[str], None]
) -> Iterator[None]:
    """Send a project's events in a thread meanwhile. Raises UsageError where a secret is missing."""
    if not webhooks:
        yield
        return
    deliverer = Deliverer(store, project, webhooks, say)
    thread = threading.Thread(target=deliverer.run, name="webhooks", daemon=True)
    thread.start()
    try:
        yield
    finally:
        deliverer.stopping.set()
        thread.join()
