"""Runs a command in a process group of its own, of which nothing is left."""

import contextlib
import os
import signal
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path


def run_whole_group(
    command: Sequence[str], *, cwd: Path, env: Mapping[str, str], timeout: float
) -> subprocess.CompletedProcess[str]:
    """Run a command; then kill what it started in the background. timeout: seconds.

    The output goes to files: a background process would keep a pipe open, and its reader waiting. Raises
    subprocess.TimeoutExpired with the last output.
    """
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
        running = subprocess.Popen(command, cwd=cwd, env=env, stdout=out, stderr=err, text=True, start_new_session=True)
        try:
            code: int | None = running.wait(timeout)
        except subprocess.TimeoutExpired:
            code = None
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(running.pid, signal.SIGKILL)
        running.wait()
        texts = []
        for stream in (out, err):
            stream.seek(0)
            texts.append(stream.read())
        if code is None:
            raise subprocess.TimeoutExpired(command, timeout, texts[0][-3000:], texts[1][-3000:])
        return subprocess.CompletedProcess(command, code, *texts)
