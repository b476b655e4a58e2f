"""A new database has the tables that tables.py states; one of another revision is refused."""

import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from alembic import command
from alembic.autogenerate import compare_metadata
from alembic.config import Config
from alembic.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import inspect, text

from tunesmith.core.errors import TunesmithError
from tunesmith.store import database
from tunesmith.store.tables import HEAD_REVISION, OLDEST_REVISION, Table


def test_a_new_database_has_the_stated_tables_and_the_newest_revision(any_database: str) -> None:
    config = Config()
    config.set_main_option("script_location", str(database._MIGRATIONS))
    scripts = ScriptDirectory.from_config(config)
    assert (scripts.get_heads(), scripts.get_bases()) == ([HEAD_REVISION], [OLDEST_REVISION])
    engine = database.connect(any_database)
    with engine.begin() as connection:
        assert compare_metadata(MigrationContext.configure(connection), Table.metadata) == []
        assert connection.execute(text("select version_num from alembic_version")).scalar() == HEAD_REVISION
    for revision in ("0011", "9999"):
        with engine.begin() as connection:
            connection.execute(text(f"update alembic_version set version_num = '{revision}'"))  # noqa: S608
        with pytest.raises(TunesmithError, match=f"at revision {revision}, this tunesmith reads"):
            database.connect(any_database)
    engine.dispose()


def test_the_second_to_migrate_waits(any_database: str, monkeypatch: pytest.MonkeyPatch) -> None:
    stamp, made = command.stamp, threading.Event()

    def slow(config: Config, revision: str) -> None:
        stamp(config, revision)
        assert not made.is_set(), "made twice"
        made.set()
        time.sleep(0.5)  # before the transaction ends

    def connect() -> bool:
        engine = database.connect(any_database)
        found = inspect(engine).has_table("jobs")
        engine.dispose()
        return found

    monkeypatch.setattr(command, "stamp", slow)
    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(connect)
        made.wait(300)
        second = pool.submit(connect)
        assert first.result() is second.result() is True
