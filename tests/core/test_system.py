"""Scratch files of killed processes, HTTP clients of threads, and OpenMP threads that sleep early."""

import os
import platform
import signal
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest

from tests.attack_table import Happened
from tests.waiting import until
from tunesmith.core.system.files import write_atomic
from tunesmith.core.system.http_clients import HttpClients
from tunesmith.core.system.scratch import SCRATCH, remove_leftovers, scratch_file, scratch_folder

HELD = """
import sys, time
from pathlib import Path
from tunesmith.core.system.scratch import scratch_file, scratch_folder
with scratch_folder(Path(sys.argv[1])) as folder, scratch_file(Path(sys.argv[1]), 0o600) as (path, stream):
    (folder / "weights").write_text("private")
    stream.write(b"private")
    stream.flush()
    print("held", flush=True)
    time.sleep(600)
"""


@pytest.mark.attack("crash", "kill -9 while private copies exist")
def test_leftovers_go_and_a_living_process_keeps_its_own(tmp_path: Path, happened: Happened) -> None:
    held = [subprocess.Popen([sys.executable, "-c", HELD, str(tmp_path)], stdout=subprocess.PIPE) for _ in range(2)]
    try:
        for process in held:
            assert process.stdout is not None
            assert process.stdout.readline() == b"held\n"
        assert len(list(tmp_path.iterdir())) == 4
        held[0].send_signal(signal.SIGKILL)
        held[0].wait()
        with scratch_folder(tmp_path) as mine:
            assert mine.stat().st_mode & 0o777 == 0o700
            remove_leftovers(tmp_path)
            left = set(tmp_path.iterdir()) - {mine}
            assert len(left) == 2
            assert all(path.read_text() == "private" for path in tmp_path.glob("*/weights"))
    finally:
        for process in held:
            process.kill()
            process.communicate()
    remove_leftovers(tmp_path)
    assert list(tmp_path.iterdir()) == []
    happened("removed at the next start", 4)
    happened("kept: its process lives", 2)


@pytest.mark.attack("crash", "links and folders that look like leftovers")
def test_only_leftovers_are_removed(tmp_path: Path, happened: Happened) -> None:
    kept = tmp_path / "kept"
    kept.mkdir()
    (kept / "file").write_text("x")
    (tmp_path / f"{SCRATCH}link").symlink_to(kept)
    (tmp_path / f"{SCRATCH}file").symlink_to(kept / "file")
    (tmp_path / ".tunesmith-old").mkdir()
    os.mkfifo(tmp_path / f"{SCRATCH}fifo")
    remove_leftovers(tmp_path)
    assert (kept / "file").read_text() == "x"
    assert (tmp_path / ".tunesmith-old").is_dir()
    remove_leftovers(tmp_path / "nowhere")
    happened("kept", 3)
    with scratch_file(kept, 0o666) as (path, stream):
        stream.write(b"x")
        path.rename(kept / "done")
    assert (kept / "done").read_bytes() == b"x", "it was renamed"
    before = os.umask(0o027)  # which decides who reads a file
    try:
        write_atomic(kept / "open", b"x")
        write_atomic(kept / "private", b"x", mode=0o600)
    finally:
        os.umask(before)
    assert [(kept / name).stat().st_mode & 0o777 for name in ("open", "private")] == [0o640, 0o600]


def test_threads_at_once_have_different_clients_and_no_more_than_may_be() -> None:
    clients, go_on = HttpClients(httpx.Client, 3), threading.Event()
    in_use: list[httpx.Client] = []

    def use(_: int) -> None:
        with clients.one() as client:
            assert client not in in_use, "two threads share a client"
            in_use.append(client)
            assert len(in_use) <= 3
            assert go_on.wait(60)
            in_use.remove(client)
            raise ZeroDivisionError  # which gives the client back

    with ThreadPoolExecutor(8) as pool:
        given = [pool.submit(use, number) for number in range(8)]
        until(lambda: len(in_use) == 3)
        go_on.set()
        assert [type(one.exception()) for one in given] == [ZeroDivisionError] * 8
    with clients.one() as first:
        pass
    with clients.one() as again:
        assert again is first, "its connection is open already"


SHOWN = "import os, sys, tunesmith; assert 'torch' not in sys.modules; print(*map(os.environ.get, sys.argv[1:]))"


@pytest.mark.skipif(platform.system() != "Linux", reason="only libgomp reads GOMP_SPINCOUNT")
def test_it_is_set_before_torch_is_loaded_unless_the_user_did(tmp_path: Path) -> None:
    mine = ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")
    environment = {key: value for key, value in os.environ.items() if key not in mine}
    environment["PYTHONPATH"] = os.pathsep.join(sys.path)
    for given, expected in (({mine[0]: "7"}, "7 None"), ({mine[1]: "active"}, "None active")):
        command, told = [sys.executable, "-c", SHOWN, *mine], environment | given
        done = subprocess.run(command, env=told, capture_output=True, text=True, check=True)
        assert done.stdout.strip() == expected
    # libgomp itself says what it has read, when it is loaded.
    command = [sys.executable, "-m", "tunesmith", "doctor", "-C", str(tmp_path)]
    told = environment | {"OMP_DISPLAY_ENV": "verbose"}
    done = subprocess.run(command, env=told, capture_output=True, text=True, check=False)
    found = [line.strip() for line in done.stderr.splitlines() if "GOMP_SPINCOUNT" in line]
    assert found
    assert all(line.endswith("GOMP_SPINCOUNT = '1000'") for line in found)
