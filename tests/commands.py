"""Commands of the command line, called in this process or started as a process of their own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from typer.testing import CliRunner

from tunesmith.cli.main import app


def call(folder: Path, *words: str) -> Any:
    """The JSON document of a command in a project's folder. Raises what the command raises."""
    return json.loads(printed(folder, *words, "--json"))


def printed(folder: Path, *words: str) -> str:
    """What a command prints for a person."""
    done = CliRunner().invoke(app, [*words, "-C", str(folder)], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return done.stdout


def started(folder: Path, *words: str, **more: Any) -> subprocess.Popen[str]:
    """A command in a project's folder, as a process."""
    command = [sys.executable, "-c", "from tunesmith.cli.main import main; main()", *words, "-C", str(folder)]
    return subprocess.Popen(command, text=True, env=dict(os.environ), stderr=subprocess.PIPE, **more)


def first_line(process: subprocess.Popen[str]) -> Any:
    """The first line that a command writes, which is JSON."""
    assert process.stdout is not None
    line = process.stdout.readline()
    assert line, process.stderr and process.stderr.read()
    return json.loads(line)
