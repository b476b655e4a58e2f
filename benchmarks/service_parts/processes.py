"""Processes of a measurement: servers that are started, asked and ended; memory of a process."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from engine_parts.processes import Failed

HERE = Path(__file__).parent
ROOT = HERE.parents[1]


def free_port() -> int:
    """A port that nobody listens on now."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port: int = free.getsockname()[1]
    return port


def start(command: Sequence[str], log: Path, environment: Mapping[str, str] | None = None) -> subprocess.Popen[bytes]:
    """Start a process that writes what it says into a file."""
    with log.open("ab") as written:
        return subprocess.Popen(
            command,
            stdout=written,
            stderr=written,
            cwd=ROOT,
            env={**os.environ, "PYTHONPATH": f"{ROOT / 'src'}:{ROOT}:{HERE.parent}", **(environment or {})},
        )


def script(name: str, *arguments: str) -> list[str]:
    """The command of a script of this folder in this environment."""
    return [sys.executable, str(HERE / name), *arguments]


@contextlib.contextmanager
def listening(
    command: Sequence[str], port: int, log: Path, environment: Mapping[str, str] | None = None, seconds: float = 120
) -> Iterator[subprocess.Popen[bytes]]:
    """A server that listens on a port inside the block. Raises Failed where it does not start in time."""
    process = start(command, log, environment)
    try:
        wait_for(port, process, log, seconds)
        yield process
    finally:
        end(process)


def wait_for(port: int, process: subprocess.Popen[bytes], log: Path, seconds: float = 120) -> None:
    """Wait until a process listens on a port. Raises Failed."""
    until = time.monotonic() + seconds
    while True:
        with socket.socket() as asked:
            if asked.connect_ex(("127.0.0.1", port)) == 0:
                return
        if process.poll() is not None or time.monotonic() > until:
            raise Failed(f"{process.args} does not listen: {log.read_text(errors='replace')[-1500:]}")
        time.sleep(0.1)


def end(process: subprocess.Popen[bytes], seconds: float = 20) -> None:
    """End a process: in order, else by force."""
    process.terminate()
    try:
        process.wait(seconds)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def found_by(command: Sequence[str], environment: Mapping[str, str] | None = None, seconds: float = 900) -> Any:
    """What a process prints as its last line, as JSON. Raises Failed."""
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        timeout=seconds,
        check=False,
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": f"{ROOT / 'src'}:{ROOT}:{HERE.parent}", **(environment or {})},
    )
    if done.returncode:
        raise Failed(f"{command[1:3]} ended with {done.returncode}: {done.stderr[-1500:]}")
    return json.loads(done.stdout.splitlines()[-1])


def peak_memory(process: int) -> int:
    """Bytes of a process's largest resident size so far."""
    status = Path(f"/proc/{process}/status").read_text()
    return 1024 * int(next(line.split()[1] for line in status.splitlines() if line.startswith("VmHWM")))


def reset_peak(process: int) -> None:
    """Begin to measure peak_memory anew."""
    Path(f"/proc/{process}/clear_refs").write_text("5")
