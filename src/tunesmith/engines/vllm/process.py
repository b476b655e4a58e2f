"""vLLM servers that Tunesmith starts: the command, and a thread for each that watches it and starts it again."""

from __future__ import annotations

import contextlib
import os
import secrets
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path

import httpx

from tunesmith.core.errors import UsageError
from tunesmith.core.progress import Progress
from tunesmith.core.system.files import cache_folder
from tunesmith.engines.settings import VllmSettings
from tunesmith.engines.vllm import guard
from tunesmith.engines.vllm.http import Server, Unavailable

_HIGHEST_RANK = 64
_INSTALL = (
    "python3 -m venv ~/vllm && ~/vllm/bin/pip install vllm, then name it in the project file: "
    "engine: {kind: vllm, start: true, command: ~/vllm/bin/vllm serve}"
)
# vLLM would send usage statistics and look for files on the hub. A key on the command line would be seen by others.
_SET = {"VLLM_ALLOW_RUNTIME_LORA_UPDATING": "True", "VLLM_NO_USAGE_STATS": "1", "HF_HUB_OFFLINE": "1"}
_UNSET = ("PYTHONPATH", "PYTHONHOME", "RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR")
_KEPT_LOGS, _SHOWN_LINES = 20, 15
_INTERVAL = 0.5  # seconds between two looks at a process
_LOOK = 5.0  # seconds between two requests for a sign of life, once it has answered
_FIRST_WAIT, _LONGEST_WAIT = 1.0, 60.0  # seconds before a process that ended is started again
_SETTLED = 300.0  # seconds after which a process that ends is started again without a longer wait
_HUNG = 60.0  # seconds without a sign of life after which a process is killed


class VllmProcess:
    """One server: started at once, watched, and started again when it ends, until stop().

    url: where it answers. log: the file with what it prints.
    """

    def __init__(self, base: Path, settings: VllmSettings, number: int = 0) -> None:
        """number: of the servers that settings start, from 0. Raises UsageError where the program is missing."""
        each = len(settings.gpus or ()) // (settings.start or 1)
        # None where settings name no GPUs, so that it sees those that this process sees.
        gpus = None if settings.gpus is None else settings.gpus[number * each : (number + 1) * each]
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = free.getsockname()[1]
        self.url, self._key = f"http://127.0.0.1:{port}", secrets.token_urlsafe(32)
        self.log = _new_log(number)
        self._command = _command(base, settings, port, each)
        self._environment = {name: value for name, value in os.environ.items() if name not in _UNSET} | _SET
        self._environment["VLLM_API_KEY"] = self._key
        if gpus is not None:
            self._environment["CUDA_VISIBLE_DEVICES"] = ",".join(map(str, gpus))
        self._client = httpx.Client(timeout=10, trust_env=False)
        self._longest = settings.start_seconds
        self._owner = os.getpid()
        self._changed = threading.Condition()
        self._healthy, self._problem = False, ""  # problem: of a start that failed, until the next one succeeds
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="tunesmith-vllm-process", daemon=True)
        self._thread.start()

    def connect(self, settings: VllmSettings) -> Server:
        """A connection to the server."""
        return Server(self.url, settings, self._key, f"Tunesmith starts it again; its log is {self.log}")

    def wait(self) -> None:
        """Wait until the server answers. Raises Unavailable, with the end of its log, where it does not start."""
        answers = self._answers()
        with self._changed:
            self._healthy = self._healthy and answers  # it may have ended without being noticed yet
            self._changed.wait_for(lambda: self._healthy or self._problem)
            if not self._healthy:
                raise Unavailable(
                    self._problem,
                    where=str(self.log),
                    fix="read its log there; engine.flags gives it flags, such as [--max-model-len, '8192'] or "
                    "[--gpu-memory-utilization, '0.8'], and engine.start_seconds more time",
                )

    def stop(self, *, wait: bool = True) -> None:
        """End the process, and all that it started. wait: until that is done."""
        if os.getpid() == self._owner:  # not in a process that was forked from it
            self._stopping.set()
            self._thread.join(30 if wait else 0)

    def _watch(self) -> None:
        wait = _FIRST_WAIT
        while not self._stopping.is_set():
            began = time.monotonic()
            try:
                problem = self._run_once()
            except OSError as error:  # a full disk, no process left
                problem = f"vLLM cannot be started: {error}"
            with self._changed:
                self._healthy, self._problem = False, problem
                self._changed.notify_all()
            wait = _FIRST_WAIT if time.monotonic() - began > _SETTLED else wait
            self._stopping.wait(wait)
            wait = min(2 * wait, _LONGEST_WAIT)

    def _run_once(self) -> str:
        """Start the server and wait until it ends; returns what to say if it never answered, else nothing."""
        with self.log.open("ab") as out:
            start = out.tell()
            out.write(f"{shlex.join(self._command)}\n".encode())
            out.flush()
            child = subprocess.Popen(
                [sys.executable, "-I", str(guard.__file__), str(os.getpid()), *self._command],
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=subprocess.STDOUT,
                env=self._environment,
                start_new_session=True,
            )
        answered = self._observe(child)
        ended = child.poll() is not None
        child.terminate()  # the guard ends the group
        with contextlib.suppress(subprocess.TimeoutExpired):
            child.wait(20)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(child.pid, signal.SIGKILL)
        child.wait()
        if answered:
            return ""
        what = "ended before it answered" if ended else f"did not answer within {self._longest:g} s"
        return f"vLLM {what}. The end of its log:\n{_end(self.log, start)}"

    def _observe(self, child: subprocess.Popen[bytes]) -> bool:
        """Note when the server answers. Returns when it has ended or shall be ended: whether it ever answered."""
        alive, patience, answered = time.monotonic(), self._longest, False
        while child.poll() is None and not self._stopping.wait(_INTERVAL):
            if self._healthy and time.monotonic() - alive < _LOOK:
                continue
            if self._answers():
                alive, patience, answered = time.monotonic(), _HUNG, True
                with self._changed:
                    self._healthy, self._problem = True, ""
                    self._changed.notify_all()
            elif time.monotonic() - alive > patience:
                break
        return answered

    def _answers(self) -> bool:
        with contextlib.suppress(httpx.HTTPError):
            return self._client.get(f"{self.url}/health").is_success
        return False


def start_servers(base: Path, settings: VllmSettings, progress: Progress) -> list[VllmProcess]:
    """The servers that settings start, all of which answer. Raises Unavailable where one does not start."""
    processes: list[VllmProcess] = []
    try:
        for number in range(settings.start or 0):
            processes.append(VllmProcess(base, settings, number))
            progress.say(f"vLLM starts; its log is {processes[-1].log}")
        with progress.task("vLLM loads the base", len(processes)) as task:
            for process in processes:
                process.wait()
                task.advance()
    except BaseException:
        stop_servers(processes)
        raise
    return processes


def stop_servers(processes: Sequence[VllmProcess]) -> None:
    """Stop servers, all at once."""
    for process in processes:
        process.stop(wait=False)
    for process in processes:
        process.stop()


def _command(base: Path, settings: VllmSettings, port: int, gpus: int) -> list[str]:
    program, *arguments = shlex.split(settings.command)
    beside = Path(sys.executable).parent / program
    path = shutil.which(os.path.expanduser(program)) or (str(beside) if os.access(beside, os.X_OK) else None)
    if path is None:
        raise UsageError(f"the program {program} is not installed", where="engine.command", fix=_INSTALL)
    flags = [
        *("--host", "127.0.0.1", "--port", str(port)),
        *("--enable-lora", "--max-lora-rank", str(_HIGHEST_RANK), "--max-loras", "2"),
        *("--max-model-len", "auto"),  # the base's, or what fits into the memory
        *("--structured-outputs-config.backend", "guidance"),
        *("--enable-prefix-caching", "--disable-uvicorn-access-log"),
    ]
    if gpus > 1:
        flags += ["--tensor-parallel-size", str(gpus)]
    return [os.path.abspath(path), *arguments, str(base.absolute()), *flags, *settings.flags]


def _new_log(number: int) -> Path:
    """A new file, for this user only. The oldest ones are removed."""
    folder = cache_folder() / "vllm-logs"
    folder.mkdir(parents=True, exist_ok=True)
    for old in sorted(folder.glob("*.log"))[: -_KEPT_LOGS or None]:
        old.unlink(missing_ok=True)
    log = folder / f"{time.strftime('%Y%m%dT%H%M%S')}-{os.getpid()}-{number}.log"
    os.close(os.open(log, os.O_CREAT | os.O_WRONLY, 0o600))
    return log


def _end(log: Path, start: int) -> str:
    """The last lines of a log from a place on, after the first that names an error if that is not among them."""
    with log.open("rb") as stream:
        stream.seek(start)
        lines = [line for line in stream.read().decode(errors="replace").splitlines()[1:] if line.strip()]
    last = lines[-_SHOWN_LINES:]
    first = next((line for line in lines[:-_SHOWN_LINES] if "Error:" in line), None)
    return "\n".join(f"    {line[:300]}" for line in ([first, *last] if first is not None else last))
