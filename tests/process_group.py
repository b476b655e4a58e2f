"""Runs a function in several processes of one gloo process group, which end in time whatever happens."""

import os
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing import connection
from pathlib import Path
from typing import Any

from tests.forked import forkserver

_SECONDS = 240.0  # a collective that one rank leaves out would wait for half an hour


def run_ranks(work: Callable[..., None], size: int, folder: Path, *arguments: Any) -> list[int]:
    """Call work(rank, size, *arguments) in `size` processes, a process group over gloo; returns their exit codes.

    work: a function of a module. folder: where the ranks meet. All are killed as soon as one of them fails, and at the
    latest after 90 s.
    """
    context = forkserver()
    folder.mkdir(parents=True, exist_ok=True)
    meeting = folder / f"meeting-{time.monotonic_ns()}"
    ranks = [context.Process(target=_rank, args=(work, rank, size, meeting, arguments)) for rank in range(size)]
    try:
        for rank in ranks:
            rank.start()
        until = time.monotonic() + _SECONDS
        left = {rank.sentinel: rank for rank in ranks}
        while left:
            ended = connection.wait(list(left), timeout=max(0.0, until - time.monotonic()))
            assert ended, f"the ranks did not end within {_SECONDS:.0f} s"
            if any(left.pop(each).exitcode for each in ended):  # type: ignore[call-overload]
                break
    finally:
        for rank in ranks:
            if rank.pid is not None:
                rank.kill()
                rank.join()
    return [int(rank.exitcode or 0) for rank in ranks]


def _rank(work: Callable[..., None], rank: int, size: int, meeting: Path, arguments: tuple[Any, ...]) -> None:
    import torch
    import torch.distributed as dist

    os.environ.update(RANK=str(rank), WORLD_SIZE=str(size), LOCAL_WORLD_SIZE=str(size))
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=meeting.as_uri(), rank=rank, world_size=size, timeout=timedelta(seconds=_SECONDS)
    )
    try:
        work(rank, size, *arguments)
        dist.barrier()
        dist.destroy_process_group()
    except BaseException:  # noqa: BLE001 - it ends with this process
        traceback.print_exc()
        os._exit(1)  # without waiting for ranks that wait for this one
