"""The registry's tests that depend on the database, against a real PostgreSQL server."""

from collections.abc import Iterator

import pytest

from tests.postgresql_server import moved_to_postgresql
from tests.registry.test_approvals import test_a_role_taken_away_takes_the_approval_with_it  # noqa: F401
from tests.registry.test_registering import test_registrations_of_one_name_take_turns  # noqa: F401
from tests.registry.test_versions import (  # noqa: F401
    test_a_version_of_another_scope_does_not_exist,
    test_an_alias_cleared_in_between_counts_as_changed,
)
from tunesmith.store.store import Store


@pytest.fixture
def store(copy: Store, postgresql: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[Store]:
    moved = moved_to_postgresql(copy, postgresql)
    monkeypatch.setenv("TUNESMITH_DATABASE_URL", postgresql)  # for tests that open the store once more
    yield moved
    moved.engine.dispose()
