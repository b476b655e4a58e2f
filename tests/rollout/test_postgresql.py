"""The rollout's tests that depend on the database, against a real PostgreSQL server."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings
from hypothesis.stateful import run_state_machine_as_test

from tests.fabricate import OWNER, Scene
from tests.postgresql_server import moved_to_postgresql
from tests.rollout import test_state_machine
from tests.rollout.conftest import copied
from tests.rollout.test_controller import (  # noqa: F401
    first,
    test_a_champion_changed_under_the_rollout_aborts_it,
    test_a_clock_set_back_never_shortens_a_pause,
    test_a_killed_promotion_is_carried_on,
    test_a_recalled_version_is_refused,
    test_a_role_revoked_mid_flight_stops_the_promotion,
    test_a_rollout_goes_through_its_steps_one_at_a_time,
    test_a_second_live_rollout_of_a_name_is_refused,
    test_a_transition_for_an_older_revision_is_dropped,
    test_advance_without_news_writes_nothing,
    test_rollback_during_promotion_keeps_the_old_champion,
    test_rollback_goes_back_one_promotion_at_a_time,
    test_two_promoters_at_once_promote_once,
)


@pytest.fixture
def scene(made: Scene, postgresql: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Scene]:
    """A copy of `made` of the test's own, whose rows are in PostgreSQL."""
    monkeypatch.setenv("TUNESMITH_USER", OWNER)
    copy = copied(made, tmp_path / "store")
    copy.store = moved_to_postgresql(copy.store, postgresql)
    yield copy
    copy.store.engine.dispose()


@pytest.mark.slow
def test_the_state_machine_holds(made: Scene, postgresql: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def moved(made: Scene, root: Path) -> Scene:
        copy = copied(made, root)
        copy.store = moved_to_postgresql(copy.store, postgresql)
        return copy

    monkeypatch.setenv("TUNESMITH_USER", OWNER)
    monkeypatch.setattr(test_state_machine, "copied", moved)
    monkeypatch.setattr(test_state_machine.Machine, "made", made, raising=False)
    few = settings(max_examples=5, stateful_step_count=20, deadline=None, suppress_health_check=list(HealthCheck))
    run_state_machine_as_test(test_state_machine.Machine, settings=few)
