"""What all tests share."""

import contextlib
import functools
import gc
import os
import threading
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import typer.testing
from hypothesis import settings
from sqlalchemy import Engine

from tests.statements import share_compiled
from tunesmith.core.system.machine import available_memory
from tunesmith.store import database
from tunesmith.store.store import DATABASE, Store

pytest_plugins = ["tests.attack_table", "tests.made_once", "tests.postgresql_server", "tests.s3_server", "tests.spread"]

# Tiny models gain nothing from a second thread, and spinning threads of several test processes would fight for cores.
os.environ.setdefault("TUNESMITH_THREADS", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["HF_HUB_OFFLINE"] = "1"
# No test comes near the store and the keys of the person who runs it.
for _name in ("TUNESMITH_DATABASE_URL", "TUNESMITH_BLOBS_URL", "TUNESMITH_KEYS"):
    os.environ.pop(_name, None)


def _in_memory(folder: Path) -> bool:
    """Whether a folder is in memory, has room for the tests' files, and leaves room for the tests."""
    if not os.access(folder, os.W_OK):
        return False
    found = os.statvfs(folder)
    return not found.f_flag & os.ST_NOEXEC and found.f_bavail * found.f_frsize > 4e9 and available_memory() > 12e9


# The store waits for the disk at each write: the 46 tests of rollout/test_controller.py do so 1,040 times, for 3 ms
# each. In memory they need not wait. SIGKILL, which many tests send, loses nothing there either.
if "PYTEST_DEBUG_TEMPROOT" not in os.environ and _in_memory(Path("/dev/shm")):
    os.environ["PYTEST_DEBUG_TEMPROOT"] = "/dev/shm"

# How long an example takes says more of the machine than of the code. Every run draws others, but those of CI: what
# fails there has to fail again where it is mended.
settings.register_profile("default", deadline=None, max_examples=50, derandomize="CI" in os.environ)
settings.load_profile("default")


@pytest.fixture(scope="session", autouse=True)
def _own_slots(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Workers of several test processes do not wait for each other."""
    os.environ["TUNESMITH_SLOTS"] = str(tmp_path_factory.mktemp("slots"))


@pytest.fixture(scope="session", autouse=True)
def _migrated_once(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A new SQLite store of a test is a copy of one that was migrated: there are thousands, and migrating takes 45 ms.

    Migrations are tested in store/test_migrations.py, on databases of other names. Other processes migrate.
    """
    made, migrate = tmp_path_factory.mktemp("migrated") / "made", database.migrate
    engine = database.connect(f"sqlite:///{made}", lambda: None)
    held = database.store_id(engine).encode()
    engine.dispose()
    content = made.read_bytes()

    def copied(engine: Engine, new: Callable[[], None] | None = None) -> None:
        path = Path(engine.url.database or "")
        if new and engine.dialect.name == "sqlite" and path.name == DATABASE and not path.exists():
            new()
            with contextlib.suppress(OSError):  # as an existing file, or a folder that cannot be written
                _put(path, content.replace(held, uuid.uuid4().hex.encode()))
        migrate(engine, new)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(database, "migrate", copied)
        yield


@pytest.fixture(scope="session", autouse=True)
def _commands_once() -> Iterator[None]:
    """The command line's commands are made once, and not in 20 ms for each call."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(typer.testing, "_get_command", functools.cache(typer.testing._get_command))
        yield


@pytest.fixture(scope="session", autouse=True)
def _statements_once() -> Iterator[None]:
    """Each test opens its own database, and would compile all statements again."""
    with pytest.MonkeyPatch.context() as patch:
        share_compiled(patch)
        yield


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Store:
    """An empty one whose owner will be olive."""
    monkeypatch.setenv("TUNESMITH_USER", "olive")
    return Store(tmp_path / "store")


def _put(path: Path, content: bytes) -> None:
    """Write a new file as a whole. Raises OSError where there is one, or it cannot be written."""
    beside = path.with_name(f"{path.name}-{os.getpid()}-{threading.get_ident()}")
    try:
        beside.write_bytes(content)
        os.link(beside, path)
    finally:
        beside.unlink(missing_ok=True)


def pytest_configure(config: pytest.Config) -> None:
    """Compile the kernels once, before several processes would all do so at the same time."""
    several = config.option.collectonly or getattr(config.option, "numprocesses", None)
    if several and not hasattr(config, "workerinput"):
        from tunesmith.engines.native import kernels

        kernels._built()


def pytest_xdist_auto_num_workers() -> int:
    """More than there are cores, as memory allows: many tests wait for servers, leases and killed processes."""
    return (os.cpu_count() or 1) + (2 if available_memory() > 18e9 else 1)


def pytest_collection_finish() -> None:
    """What is loaded by now stays. Each comparison of an export collects garbage twice, and would otherwise look
    through some thousand modules each time, which takes a second."""
    gc.freeze()
