"""Values computed from the database, kept until its state changes."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from typing import Any, Generic, TypeVar

from sqlalchemy.orm import Session

from tunesmith.store import audit
from tunesmith.store.store import Store

Value = TypeVar("Value")
_MOST = 4096  # values that are kept


class UntilChanged(Generic[Value]):
    """Values by key, each kept until the audit log has a new entry. Thread-safe.

    Every change of state writes an audit entry in its transaction (`Store.change`). So the newest entry's number and
    digest are the revision of users, keys, approvals, recalls, aliases and rollouts, whichever process changes them.
    holds: whether a value still does, for what changes without an entry, such as the time.
    """

    def __init__(self, store: Store, holds: Callable[[Value], bool] = lambda _value: True) -> None:
        self._store, self._holds = store, holds
        self._kept: dict[Hashable, tuple[Sequence[Any] | None, Value]] = {}

    def get(self, key: Hashable, compute: Callable[[Session], Value]) -> Value:
        """The value of a key, computed if there is none for the newest entry or it does not hold any more.

        compute: reads what it needs through the session that it is given. What it raises is raised, and not kept.
        """
        # Before the value is computed: a change in between gives the next call another revision.
        revision = audit.revision(self._store.engine)
        if (known := self._known(key, revision)) is not None:
            return known
        with self._store.reading() as session:
            value = compute(session)
        if len(self._kept) >= _MOST:
            self._kept = {}
        self._kept[key] = revision, value
        return value

    def known(self, key: Hashable) -> Value | None:
        """As `kept`, in some microseconds: None too where the database is behind a network and may keep the caller
        waiting."""
        return self.kept(key) if self._store.engine.dialect.name == "sqlite" else None

    def kept(self, key: Hashable) -> Value | None:
        """The value of a key if it is kept and holds. None where it has to be computed."""
        return self._known(key, audit.revision(self._store.engine)) if key in self._kept else None

    def _known(self, key: Hashable, revision: Sequence[Any] | None) -> Value | None:
        kept = self._kept.get(key)
        return kept[1] if kept is not None and kept[0] == revision and self._holds(kept[1]) else None
