"""What this process takes of its machine: memory, threads, and child processes that end with it."""

from __future__ import annotations

import contextlib
import ctypes
import os
import resource
import signal
from pathlib import Path

import psutil

from tunesmith.core.errors import UsageError


def reset_peak_memory() -> None:
    """Start measuring peak_memory afresh, where the kernel offers it (Linux)."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def peak_memory() -> int:
    """Largest number of bytes resident since reset_peak_memory, else since the process began."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def available_memory() -> int:
    """Bytes that this process can still allocate: the machine's free memory, or less where a container has a limit."""
    return min(int(psutil.virtual_memory().available), *_group_memory())


def _group_memory(groups: Path = Path("/proc/self/cgroup"), mount: Path = Path("/sys/fs/cgroup")) -> list[int]:
    """Bytes left in each of this process's control groups that has a limit.

    A container's limit is not part of the machine's free memory. File pages that can be evicted count as free.
    """
    left: list[int] = []
    with contextlib.suppress(OSError):
        for line in groups.read_text().splitlines():
            _, kinds, path = line.split(":", 2)
            if kinds in ("", "memory"):
                names = _GROUP_FILES[kinds]
                root = mount / kinds
                place = root / path.lstrip("/")
                # Inside a container, the path may be the one outside, with the container's group mounted at the root.
                for folder in [place, *place.parents] if place.is_dir() else [root]:
                    if folder.is_relative_to(root):
                        left += _memory_left(folder, *names)
    return left


_GROUP_FILES = {  # by controllers as /proc names them: version 2 and version 1
    "": ("memory.max", "memory.current", "inactive_file"),
    "memory": ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
}


def _memory_left(folder: Path, limit: str, usage: str, idle: str) -> list[int]:
    try:
        most, used = int((folder / limit).read_text()), int((folder / usage).read_text())
        stats = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
    except (OSError, ValueError):  # no limit is written as "max"; the root group has no such files
        return []
    return [max(0, most - used + int(stats.get(idle, 0)))]


def end_with_parent(parent: int) -> None:
    """Have Linux kill this process when its parent ends, however that ends. parent: its process number.

    Ends this process at once where the parent is gone already. On other systems only that.
    """
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
    if os.getppid() != parent:
        os._exit(1)


def started_by_torchrun() -> bool:
    """Whether torchrun started this process as one of several."""
    return "TORCHELASTIC_RUN_ID" in os.environ and int(os.environ.get("WORLD_SIZE", "1")) > 1


def local_rank() -> int:
    """This process's number among those of one training on this machine, as torchrun and Ray Train state it; 0 for a
    process that trains alone."""
    return int(os.environ.get("LOCAL_RANK", "0")) if int(os.environ.get("WORLD_SIZE", "1")) > 1 else 0


def wanted_threads() -> int | None:
    """The value of $TUNESMITH_THREADS; None if it is unset or 0. Raises UsageError if it is not a whole number."""
    told = os.environ.get("TUNESMITH_THREADS") or "0"
    if not told.isdecimal():
        raise UsageError(
            f"{told!r} is not a number of threads", where="TUNESMITH_THREADS", fix="set a whole number, or unset it"
        )
    return int(told) or None
