"""Runs a command, and ends everything that it started when it ends, on SIGTERM, or when the parent is gone.

A program of its own, which Python runs by this file's path: guard.py PARENT-PID COMMAND. It leads the process group of
what it runs. A process that was killed cannot end what it started, so this one looks for its parent.
"""

import contextlib
import os
import signal
import subprocess
import sys
import time

_INTERVAL = 0.2  # seconds between two looks
_GRACE = 10.0  # seconds between SIGTERM and SIGKILL


def main() -> None:
    """Run the command to its end. Kills its own process group last, and so itself."""
    parent, command = int(sys.argv[1]), sys.argv[2:]
    asked: list[int] = []
    signal.signal(signal.SIGTERM, lambda number, _: asked.append(number))
    child = subprocess.Popen(command)
    while child.poll() is None and os.getppid() == parent and not asked:
        time.sleep(_INTERVAL)
    if child.returncode is not None:
        print(f"\ntunesmith: the server's process ended with status {child.returncode}", flush=True)
    os.killpg(0, signal.SIGTERM)
    with contextlib.suppress(subprocess.TimeoutExpired):
        child.wait(_GRACE)
    os.killpg(0, signal.SIGKILL)


if __name__ == "__main__":
    main()
