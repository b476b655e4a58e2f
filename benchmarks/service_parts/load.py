"""A load generator for chat completions: a process of its own, with raw HTTP/1.1 over kept connections.

    python load.py '{"url": "http://127.0.0.1:8000", ...}'

It writes the same request over and over and reads answers by their Content-Length, so that it costs a fraction of what
a client library costs: service.py measures and prints its own limit against a server that does nothing.
"""

from __future__ import annotations

import asyncio
import json
import sys
import time
from typing import Any
from urllib.parse import urlsplit


class Connection:
    """One connection that asks one request at a time."""

    def __init__(self, told: dict[str, Any]) -> None:
        address = urlsplit(told["url"])
        self.host, self.port = str(address.hostname), int(address.port or 80)
        body = json.dumps(told["body"]).encode()
        head = f"POST {told.get('path', '/v1/chat/completions')} HTTP/1.1\r\nHost: {self.host}\r\n"
        head += f"Authorization: Bearer {told['token']}\r\nContent-Type: application/json\r\n"
        self.request = f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body
        self.reader: asyncio.StreamReader | None = None
        self.writer: asyncio.StreamWriter | None = None

    async def ask(self) -> tuple[int, bytes]:
        """Status and body of one answer."""
        if self.writer is None or self.reader is None:
            self.reader, self.writer = await asyncio.open_connection(self.host, self.port)
        self.writer.write(self.request)
        head = await self.reader.readuntil(b"\r\n\r\n")
        lower = head.lower()
        place = lower.find(b"content-length:")
        if place < 0:
            raise ValueError(f"no Content-Length: {head[:200]!r}")
        size = int(lower[place + 15 : lower.index(b"\r", place)])
        body = await self.reader.readexactly(size)
        if b"connection: close" in lower:
            self.close()
        return int(head[9:12]), body

    def close(self) -> None:
        """Close it; the next request opens another one."""
        if self.writer is not None:
            self.writer.close()
        self.reader = self.writer = None


async def generate(told: dict[str, Any]) -> dict[str, Any]:
    """Ask for some seconds from several connections; returns requests/s, failures, and milliseconds.

    rate: requests/s in all, begun on time; None: as fast as can be. requests: how many at most. must_have: has to be in
    the body of each answer.
    """
    connections, seconds, rate = told["connections"], told["seconds"], told.get("rate")
    must_have = told.get("must_have", "").encode()
    taken: list[float] = []
    failures: list[str] = []
    began = time.perf_counter()
    until, started, most = began + seconds, 0, told.get("requests", 1 << 62)

    async def one() -> None:
        nonlocal started
        connection = Connection(told)
        while (now := time.perf_counter()) < until and started < most:
            due, started = now, started + 1
            if rate is not None:
                due = began + started / rate  # the time it was due, so that a stall counts for all that it delays
                if due >= until:
                    return
                await asyncio.sleep(max(0.0, due - now))
            try:
                status, body = await connection.ask()
                if status != 200 or must_have not in body:
                    failures.append(f"{status} {body[:200]!r}")
            except (OSError, asyncio.IncompleteReadError, ValueError) as error:
                failures.append(repr(error))
                connection.close()
            taken.append(time.perf_counter() - due)
        connection.close()

    await asyncio.gather(*(one() for _ in range(connections)))
    seconds = time.perf_counter() - began
    taken.sort()
    share = [1000 * taken[min(len(taken) - 1, int(part * len(taken)))] for part in (0.5, 0.99)] if taken else [0, 0]
    return {
        "requests": len(taken),
        "per_second": (len(taken) - len(failures)) / seconds,
        "failed": len(failures),
        "first_failures": failures[:3],
        "p50_ms": share[0],
        "p99_ms": share[1],
    }


if __name__ == "__main__":
    print(json.dumps(asyncio.run(generate(json.loads(sys.argv[1])))))
