"""A job's process that only waits. A module of its own, so that the process starts quickly."""

from __future__ import annotations

import os
import signal
import sys
import time

from tunesmith.jobs.leases import Lease


def wait(_lease: Lease, parent: int) -> None:
    """Wait, and end in order at SIGTERM."""
    assert parent == os.getppid()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    time.sleep(600)
