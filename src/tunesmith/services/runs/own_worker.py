"""The worker that a server starts, in a process of its own, so that a training never shares the server's."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable
from functools import partial
from multiprocessing.process import BaseProcess
from pathlib import Path

from tunesmith.core.errors import TunesmithError
from tunesmith.core.system.processes import end_with_parent
from tunesmith.project import Project
from tunesmith.services.runs.jobs import make_worker
from tunesmith.services.runs.retraining import look_again
from tunesmith.services.webhooks import check_secrets, delivering

# Seconds until a worker that ended is started again.
_PAUSE = 1.0
# Seconds that a worker waits before it ends where it cannot start.
_LONG_PAUSE = 30.0


class OwnWorker:
    """A worker for the project in a folder, started again when it ends. say: shows a line, in either process."""

    def __init__(self, root: Path, say: Callable[[str], None]) -> None:
        self._root, self._say = root, say
        self._stopping = threading.Event()
        self._process: BaseProcess | None = None
        self._started = threading.Lock()
        # A daemon, but it lives as long as the process: Linux ends the worker with the thread that started it.
        self._thread = threading.Thread(target=self._keep, name="own worker", daemon=True)
        self._thread.start()

    def stop(self, seconds: float) -> None:
        """Stop the worker: its jobs go back into the queue. It is killed after some seconds, which loses only time."""
        with self._started:
            self._stopping.set()
            if self._process is not None:
                self._process.terminate()
        self._thread.join(seconds)
        if self._process is not None and self._process.is_alive():
            self._process.kill()
            self._process.join()

    def _keep(self) -> None:
        while True:
            with self._started:
                if self._stopping.is_set():
                    return
                self._process = multiprocessing.get_context("spawn").Process(
                    target=_work, args=(self._root, os.getpid(), self._say), name="worker"
                )
                self._process.start()
            self._process.join()
            if self._stopping.wait(_PAUSE):
                return
            self._say(f"the worker ended with exit code {self._process.exitcode}; another one is started")


def _work(root: Path, parent: int, say: Callable[[str], None]) -> None:
    end_with_parent(parent)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # ctrl-C reaches the server too, which stops this process in order
    try:
        project = Project.load(root)
        worker = make_worker(project, say=say, also=partial(look_again, root, say))
        check_secrets(project)
    except TunesmithError as error:  # a cluster that cannot be reached may come back
        say(f"the worker cannot start: {error}")
        time.sleep(_LONG_PAUSE)
        return
    signal.signal(signal.SIGTERM, lambda *_: worker.stopping.set())  # after Ray has set its own
    with delivering(project, say):
        worker.run()
