"""Slots: the cores and GPUs of this machine that one job has for itself, whichever worker performs it.

The workers of a machine agree by locks of the operating system on one file, with a byte for each core and GPU. A lock
belongs to the open file, which a worker shares with the job's process: it ends when both have ended, however they do.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import struct
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from multiprocessing import reduction
from pathlib import Path
from typing import Any, TypeVar

from tunesmith.core.errors import UsageError

_FOLDER = "TUNESMITH_SLOTS"
_USUAL = Path("/run/lock")
# The bytes of the lock file: cores by number, then GPUs by number, then GPUs by name.
_GPUS, _NAMED_GPUS = 1 << 20, 1 << 40
_NOT_FREE = (BlockingIOError, PermissionError)  # what POSIX lets a system answer
Found = TypeVar("Found")


@dataclass(frozen=True)
class Slot:
    """What one job computes on. gpus: as CUDA_VISIBLE_DEVICES names them; none where the machine has none."""

    cores: tuple[int, ...]
    gpus: tuple[str, ...] = ()

    def __str__(self) -> str:
        """The cores and GPUs, for people."""
        gpus = f", GPU {' '.join(self.gpus)}" if self.gpus else ""
        return f"cores {' '.join(map(str, self.cores))}{gpus}"

    def take(self) -> HeldSlot | None:
        """Lock every core and GPU of the slot; None where another job of this machine holds one of them."""
        file = _open()
        for byte in (*self.cores, *map(_gpu_byte, self.gpus)):
            wanted = struct.pack("hhqqi", fcntl.F_WRLCK, os.SEEK_SET, byte, 1, 0)  # C's struct flock
            try:
                fcntl.fcntl(file, fcntl.F_OFD_SETLK, wanted)
            except _NOT_FREE:
                os.close(file)
                return None
        return HeldSlot(self, file)


class HeldSlot:
    """A slot that no other job takes until `release` was called and the processes that got this object have ended."""

    def __init__(self, slot: Slot, file: int) -> None:
        self.slot, self._file = slot, file

    def release(self) -> None:
        """Let go of it in this process."""
        os.close(self._file)

    @contextlib.contextmanager
    def cores(self) -> Iterator[None]:
        """Keep this thread on the slot's cores meanwhile. A process that it starts stays on them."""
        before = os.sched_getaffinity(0)
        os.sched_setaffinity(0, self.slot.cores)
        try:
            yield
        finally:
            os.sched_setaffinity(0, before)

    def show_gpus(self) -> None:
        """Show this process the slot's GPUs only. To be called before torch starts CUDA."""
        if self.slot.gpus:
            os.environ["CUDA_VISIBLE_DEVICES"] = ",".join(self.slot.gpus)

    def __reduce__(self) -> tuple[Callable[..., HeldSlot], tuple[Any, ...]]:
        """Sent to a process that multiprocessing starts, with the open file."""
        return _received, (self.slot, reduction.DupFd(self._file))


def _received(slot: Slot, file: Any) -> HeldSlot:
    number = file.detach()
    os.set_inheritable(number, False)
    return HeldSlot(slot, number)


def divide(number: int, cores: Sequence[int], gpus: Sequence[str]) -> list[Slot]:
    """So many slots of about the same size. Cores that share a processor's parts come into one slot.

    Raises UsageError where there are not as many cores, or GPUs if there are any.
    """
    for what, there in (("cores", cores), ("GPUs", gpus)):
        if there and number > len(there):
            raise UsageError(
                f"{number} jobs at once would share {what}: this machine lets a worker use {len(there)}",
                where="jobs at once",
                fix=f"at most {len(there)}",
            )
    near = sorted(cores, key=_place)
    return [Slot(_part(near, each, number), _part(gpus, each, number)) for each in range(number)]


def usable_cores() -> list[int]:
    """The cores that this process may use."""
    return sorted(os.sched_getaffinity(0))


def _part(whole: Sequence[Found], place: int, number: int) -> tuple[Found, ...]:
    return tuple(whole[len(whole) * place // number : len(whole) * (place + 1) // number])


def _place(core: int) -> tuple[int, int, int]:
    """The processor and its physical core; two hardware threads of one core have the same."""
    folder = Path(f"/sys/devices/system/cpu/cpu{core}/topology")
    try:
        package, physical = (int((folder / name).read_text()) for name in ("physical_package_id", "core_id"))
    except (OSError, ValueError):
        return 0, core, core
    return package, physical, core


def _gpu_byte(gpu: str) -> int:
    if gpu.isdecimal():
        return _GPUS + int(gpu)
    return _NAMED_GPUS + int.from_bytes(hashlib.sha256(gpu.encode()).digest()[:4], "big")


def _open() -> int:
    """The machine's lock file, which workers of several users share."""
    told = os.environ.get(_FOLDER)
    usual = _USUAL if os.access(_USUAL, os.W_OK) else Path(tempfile.gettempdir())
    folder = Path(told) if told else usual / "tunesmith"
    path, flags = folder / "slots", os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW
    try:
        for _ in range(2):
            with contextlib.suppress(FileNotFoundError):
                return os.open(path, flags)
            if not folder.is_dir():
                folder.mkdir(parents=True, exist_ok=True)
                folder.chmod(0o1777)
            with contextlib.suppress(FileExistsError):  # another worker makes it at this moment
                file = os.open(path, flags | os.O_CREAT | os.O_EXCL)
                os.fchmod(file, 0o666)
                return file
        raise FileNotFoundError(f"{path} comes and goes")
    except OSError as error:
        raise UsageError(
            f"the file by which workers share this machine cannot be used: {error.strerror or error}",
            where=str(path),
            fix=f"set {_FOLDER} to a folder that all workers of this machine may write to",
        ) from error
