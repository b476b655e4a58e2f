"""Two machines that share no folder: PostgreSQL and an S3 server hold what one builds and the other serves."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import openai
import pytest

from tests.own_cache import own_cache
from tests.s3_server import create_bucket, s3_environment
from tests.tiny_project import settings, write_project

pytestmark = pytest.mark.slow

# Several commands in one process: starting one takes seconds.
_COMMANDS = """
import json, sys
from tunesmith.cli.main import app
for words in json.loads(sys.argv[1]):
    code = app(words, standalone_mode=False)
    if code: sys.exit(code)
"""
_SERVE = "from tunesmith.cli.main import main; main()"


class Machine:
    """A folder with the project's files, and the environment in which its commands run."""

    def __init__(self, folder: Path, shared: dict[str, str]) -> None:
        self.folder = folder
        home = folder.parent / f"home of {folder.name}"
        home.mkdir()
        own = {"TUNESMITH_USER": "olive", "TUNESMITH_CACHE": own_cache(home / "cache"), "TMPDIR": str(home)}
        self.environment = {**os.environ, **shared, **own}

    def __call__(self, *commands: str) -> list[dict[str, Any]]:
        words = [[*command.split(), "-C", str(self.folder), "--json"] for command in commands]
        ran = subprocess.run(
            [sys.executable, "-c", _COMMANDS, json.dumps(words)],
            env=self.environment,
            capture_output=True,
            text=True,
            timeout=600,
        )
        assert ran.returncode == 0, ran.stderr[-3000:]
        assert "Traceback" not in ran.stderr
        return [json.loads(line) for line in ran.stdout.splitlines()]

    def served(self, token: str, model: str) -> str:
        """The model's answer to one request, through `tunesmith serve` and the official client."""
        words = ["serve", "-C", str(self.folder), "--json", "--port", "0", "--no-worker"]
        with subprocess.Popen(
            [sys.executable, "-c", _SERVE, *words],
            env=self.environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        ) as process:
            try:
                assert process.stdout is not None
                line = process.stdout.readline()
                assert line, process.stderr and process.stderr.read()[-3000:]
                client = openai.OpenAI(base_url=json.loads(line)["url"], api_key=token, timeout=120)
                asked = [{"role": "user", "content": "turn on kitchen light"}]
                answer = client.chat.completions.create(model=model, messages=asked)  # type: ignore[arg-type]
                return answer.model
            finally:
                process.terminate()


def test_one_builds_and_registers_and_the_other_verifies_approves_and_serves(
    s3: str, postgresql: str, tmp_path: Path
) -> None:
    create_bucket(s3, "team")
    shared = {
        **s3_environment(s3),
        "TUNESMITH_DATABASE_URL": postgresql,
        "TUNESMITH_BLOBS_URL": "s3://team/tiny",
    }
    few = {name: settings()["candidates"][name] for name in ("plain", "tuned")}  # type: ignore[index]
    write_project(tmp_path / "builder", candidates=few)
    shutil.copytree(tmp_path / "builder", tmp_path / "server")  # as from version control
    builder, server = Machine(tmp_path / "builder", shared), Machine(tmp_path / "server", shared)
    (run, *_, token) = builder(
        "run", "users add bea --role approver", "users add app --role operator", "users token app"
    )
    assert run["register"]["version"] == "tiny@v1"
    # Nothing of the builder's machine is needed from here on.
    (tmp_path / "builder").rename(tmp_path / "switched off")
    doctor, verified, *_ = server(
        "doctor",
        "verify tiny@v1",
        "approve tiny@v1 --as bea --reason fine",
        "rollout start tiny@v1",
        "audit verify",
    )
    assert doctor["ok"], doctor
    assert verified["ok"], verified["problems"]
    assert server.served(token["token"], "tiny") == "tiny@v1"
    kept = {path.name for path in (tmp_path / "server" / ".tunesmith").iterdir()}
    assert kept <= {"bases", "cache", "keys", "work"}  # no records and no database
