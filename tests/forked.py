"""Runs work in forked processes, which have everything imported already."""

import os
import select
import signal
import traceback
from collections.abc import Callable
from multiprocessing.context import ForkServerContext, ForkServerProcess
from typing import Any

_SECONDS = 300.0  # a child that a lock of another thread stops never ends by itself


class _Process(ForkServerProcess):
    """A process with the environment of its start, not with the one in which the fork server was started."""

    def start(self) -> None:
        self._environment = dict(os.environ)
        super().start()

    def run(self) -> None:
        os.environ.clear()
        os.environ.update(self._environment)
        super().run()


class _Context(ForkServerContext):
    Process = _Process


def forkserver() -> ForkServerContext:
    """Starts processes that have torch and transformers imported already, and of this process its variables only."""
    context = _Context()
    context.set_forkserver_preload(["tests.preloaded"])
    return context


def run_elsewhere(work: Callable[..., object], *given: Any, seconds: float = _SECONDS) -> int | None:
    """The exit code of another process that does the work, a function of a module: 0, 1 after an error, or minus the
    signal; None where it has not ended in time."""
    worker = forkserver().Process(target=work, args=given)
    worker.start()
    worker.join(seconds)
    code = worker.exitcode
    worker.kill()
    worker.join()
    return code


def run_forked(work: Callable[[], object]) -> int:
    """The status of a child that did the work, as os.waitpid gives it: 0, 256 after an error, or the signal.

    The child never goes on with the parent's tests. Raises AssertionError where it does not end in time.
    """
    child = os.fork()
    if child == 0:
        code = 1
        try:
            work()
            code = 0
        except BaseException:  # noqa: BLE001 - it ends with the child
            traceback.print_exc()
        finally:
            os._exit(code)
    handle = os.pidfd_open(child)
    try:
        waiting = select.poll()
        waiting.register(handle, select.POLLIN)
        ended = bool(waiting.poll(_SECONDS * 1000))
        if not ended:
            os.kill(child, signal.SIGKILL)
        status = os.waitpid(child, 0)[1]
    finally:
        os.close(handle)
    assert ended, f"the child did not end within {_SECONDS:.0f} s"
    return status
