"""The migrations make the tables that tables.py states, one revision after the other, and take them back."""

from __future__ import annotations

from pathlib import Path

from alembic import command
from alembic.autogenerate import compare_metadata
from alembic.config import Config
from alembic.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import create_engine, inspect

from tunesmith.store import database
from tunesmith.store.tables import HEAD_REVISION, Table


def test_up_and_down(tmp_path: Path) -> None:
    config = Config()
    config.set_main_option("script_location", str(database._MIGRATIONS))
    assert ScriptDirectory.from_config(config).get_heads() == [HEAD_REVISION]
    engine = create_engine(f"sqlite:///{tmp_path / 'db'}")
    with engine.begin() as connection:
        config.attributes["connection"] = connection
        for _ in range(2):
            command.upgrade(config, "head")
            assert compare_metadata(MigrationContext.configure(connection), Table.metadata) == []
            for _ in range(1, int(HEAD_REVISION)):
                command.downgrade(config, "-1")
        assert set(inspect(connection).get_table_names()) < {*Table.metadata.tables, "alembic_version"}
