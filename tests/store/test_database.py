"""Transactions that wait for the disk, and those that need not."""

from __future__ import annotations

from sqlalchemy import text

from tunesmith.store import database
from tunesmith.store.store import Store

FULL, NORMAL = 2, 1


def test_only_a_transaction_that_says_so_leaves_the_disk_to_the_system(store: Store) -> None:
    def synchronous(forced: bool) -> int:
        with database.writing(store.engine, forced=forced) as session:
            return int(session.execute(text("PRAGMA synchronous")).scalar_one())

    assert [synchronous(forced) for forced in (True, False, False, True)] == [FULL, NORMAL, NORMAL, FULL]
