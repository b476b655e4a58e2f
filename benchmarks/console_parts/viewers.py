"""Two hundred viewers of the stream of changes: when the last one hears of a change, and what it costs the server."""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass, field
from typing import Any

from tests.fabricate import OWNER

from console_parts.asking import Console, middle_and_p95, page
from console_parts.many import put_requests
from engine_parts.report import Line
from service_parts.kept import Found
from tunesmith.rollout.state import get_rollout
from tunesmith.store.people.identities import add_user

VIEWERS, CHANGES = 200, 10
_EACH = 10  # pages that one person has open
_APART = 4.0  # seconds between changes
_MOST_SECONDS, _MOST_MS = 4.0, 100.0


@dataclass
class _Viewer:
    """heard: when its newest event of a change of state came."""

    heard: float = 0.0
    opened: asyncio.Event = field(default_factory=asyncio.Event)


def measure(where: Console, viewers: int = VIEWERS, changes: int = CHANGES) -> Found:
    """Lines for the delay, the cost, and a page meanwhile."""
    people = [f"viewer-{number}" for number in range(-(-viewers // _EACH))]
    for name in people:
        add_user(where.store, name, ["operator"], actor=OWNER)
    cookies = [where.cookie(people[number // _EACH]) for number in range(viewers)]
    figures = asyncio.run(_watched(where, cookies, changes))
    return Found(_lines(viewers, figures), figures)


async def _watched(where: Console, cookies: list[str], changes: int) -> dict[str, Any]:
    loop, cookie = asyncio.get_running_loop(), where.cookie()

    async def page_ms() -> float:
        began = time.perf_counter()
        await loop.run_in_executor(None, page, where, cookie, "/")
        return 1000 * (time.perf_counter() - began)

    await page_ms()
    alone = await _idle(where)
    held = where.memory()
    viewers = [_Viewer() for _ in cookies]
    streams = [asyncio.create_task(_listen(where, *pair)) for pair in zip(viewers, cookies, strict=True)]
    try:
        await asyncio.gather(*(viewer.opened.wait() for viewer in viewers))
        await asyncio.sleep(3)
        delays, pages, used, began = list[float](), list[float](), where.cpu(), time.perf_counter()
        for number in range(changes):
            at = time.perf_counter()
            await loop.run_in_executor(None, _change, where, number)
            pages.append(await page_ms())
            while min(viewer.heard for viewer in viewers) < at:
                assert time.perf_counter() - at < 120, "a viewer did not hear of a change"
                await asyncio.sleep(0.005)
            delays.append(max(viewer.heard for viewer in viewers) - at)
            await asyncio.sleep(max(0.0, at + _APART - time.perf_counter()))
        spent, wall = where.cpu() - used, time.perf_counter() - began
        held = where.memory() - held
        began = time.perf_counter()
        fetched = asyncio.gather(*(_fetch(where, each) for each in cookies))
        await asyncio.sleep(0.05)
        among = await page_ms()
        await fetched
        all_at_once = time.perf_counter() - began
    finally:
        for stream in streams:
            stream.cancel()
        await asyncio.gather(*streams, return_exceptions=True)
    median, p95 = middle_and_p95(pages)
    return {
        "last_heard_s": delays,
        "page_ms": median,
        "page_p95_ms": p95,
        "cpu_share": spent / wall,
        "cpu_share_without_viewers": alone,
        "memory_bytes": held,
        "all_fetch_s": all_at_once,
        "page_among_them_ms": among,
    }


async def _idle(where: Console, seconds: float = 3.0) -> float:
    """The share of a processor that the server uses without a viewer."""
    used, began = where.cpu(), time.perf_counter()
    await asyncio.sleep(seconds)
    return (where.cpu() - used) / (time.perf_counter() - began)


def _change(where: Console, number: int) -> None:
    """A change of state; with every second one, a request comes too."""
    where.change()
    if number % 2:
        put_requests(where.store, get_rollout(where.store, where.made.rollout), 1)


async def _listen(where: Console, viewer: _Viewer, cookie: str) -> None:
    """Keep a stream open and note when it tells of a change of state."""
    reader, writer = await asyncio.open_connection("127.0.0.1", where.port)
    try:
        writer.write(_request("/console/changes", cookie))
        head = await reader.readuntil(b"\r\n\r\n")
        assert b" 200 " in head.split(b"\r\n")[0], head
        while line := await reader.readline():
            if line == b": open\n":
                viewer.opened.set()
            elif line == b"event: state\n":
                viewer.heard = time.perf_counter()
    finally:
        writer.close()


async def _fetch(where: Console, cookie: str) -> None:
    """What a page does that hears of a change: it fetches its parts again."""
    reader, writer = await asyncio.open_connection("127.0.0.1", where.port)
    writer.write(_request("/", cookie, "Connection: close\r\n"))
    answer = await reader.read()
    writer.close()
    assert b" 200 " in answer.split(b"\r\n")[0], answer[:200]


def _request(path: str, cookie: str, more: str = "") -> bytes:
    return f"GET {path} HTTP/1.1\r\nHost: 127.0.0.1\r\nCookie: {cookie}\r\n{more}\r\n".encode()


def _lines(viewers: int, found: dict[str, Any]) -> list[Line]:
    last, share = max(found["last_heard_s"]), found["cpu_share"]
    median, p95 = found["page_ms"], found["page_p95_ms"]
    return [
        Line(
            f"{viewers} viewers: until the last hears of a change",
            f"{last:.2f} s at most",
            shown="-",
            wanted=f"< {_MOST_SECONDS:g} s",
            reached=last < _MOST_SECONDS,
        ),
        Line(
            "a page right after each change",
            f"{median:.0f} ms, p95 {p95:.0f} ms",
            shown="-",
            wanted=f"median < {_MOST_MS:g} ms",
            reached=median < _MOST_MS,
        ),
        Line(
            "the server's processor time meanwhile; without viewers",
            f"{share:.0%} of a core; {found['cpu_share_without_viewers']:.0%}",
        ),
        Line("memory more", f"{found['memory_bytes'] / 1e6:.0f} MB"),
        Line(
            f"all {viewers} fetch the first page at once; another page among them",
            f"{found['all_fetch_s']:.1f} s; {found['page_among_them_ms']:.0f} ms",
        ),
    ]
