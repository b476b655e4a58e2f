"""SQL statements that are compiled once for all of a process's SQLite databases."""

from typing import Any

import pytest
from sqlalchemy import Engine
from sqlalchemy.util import LRUCache

from tunesmith.store import database


class _Compiled(LRUCache[Any, Any]):
    """SQLAlchemy's cache of compiled statements. A key begins with the engine's own dialect, which is left out."""

    def get(self, key: Any, default: Any = None) -> Any:
        return super().get(key[1:], default)

    def __getitem__(self, key: Any) -> Any:
        return super().__getitem__(key[1:])

    def __setitem__(self, key: Any, value: Any) -> None:
        super().__setitem__(key[1:], value)


def share_compiled(patch: pytest.MonkeyPatch) -> None:
    """Let every SQLite database that this process opens use the statements that others compiled."""
    create, compiled = database.create_engine, _Compiled(2000)

    def sharing(url: Any, **given: Any) -> Engine:
        engine = create(url, **given)
        if engine.dialect.name == "sqlite":
            engine._compiled_cache = compiled
        return engine

    patch.setattr(database, "create_engine", sharing)
