"""Sends deliveries by POST, each within a time limit, without following redirects or reading what is answered."""

from __future__ import annotations

import asyncio
import base64
import binascii
import hashlib
import hmac
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import httpx

from tunesmith.core.errors import UsageError
from tunesmith.webhooks.settings import WebhookSettings

# Seconds until an answer's status must have come.
SECONDS = 10.0


@dataclass(frozen=True)
class Outgoing:
    """A body on its way. identifier: the same for each attempt, so that a receiver can drop what it has."""

    url: str
    secret: bytes = field(repr=False)
    identifier: str
    body: str


def send(queues: Sequence[Sequence[Outgoing]], seconds: float = SECONDS) -> list[list[str]]:
    """Send each queue in order up to its first failure, and all queues at once.

    Returns for each queue what went wrong with those that were sent, "" where one arrived.
    """
    return asyncio.run(_send(queues, seconds))


async def _send(queues: Sequence[Sequence[Outgoing]], seconds: float) -> list[list[str]]:
    async with httpx.AsyncClient(follow_redirects=False, timeout=seconds) as client:
        return list(await asyncio.gather(*(_send_queue(client, queue, seconds) for queue in queues)))


async def _send_queue(client: httpx.AsyncClient, queue: Sequence[Outgoing], seconds: float) -> list[str]:
    problems: list[str] = []
    for outgoing in queue:
        problems.append(await _send_one(client, outgoing, seconds))
        if problems[-1]:
            break
    return problems


async def _send_one(client: httpx.AsyncClient, outgoing: Outgoing, seconds: float) -> str:
    """What went wrong, without anything that the receiver wrote; "" where it arrived."""
    body = outgoing.body.encode()
    headers = signed_headers(outgoing.secret, outgoing.identifier, int(time.time()), body)
    headers |= {"content-type": "application/json", "user-agent": "tunesmith"}
    try:
        # httpx limits each read; a receiver that sends a byte now and then is limited here.
        async with asyncio.timeout(seconds), client.stream("POST", outgoing.url, content=body, headers=headers) as got:
            status = got.status_code
    except (TimeoutError, httpx.TimeoutException):
        return f"no answer within {seconds:g} s"
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
