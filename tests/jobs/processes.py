"""What jobs' processes do in these tests.

A module of its own, so that they start quickly: the tests' modules load torch and transformers.
"""

import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

from tests.waiting import until
from tunesmith.jobs import leases, queue
from tunesmith.jobs.leases import Lease
from tunesmith.jobs.places import HeldSlot
from tunesmith.store.store import Store


def wait(_lease: Lease, parent: int) -> None:
    """Wait, and end in order at SIGTERM."""
    assert parent == os.getppid()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    time.sleep(600)


def keep(_held: HeldSlot, ready: Any) -> None:
    """Keep a slot."""
    ready.set()
    time.sleep(600)


def obey(root: Path, lease: Lease) -> None:
    """Do what the job's arguments say."""
    store = Store(root)
    given = queue.get(store, lease.job).arguments
    if given.get("dies"):
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(given.get("starts_in", 0.0))
    leases.finish(store, lease, {"process": os.getpid()})


def meet(root: Path, lease: Lease, held: HeldSlot) -> None:
    """End once another job has begun; the result says what this process may use."""
    from tunesmith.engines.process import prepare_process

    held.show_gpus()
    store = Store(root)
    leases.log(store, lease, "here")
    others = [job.id for job in queue.list_jobs(store) if job.id != lease.job]
    until(lambda: any(line.message == "here" for other in others for line in queue.events(store, other)))
    found = {"cores": sorted(os.sched_getaffinity(0)), "gpus": os.environ.get("CUDA_VISIBLE_DEVICES")}
    leases.finish(store, lease, {**found, "threads": prepare_process()})
