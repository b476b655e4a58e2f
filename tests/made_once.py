"""Expensive things that are made once for all test processes of a run."""

import fcntl
import os
from collections.abc import Callable
from pathlib import Path

import pytest

MadeOnce = Callable[[str, Callable[[Path], None]], Path]


@pytest.fixture(scope="session")
def made_once(tmp_path_factory: pytest.TempPathFactory) -> MadeOnce:
    """A function `(name, make)` that returns a folder which `make(folder)` filled, in this process or another one.

    Tests must not change what is in the folder: they copy it (`shutil.copytree`). The lock ends with its process, so a
    process that was killed while it made something leaves the work to the next one.
    """
    root = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        root = root.parent  # the folder of all processes

    def once(name: str, make: Callable[[Path], None]) -> Path:
        place = root / "made-once" / name
        place.mkdir(parents=True, exist_ok=True)
        ready = place / "ready"
        with (place / "lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            folder = place / f"content-{len(list(place.glob('content-*')))}"
            if ready.exists():
                return place / ready.read_text()
            folder.mkdir()
            make(folder)
            ready.write_text(folder.name)
        return folder

    return once
