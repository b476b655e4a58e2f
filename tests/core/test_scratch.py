"""Temporary folders and files of processes that were killed, and of those that live."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.attack_table import Happened
from tunesmith.core.system.files import write_atomic
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
