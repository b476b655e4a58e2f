"""Commands of the command line, called in this process or started as a process of their own.

Python takes two to four seconds of the processor to import what a command needs. So most processes are forked from one
that has imported it. Those of `started` begin and end as a user's do: a forked one skips the end of the interpreter.
"""

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from typer.testing import CliRunner

from tests.forked import forkserver
from tunesmith.cli.main import app, main


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


class Forked:
    """A command in a project's folder, as a forked process. It is used as subprocess.Popen is."""

    def __init__(self, folder: Path, *words: str) -> None:
        pipes = Pipe(duplex=False), Pipe(duplex=False)
        given = ["tunesmith", *words, "-C", str(folder)], *(theirs for _, theirs in pipes)
        self._process = forkserver().Process(target=_run, args=given)
        self._process.start()
        for _, theirs in pipes:
            theirs.close()
        self.stdout, self.stderr = (os.fdopen(os.dup(ours.fileno())) for ours, _ in pipes)
        assert self._process.pid is not None
        self.pid = self._process.pid

    @property
    def returncode(self) -> int | None:
        """Its exit code, or minus the signal that ended it; None while it runs."""
        return self._process.exitcode

    def send_signal(self, number: signal.Signals) -> None:
        """Send it a signal, unless it has ended."""
        if self.returncode is None:
            with contextlib.suppress(ProcessLookupError):  # it has just ended
                os.kill(self.pid, number)

    def kill(self) -> None:
        """kill -9."""
        self.send_signal(signal.SIGKILL)

    def wait(self, timeout: float) -> int:
        """Its exit code. Raises AssertionError where it runs on for so many seconds."""
        self._process.join(timeout)
        code = self.returncode
        assert code is not None, f"it did not end within {timeout:g} s"
        return code

    def communicate(self, timeout: float = 600.0) -> tuple[str, str]:
        """What it wrote that nobody has read, after its end."""
        found: dict[str, str] = {}
        readers = [
            threading.Thread(target=lambda name=name: found.update({name: getattr(self, name).read()}), daemon=True)
            for name in ("stdout", "stderr")
        ]
        for reader in readers:
            reader.start()
        self.wait(timeout)
        for reader in readers:
            reader.join(timeout)
        return found["stdout"], found["stderr"]


def _run(words: list[str], out: Connection, err: Connection) -> None:
    os.dup2(out.fileno(), 1)
    os.dup2(err.fileno(), 2)
    sys.argv = words
    main()


def first_line(process: subprocess.Popen[str] | Forked) -> Any:
    """The first line that a command writes, which is JSON."""
    assert process.stdout is not None
    line = process.stdout.readline()
    assert line, process.stderr and process.stderr.read()
    return json.loads(line)
