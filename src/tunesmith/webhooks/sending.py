"""Sends deliveries by POST, each within a time limit, without following redirects or reading what is answered."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

import httpx

from tunesmith.webhooks.signing import signed_headers

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
