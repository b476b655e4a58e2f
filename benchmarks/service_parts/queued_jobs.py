"""10,000 jobs with an instant effect, four workers and a `kill -9` every second, on PostgreSQL; and procrastinate.

An effect is a row, written unless it is there, which both systems are given. Both have the same time after which a
silent worker's job is taken back. What is measured is the queue: Tunesmith's own worker has each job performed by a
process, which takes seconds to start, and its jobs take minutes.
"""

from __future__ import annotations

import contextlib
import random
import subprocess
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from sqlalchemy import create_engine, text
from tests.postgresql_server import empty_database, postgresql_server

from engine_parts.environments import Peer, install
from engine_parts.processes import Failed
from engine_parts.report import Line
from service_parts.kept import Found
from service_parts.processes import HERE, script, start
from tunesmith.store import database
from tunesmith.store.people import identities
from tunesmith.store.store import Store
from tunesmith.store.tables import JobRow

PROCRASTINATE = Peer("procrastinate", "procrastinate==3.10.0", also=("psycopg[binary]",))
JOBS, WORKERS, KILL_EVERY, LEASE, LONGEST = 10_000, 4, 1.0, 5.0, 900.0
_TABLE = "create table effects (number serial primary key, job integer not null)"


def measure(jobs: int = JOBS) -> Found:
    """Jobs/s of both, and what was lost or done twice."""
    with tempfile.TemporaryDirectory() as folder, postgresql_server(Path(folder) / "sql") as url:
        ours = _ours(Path(folder), url, jobs)
        print(f"  ours: {ours}", flush=True)
        empty_database(url)
        theirs = _theirs(Path(folder), url, jobs)
        print(f"  procrastinate: {theirs}", flush=True)
    name = f"procrastinate {PROCRASTINATE.requirement.split('==')[1]}"
    clean = ours["lost"] == ours["twice"] == ours["unfinished"] == 0
    lines = [
        Line(
            f"{jobs:,} jobs, {WORKERS} workers, {ours['kills']} kills (theirs: {theirs['kills']}): lost, done twice",
            f"{ours['lost'] + ours['unfinished']}, {ours['twice']}",
            name,
            f"{theirs['lost'] + theirs['unfinished']}, {theirs['twice']}",
            shown="-",
            wanted="0, 0",
            reached=clean,
        ),
        Line(
            "jobs/s meanwhile",
            f"{ours['per_second']:.0f}",
            name,
            f"{theirs['per_second']:.0f}",
            ours["per_second"] / theirs["per_second"],
        ),
    ]
    return Found(lines, {"ours": ours, "procrastinate": theirs})


def _ours(folder: Path, url: str, jobs: int) -> dict[str, Any]:
    store = Store(folder / "store", url)
    identities.ensure_owner(store)
    with database.writing(store.engine) as session:
        session.execute(text(_TABLE))
        facts: dict[str, Any] = {"project": "p", "kind": "run", "arguments": {}, "state": "queued", "created_by": "ann"}
        facts |= {"most_attempts": 1000, "due": 0.0, "created": time.time(), "progress": {}, "result": {}, "error": {}}
        session.add_all(JobRow(**facts) for _ in range(jobs))

    def left(connection: Any) -> int:
        return int(connection.execute(text("select count(*) from jobs where state <> 'succeeded'")).scalar())

    command = script("run_worker.py", str(store.root), url, str(LEASE))
    found = _disturbed(url, command, left, jobs, folder / "ours.log")
    store.engine.dispose()
    return found


def _theirs(folder: Path, url: str, jobs: int) -> dict[str, Any]:
    plain = url.replace("+psycopg", "")
    run = [str(install(PROCRASTINATE)), str(HERE / "run_procrastinate.py")]
    engine = create_engine(url)
    with engine.begin() as connection:
        connection.execute(text(_TABLE))
    engine.dispose()
    done = subprocess.run([*run, "add", plain, str(jobs)], capture_output=True, text=True, check=False)
    if done.returncode:
        raise Failed(done.stderr[-1500:])
    log = folder / "theirs.log"
    rescue = start([*run, "rescue", plain, str(LEASE)], log)

    def left(connection: Any) -> int:
        query = "select count(*) from procrastinate_jobs where status <> 'succeeded'"
        return int(connection.execute(text(query)).scalar())

    try:
        return _disturbed(url, [*run, "work", plain, str(LEASE)], left, jobs, log)
    finally:
        rescue.kill()
        rescue.wait()


def _disturbed(url: str, command: Sequence[str], left: Callable[[Any], int], jobs: int, log: Path) -> dict[str, Any]:
    """Run four workers and kill one each second, until no job is left or the time is over."""
    chosen, engine = random.Random(3), create_engine(url)
    workers, kills = [start(command, log) for _ in range(WORKERS)], 0
    began = first = time.monotonic()
    remaining = jobs
    try:
        while remaining and time.monotonic() - began < LONGEST:
            time.sleep(KILL_EVERY)
            with engine.connect() as connection:
                before, remaining = remaining, left(connection)
            if before == jobs:
                first = time.monotonic()  # the workers have started: until now nothing was done
                continue
            place = chosen.randrange(WORKERS)
            workers[place].kill()
            workers[place].wait()
            workers[place] = start(command, log)
            kills += 1
        seconds = time.monotonic() - first
        with engine.connect() as connection:
            query = "select count(distinct job), count(*) from effects"
            different, effects = connection.execute(text(query)).one()
    finally:
        with contextlib.suppress(OSError):
            for worker in workers:
                worker.kill()
                worker.wait()
        engine.dispose()
    return {
        "jobs": jobs,
        "seconds": seconds,
        "per_second": (jobs - remaining) / seconds,
        "kills": kills,
        "unfinished": remaining,
        "lost": jobs - remaining - different if remaining == 0 else 0,
        "twice": effects - different,
        "kill_every": KILL_EVERY,
        "lease": LEASE,
    }
