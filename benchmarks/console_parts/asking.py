"""A console that runs as a process, and a person who asks it for pages."""

from __future__ import annotations

import contextlib
import http.client
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil
from tests.fabricate import OWNER

from console_parts.many import Made
from service_parts.processes import free_port, listening, script
from tunesmith.server.console.routing import COOKIE
from tunesmith.store.people.sessions import open_session
from tunesmith.store.store import Store

PROJECT = """\
name: home
base: model
data:
  sources: [{path: rows.jsonl, licence: CC0-1.0}]
candidates:
  plain: {prompt: prompt.txt, max_tokens: 8}
  tuned: {prompt: prompt.txt, train: {epochs: 1}, max_tokens: 8}
"""


@dataclass(frozen=True)
class Console:
    """A server and its store. process: the server's number."""

    made: Made
    store: Store
    port: int
    process: int

    def cookie(self, name: str = OWNER) -> str:
        """A new session of a user, as a browser sends it."""
        opened = open_session(self.store, name, how="link")
        assert opened is not None
        return f"{COOKIE}={opened.secret}"

    def change(self) -> None:
        """Something changes: the audit log has a new entry."""
        with self.store.change(OWNER, "benchmark.change", "console", {}):
            pass

    def cpu(self) -> float:
        """Seconds of processor time that the server has used."""
        used = psutil.Process(self.process).cpu_times()
        return used.user + used.system

    def memory(self) -> int:
        """Bytes that the server holds now."""
        return int(psutil.Process(self.process).memory_info().rss)


@dataclass(frozen=True)
class Times:
    """Milliseconds of a page. first: of the first call; cpu: the server's processor time of the others, each."""

    first: float
    median: float
    p95: float
    cpu: float

    def said(self) -> str:
        """For the table."""
        return f"{self.median:.0f} ms, p95 {self.p95:.0f} ms"


@contextlib.contextmanager
def console(made: Made, folder: Path) -> Iterator[Console]:
    """A server over a store, with a project file."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tunesmith.yaml").write_text(PROJECT)
    store, port = Store(Path(made.root), url=made.url), free_port()
    told = made.told(port=port, project=str(folder))
    with listening(script("../console_parts/run_console.py", told), port, folder / "server.log") as process:
        yield Console(made, store, port, process.pid)
    store.engine.dispose()


def page(where: Console, cookie: str, path: str) -> bytes:
    """One page, over a connection of its own. Raises AssertionError for an answer that is none."""
    with contextlib.closing(http.client.HTTPConnection("127.0.0.1", where.port, timeout=300)) as connection:
        connection.request("GET", path, headers={"Cookie": cookie, "HX-Request": "true"})
        answer = connection.getresponse()
        body = answer.read()
    assert answer.status == 200, f"{path}: {answer.status} {body[:300]!r}"
    return body


def times(where: Console, path: str, count: int, before: Callable[[], None] = lambda: None) -> Times:
    """A page asked for so many times after the first. before: called before each, untimed."""
    cookie, taken, used = where.cookie(), list[float](), 0.0
    for _ in range(count + 1):
        before()
        spent, began = where.cpu(), time.perf_counter()
        page(where, cookie, path)
        taken.append(1000 * (time.perf_counter() - began))
        used += 1000 * (where.cpu() - spent) * (len(taken) > 1)
    return Times(taken[0], *middle_and_p95(taken[1:]), used / count)


def middle_and_p95(taken: Sequence[float]) -> tuple[float, float]:
    """The median and the 95th percentile."""
    ordered = sorted(taken)
    return ordered[len(ordered) // 2], ordered[math.ceil(0.95 * len(ordered)) - 1]
