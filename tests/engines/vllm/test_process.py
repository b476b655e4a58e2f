"""vLLM servers that Tunesmith starts, with the stand-in server as the program: started, watched, restarted, ended."""

import contextlib
import os
import shlex
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from pydantic import ValidationError

from tests.engines.vllm import vllm_server
from tests.hf_models import base_of_family
from tests.waiting import gone, until
from tunesmith.core.errors import TunesmithError, UsageError
from tunesmith.core.messages import Message
from tunesmith.core.progress import SILENT
from tunesmith.engines.protocol import Generation
from tunesmith.engines.settings import VllmSettings
from tunesmith.engines.vllm import guard
from tunesmith.engines.vllm import process as vllm_process
from tunesmith.engines.vllm.engine import VllmEngine

STAND_IN = f"{sys.executable} {vllm_server.__file__}"
REQUESTS = [Generation((Message(role="user", content=f"turn on light {number}"),), max_tokens=4) for number in range(6)]


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TUNESMITH_CACHE", str(tmp_path / "cache"))


def _settings(**how: object) -> VllmSettings:
    return VllmSettings.model_validate({"kind": "vllm", "start": True, **how})


def _program(folder: Path, body: str) -> str:
    """A command that runs Python code; ARGUMENTS and ENVIRONMENT are what it is given."""
    file = folder / "program.py"
    file.write_text(f"import os, sys, time\nARGUMENTS, ENVIRONMENT = sys.argv[1:], os.environ\n{body}\n")
    return f"{sys.executable} {file}"


def _pids(folder: Path) -> list[int]:
    """The ids that programs wrote into files of the folder."""
    return [int(file.name) for file in (folder / "pids").iterdir()]


def test_a_server_is_started_restarted_and_stopped(tmp_path: Path) -> None:
    base = base_of_family(tmp_path, "llama")
    engine = VllmEngine(base, _settings(command=STAND_IN, gpus=[]))
    expected = engine.generate(REQUESTS)
    group = _group(tmp_path)
    (server,) = [pid for pid in group if "vllm_server" in _command(pid) and "guard" not in _command(pid)]
    assert "VLLM_API_KEY" not in _command(server), "the key is in the environment"
    os.kill(server, signal.SIGKILL)
    assert engine.generate(REQUESTS) == expected, "it is started again, and every request is answered"
    until(lambda: gone(server))
    group = _group(tmp_path)
    del engine
    until(lambda: all(map(gone, group)))


def _group(cache: Path) -> list[int]:
    """The processes whose log lies in this test's cache."""
    found = []
    for entry in Path("/proc").iterdir():
        with contextlib.suppress(OSError):
            if entry.name.isdigit() and os.readlink(entry / "fd" / "1").startswith(str(cache / "cache" / "vllm-logs")):
                found.append(int(entry.name))
    return found


def _command(pid: int) -> str:
    return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode()


def test_the_command_and_its_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", "/of/ours")
    command = _program(tmp_path, "print('GIVEN', ARGUMENTS, dict(ENVIRONMENT)); sys.exit(3)")
    settings = _settings(start=2, gpus=[4, 5, 6, 7], command=command, flags=["--max-model-len", "512"])
    process = vllm_process.VllmProcess(tmp_path, settings, 1)
    try:
        with pytest.raises(TunesmithError, match="ended before it answered"):
            process.wait()
    finally:
        process.stop()
    told = process.log.read_text()
    line = next(line for line in told.splitlines() if line.startswith("GIVEN"))
    assert f"GIVEN ['{tmp_path}', '--host', '127.0.0.1', '--port', " in line
    for expected in (
        "'--enable-lora', '--max-lora-rank', '64'",
        "'--structured-outputs-config.backend', 'guidance'",
        "'--enable-prefix-caching'",
        "'--tensor-parallel-size', '2', '--max-model-len', '512'] ",
        "'CUDA_VISIBLE_DEVICES': '6,7'",
        "'VLLM_ALLOW_RUNTIME_LORA_UPDATING': 'True'",
        "'VLLM_NO_USAGE_STATS': '1'",
        "'VLLM_API_KEY': '",
    ):
        assert expected in line, expected
    assert "PYTHONPATH" not in line, "our packages are not vLLM's"
    assert process._key not in line.partition("] {")[0]
    assert "ended with status 3" in told
    assert process.log.stat().st_mode & 0o077 == 0


def test_a_start_that_fails_shows_the_end_of_the_log(tmp_path: Path) -> None:
    body = "print('ValueError: no room'); [print('line', number) for number in range(40)]; sys.exit(1)"
    with pytest.raises(TunesmithError) as caught:
        vllm_process.start_servers(tmp_path, _settings(command=_program(tmp_path, body)), SILENT)
    (log,) = (tmp_path / "cache" / "vllm-logs").iterdir()
    # Of the log its last lines, and what names an error before them.
    for said in ("ended before it answered", "ValueError: no room", "line 39", f"where: {log}", "engine.flags"):
        assert said in str(caught.value)
    assert "line 20\n" not in str(caught.value)


def test_a_server_that_never_answers_is_ended(tmp_path: Path) -> None:
    command = _program(tmp_path, "print('loading', flush=True); time.sleep(600)")
    with pytest.raises(TunesmithError, match=r"did not answer within 1 s(.|\n)*loading"):
        vllm_process.start_servers(tmp_path, _settings(command=command, start_seconds=1), SILENT)
    assert _group(tmp_path) == []


def test_what_cannot_be_started(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UsageError, match=r"program no-such-vllm is not installed(.|\n)*pip install vllm"):
        vllm_process.start_servers(tmp_path, _settings(command="no-such-vllm serve"), SILENT)

    def refused(*_: object, **__: object) -> None:
        raise OSError(12, "Cannot allocate memory")

    monkeypatch.setattr(vllm_process.subprocess, "Popen", refused)
    with pytest.raises(TunesmithError, match=r"cannot be started(.|\n)*Cannot allocate memory"):
        vllm_process.start_servers(tmp_path, _settings(command=f"{sys.executable} x"), SILENT)


def test_nothing_is_left_when_the_parent_is_killed(tmp_path: Path) -> None:
    """The program starts a process of its own, as vLLM does, and neither it nor that one heeds SIGTERM."""
    (tmp_path / "pids").mkdir()
    stubborn = (
        "import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN); os.fork(); "
        f"open(os.path.join({str(tmp_path / 'pids')!r}, str(os.getpid())), 'w').close(); time.sleep(600)"
    )
    file = tmp_path / "guard.py"
    file.write_text(Path(guard.__file__).read_text().replace("_GRACE = 10.0", "_GRACE = 0.5"))
    command = shlex.split(_program(tmp_path, stubborn))
    parent = (
        "import os, subprocess, sys, time; "
        f"subprocess.Popen([sys.executable, {str(file)!r}, str(os.getpid()), *{command!r}], start_new_session=True); "
        "time.sleep(600)"
    )
    with subprocess.Popen([sys.executable, "-c", parent]) as process:
        try:
            until(lambda: len(_pids(tmp_path)) == 2)
        finally:
            process.kill()
    until(lambda: all(map(gone, _pids(tmp_path))))


def test_settings_that_do_not_fit_together() -> None:
    for wrong, match in [
        ({"url": "http://a:1"}, "give one of url"),
        ({"start": None}, "give one of url"),
        ({"start": None, "url": "http://a:1", "gpus": [0]}, "gpus applies to servers"),
        ({"key_env": "KEY"}, "key_env applies to url"),
        ({"start": 2}, "start: 2 needs gpus"),
        ({"start": 2, "gpus": [0, 1, 2]}, "3 different GPUs cannot be divided among 2"),
        ({"gpus": [0, 0]}, "1 different GPUs"),
        ({"flags": ["--host=0.0.0.0"]}, "--host=0.0.0.0 is set by Tunesmith"),
        ({"start": False}, "greater than or equal to 1"),
        ({"start": None, "url": "http://a:1", "urls": ["http://b:1"]}, "give one of url"),
        ({"start": None, "urls": ["http://a:1", "http://a:1"]}, "twice"),
        ({"start": None, "urls": []}, "at least 1"),
        ({"start": None, "urls": ["ftp://a"]}, "pattern"),
    ]:
        with pytest.raises(ValidationError, match=match):
            _settings(**wrong)
    assert _settings(start=2, gpus=[]).gpus == ()
