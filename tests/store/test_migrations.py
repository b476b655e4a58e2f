"""The migrations make the tables that tables.py states, one revision after the other, and take them back."""

from __future__ import annotations

import threading
import time
from pathlib import Path
from typing import Any

import pytest
from alembic import command
from alembic.autogenerate import compare_metadata
from alembic.config import Config
from alembic.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import JSON, Column, Connection, create_engine, inspect, select

from tests.postgresql_server import empty_database
from tunesmith.store import database
from tunesmith.store.tables import HEAD_REVISION, Table

DATABASES = ["sqlite", "postgresql"]


@pytest.fixture
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """An empty database of the kind that the test names."""
    if request.param == "sqlite":
        return f"sqlite:///{tmp_path / 'db'}"
    found = str(request.getfixturevalue("postgresql"))
    empty_database(found)
    return found


def value(column: Column[Any]) -> Any:
    """A value that a column takes."""
    if isinstance(column.type, JSON):
        return {"a": [1, None]}
    return {str: "x", int: 7, float: 1.5, bool: True}[column.type.python_type]


def filled(connection: Connection) -> dict[str, Any]:
    """The row that each table got."""
    rows = {}
    for table in Table.metadata.sorted_tables:
        rows[table.name] = {column.name: value(column) for column in table.columns}
        connection.execute(table.insert().values(rows[table.name]))
    return rows


def kept(connection: Connection) -> dict[str, Any]:
    """The rows of each table that exists, with the columns that exist and that the newest revision has."""
    found = {}
    for name in set(inspect(connection).get_table_names()) & Table.metadata.tables.keys():
        there = {each["name"] for each in inspect(connection).get_columns(name)}
        columns = [column for column in Table.metadata.tables[name].columns if column.name in there]
        found[name] = [dict(row) for row in connection.execute(select(*columns)).mappings()]
    return found


def same(found: dict[str, Any], rows: dict[str, Any]) -> bool:
    """Whether each table has its row, as far as its columns are there."""
    return all(
        len(there) == 1 and there[0] == {column: rows[name][column] for column in there[0]}
        for name, there in found.items()
    )


@pytest.mark.parametrize("url", DATABASES, indirect=True)
def test_each_revision_goes_down_and_up_and_keeps_the_rows_of_other_tables(url: str) -> None:
    config = Config()
    config.set_main_option("script_location", str(database._MIGRATIONS))
    assert ScriptDirectory.from_config(config).get_heads() == [HEAD_REVISION]
    engine = create_engine(url)
    with engine.begin() as connection:
        config.attributes["connection"] = connection
        command.upgrade(config, "head")
        assert compare_metadata(MigrationContext.configure(connection), Table.metadata) == []
        rows = filled(connection)
        for revision in range(int(HEAD_REVISION) - 1, -1, -1):
            command.downgrade(config, f"{revision:04}" if revision else "base")
            left = kept(connection)
            assert same(left, rows), f"at revision {revision}"
            command.upgrade(config, "head")
            assert compare_metadata(MigrationContext.configure(connection), Table.metadata) == []
            again = kept(connection)
            assert again.keys() == rows.keys()
            for name, (table, own) in {name: (Table.metadata.tables[name], again[name]) for name in rows}.items():
                if name in left:
                    assert [{column: row[column] for column in left[name][0]} for row in own] == left[name]
                else:
                    assert own == []
                connection.execute(table.delete())
                connection.execute(table.insert().values(rows[name]))
    engine.dispose()


@pytest.mark.parametrize("url", DATABASES, indirect=True)
def test_who_finds_another_at_the_first_migration_waits_for_it(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    upgrade, made = command.upgrade, threading.Event()

    def slow(config: Config, revision: str) -> None:
        upgrade(config, revision)
        if not made.is_set():
            made.set()
            time.sleep(0.5)  # before the transaction ends

    monkeypatch.setattr(command, "upgrade", slow)
    found: list[object] = []

    def connect() -> None:
        try:
            engine = database.connect(url)
            found.append(inspect(engine).has_table("jobs"))
            engine.dispose()
        except BaseException as error:  # noqa: BLE001 - shown below
            found.append(error)

    first, second = threading.Thread(target=connect), threading.Thread(target=connect)
    first.start()
    made.wait(300)
    second.start()
    first.join()
    second.join()
    assert found == [True, True]
