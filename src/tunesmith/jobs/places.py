"""Where a worker has a project's jobs performed: in slots of this machine, or on a Ray cluster (on_ray.py).

A slot is the cores and GPUs of this machine that one job has for itself, whichever worker performs it. The workers of a
machine agree by locks of the operating system on one file, with a byte for each core and GPU. A lock belongs to the
open file, which a worker shares with the job's process: it ends when both have ended, however they do.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import multiprocessing
import os
import socket
import struct
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from multiprocessing import reduction
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, NamedTuple, Protocol, TypeVar

from tunesmith.core.errors import Refused, TunesmithError, UsageError
from tunesmith.core.progress import Silent
from tunesmith.jobs import leases, queue
from tunesmith.jobs.kinds import perform_in_child
from tunesmith.jobs.leases import Lease, LeaseLost, worker_name
from tunesmith.project import JobSettings, Project
from tunesmith.store.blobs.local import LocalBlobs
from tunesmith.store.store import Store

# Seconds that a process may take to start and to renew its lease itself. The worker renews it so long.
STARTING = 300.0


class JobProcess(Protocol):
    """A process that performs a job."""

    def is_alive(self) -> bool:
        """Whether it has not ended."""

    def is_starting(self) -> bool:
        """Whether it may not renew its lease itself yet."""

    def terminate(self) -> None:
        """Tell it to stop between two of its steps."""

    def kill(self) -> None:
        """End it at once."""

    def ending(self) -> TunesmithError:
        """How it ended; UsageError or Refused where it could not perform the job there. Waits for the end."""


class Place(Protocol):
    """Where one job at a time is performed."""

    def take(self) -> bool:
        """Keep others from using it; False where they do."""

    def start(self, lease: Lease) -> JobProcess:
        """Start a process that performs a job. Only after take."""

    def leave(self) -> None:
        """Let others use it."""


class LocalPlace:
    """A slot of this machine. start: starts a process with its lease and slot."""

    def __init__(self, slot: Slot, start: Callable[[Lease, HeldSlot], BaseProcess]) -> None:
        self._slot, self._start = slot, start
        self._held: HeldSlot | None = None

    def __str__(self) -> str:
        """The slot."""
        return str(self._slot)

    def take(self) -> bool:
        """Lock the slot."""
        self._held = self._slot.take()
        return self._held is not None

    def start(self, lease: Lease) -> LocalProcess:
        """Start a process on the slot's cores."""
        assert self._held is not None
        with self._held.cores():
            return LocalProcess(self._start(lease, self._held))

    def leave(self) -> None:
        """Unlock the slot, once the job's process has ended too."""
        if self._held is not None:
            self._held.release()
            self._held = None


class LocalProcess:
    """A child of the worker. It stops between two steps at SIGTERM."""

    def __init__(self, process: BaseProcess) -> None:
        self._process, self._began = process, time.monotonic()
        self.is_alive, self.terminate, self.kill = process.is_alive, process.terminate, process.kill

    def is_starting(self) -> bool:
        """Whether it was started a short time ago; on a busy machine that takes long."""
        return time.monotonic() - self._began < STARTING

    def ending(self) -> TunesmithError:
        """Its signal or exit code."""
        self._process.join()
        code = self._process.exitcode
        how = f"signal {-code}" if code is not None and code < 0 else f"exit code {code}"
        return TunesmithError(f"its process ended with {how}")


def make_places(project: Project, at_once: int | None, say: Callable[[str], None]) -> Sequence[Place]:
    """Places for so many jobs at once; None: as many as suit the machine or the cluster.

    say: is told what a cluster lacks. Raises UsageError or Refused for settings that cannot be.
    """
    jobs = project.settings.jobs
    if jobs.runner == "ray":
        return _places_on_ray(project, jobs, at_once, say)
    from tunesmith.engines.device import gpu_names

    cores, gpus, server = usable_cores(), gpu_names(), project.settings.server
    starts_servers = server is not None and server.start is not None
    if starts_servers and at_once is not None and at_once > 1:
        raise UsageError(
            "each job starts the servers of engine.start on the same GPUs",
            where="jobs at once",
            fix="perform one job at once, or name servers that run already by engine.url",
        )
    # A job that starts servers, or workers of Ray on this machine, computes on all GPUs; another one on one of them.
    spreads = starts_servers or project.settings.engine.ray is not None
    if at_once is None:
        at_once = 1 if spreads else max(1, min(len(gpus), len(cores)))
    return [LocalPlace(slot, partial(_start, project.root)) for slot in divide(at_once, cores, gpus)]


def _start(root: Path, lease: Lease, held: HeldSlot) -> BaseProcess:
    process = multiprocessing.get_context("spawn").Process(
        target=_perform_in_slot, args=(root, lease, os.getpid(), held), name=f"job {lease.job}"
    )
    process.start()
    return process


def _perform_in_slot(root: Path, lease: Lease, parent: int, held: HeldSlot) -> None:
    held.show_gpus()
    perform_in_child(root, lease, parent)


def _places_on_ray(
    project: Project, jobs: JobSettings, at_once: int | None, say: Callable[[str], None]
) -> Sequence[Place]:
    """Places on the cluster, to which this process stays connected. Raises Refused where nodes cannot use the store."""
    from tunesmith.core.system.ray_cluster import check_room, connected, room
    from tunesmith.jobs.on_ray import RayPlace

    class Said(Silent):
        def say(self, text: str) -> None:
            say(text)

    store = project.store
    with connected("jobs.runner", jobs.address) as ray:
        others = sorted({node["NodeManagerHostname"] for node in ray.nodes() if node["Alive"]} - {socket.gethostname()})
        if others:
            _require_shared_database(store, f"the Ray cluster has nodes on {', '.join(others)}")
        check_room(ray, 1, jobs.resources, "jobs.resources", jobs.address, Said())
        number = max(1, room(ray, jobs.resources)) if at_once is None else at_once
    marked = store.local("work") if isinstance(store.blobs, LocalBlobs) else None
    if marked is not None:
        marked.mkdir(parents=True, exist_ok=True)
    check = partial(check_node, project.root, worker_name(), socket.gethostname(), _files(store))
    start = partial(perform_in_child, project.root)
    return [RayPlace(ray, jobs.resources, check, start, marked) for _ in range(number)]


def _files(store: Store) -> str:
    """Where the store keeps its files."""
    return store.blobs.where("records/")


def check_node(root: Path, worker: str, host: str, files: str, lease: Lease, mark: str) -> None:
    """Check that a worker's job can be performed on this node. host: the worker's. files: where its store keeps files.
    mark: a path in that store, "" where it is not a folder.

    Raises UsageError where the project, its settings or the store's files are not here, or are others than the
    worker's; Refused where the database can be used on the worker's host only.
    """
    here = socket.gethostname()
    store = Project.load(root).store
    if here != host:
        _require_shared_database(store, f"the job came to {here}, a node of the Ray cluster, from {host}")
    if _files(store) != files or (mark and not Path(mark).exists()):
        raise UsageError(
            f"the node {here} does not see the files of the worker's store",
            where=_files(store),
            fix="keep the project in a folder that all nodes share, or set TUNESMITH_BLOBS_URL for worker and nodes",
        )
    try:
        if queue.get(store, lease.job).worker != worker:
            raise LeaseLost("another worker performs the job")
        leases.log(store, lease, f"performed on the node {here} of the Ray cluster")
    except (UsageError, LeaseLost) as error:
        raise UsageError(
            f"the node {here} uses another database than the worker",
            where=store.engine.url.render_as_string(hide_password=True),
            fix="start Ray on each node with the worker's TUNESMITH_DATABASE_URL",
        ) from error


def _require_shared_database(store: Store, why: str) -> None:
    """Raise Refused where the database is SQLite."""
    if store.url.startswith("sqlite"):
        raise Refused(
            f"{why}, and SQLite can be used on one machine only",
            where="jobs.runner",
            fix="use PostgreSQL: set TUNESMITH_DATABASE_URL for the worker and for Ray on each node; and keep the "
            "project in a folder that all nodes share",
        )


# Slots


_FOLDER = "TUNESMITH_SLOTS"
_USUAL = Path("/run/lock")
# The bytes of the lock file: cores by number, then GPUs by number, then GPUs by name.
_GPUS, _NAMED_GPUS = 1 << 20, 1 << 40
_NOT_FREE = (BlockingIOError, PermissionError)  # what POSIX lets a system answer
Found = TypeVar("Found")


class Slot(NamedTuple):
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
