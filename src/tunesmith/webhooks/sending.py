"""Sends a project's events while a worker runs: each by POST, within a time limit, without following redirects or
reading what is answered."""

from __future__ import annotations

import asyncio
import base64
import binascii
import contextlib
import hashlib
import hmac
import os
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import httpx

from tunesmith.core.errors import UsageError
from tunesmith.store.locks import LockHeld
from tunesmith.store.store import Store
from tunesmith.store.tables import DeliveryRow
from tunesmith.webhooks import deliveries
from tunesmith.webhooks.settings import WebhookSettings

SECONDS = 10.0  # until an answer's status must have come
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
        while deliveries.note_events(self._store, self._project, self._wanted, time.time()):
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


@dataclass(frozen=True)
class Outgoing:
    """A body on its way. identifier: the same for each attempt, so that a receiver can drop what it has."""

    url: str
    secret: bytes = field(repr=False)
    identifier: str
    body: str


def send(queues: Sequence[Sequence[Outgoing]]) -> list[list[str]]:
    """Send each queue in order up to its first failure, and all queues at once.

    Returns for each queue what went wrong with those that were sent, "" where one arrived.
    """
    return asyncio.run(_send(queues))


async def _send(queues: Sequence[Sequence[Outgoing]]) -> list[list[str]]:
    async with httpx.AsyncClient(follow_redirects=False, timeout=SECONDS) as client:
        return list(await asyncio.gather(*(_send_queue(client, queue) for queue in queues)))


async def _send_queue(client: httpx.AsyncClient, queue: Sequence[Outgoing]) -> list[str]:
    problems: list[str] = []
    for outgoing in queue:
        problems.append(await _send_one(client, outgoing))
        if problems[-1]:
            break
    return problems


async def _send_one(client: httpx.AsyncClient, outgoing: Outgoing) -> str:
    """What went wrong, without anything that the receiver wrote; "" where it arrived."""
    body = outgoing.body.encode()
    headers = signed_headers(outgoing.secret, outgoing.identifier, int(time.time()), body)
    headers |= {"content-type": "application/json", "user-agent": "tunesmith"}
    try:
        # httpx limits each read; a receiver that sends a byte now and then is limited here.
        async with asyncio.timeout(SECONDS), client.stream("POST", outgoing.url, content=body, headers=headers) as got:
            status = got.status_code
    except (TimeoutError, httpx.TimeoutException):
        return f"no answer within {SECONDS:g} s"
    except (httpx.HTTPError, httpx.InvalidURL, OSError) as error:
        return f"{type(error).__name__}: it could not be reached"
    if 200 <= status < 300:
        return ""
    return f"answered {status}{', and redirects are not followed' if 300 <= status < 400 else ''}"


_PREFIX = "whsec_"
_SIZES = range(24, 65)  # bytes, as the scheme has it


def secrets_of(webhooks: Mapping[str, WebhookSettings]) -> dict[str, bytes]:
    """The secrets of webhooks, by name. Raises UsageError as `secret_of` does."""
    return {name: secret_of(name, webhook) for name, webhook in webhooks.items()}


def secret_of(name: str, webhook: WebhookSettings) -> bytes:
    """The bytes of a webhook's secret, from its environment variable. name: of the webhook.

    Raises UsageError where it is missing or is no secret. The message never holds the secret.
    """
    variable, where = webhook.secret, f"webhooks.{name}.secret"
    given = os.environ.get(variable, "")
    fix = f'export {variable}="whsec_$(openssl rand -base64 32)", and give the receiver the same'
    if not given:
        raise UsageError(f"the environment variable {variable} is not set", where=where, fix=fix)
    try:
        secret = base64.b64decode(given.removeprefix(_PREFIX), validate=True)
    except binascii.Error:
        secret = b""
    if not given.startswith(_PREFIX) or len(secret) not in _SIZES:
        raise UsageError(f"{variable} is not {_PREFIX} and 24 to 64 bytes in base64", where=where, fix=fix)
    return secret


def signed_headers(secret: bytes, identifier: str, at: int, body: bytes) -> dict[str, str]:
    """The three headers of a delivery. at: seconds since 1970, of this attempt: receivers refuse old ones."""
    signature = hmac.new(secret, f"{identifier}.{at}.".encode() + body, hashlib.sha256).digest()
    return {
        "webhook-id": identifier,
        "webhook-timestamp": str(at),
        "webhook-signature": f"v1,{base64.b64encode(signature).decode()}",
    }
