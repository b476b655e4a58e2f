"""Routing, and reading what the arms did from the requests table."""

from __future__ import annotations

import math
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from tests.fabricate import Scene
from tunesmith.rollout.traffic import LEFT, STEP, arms, goes_to_canary
from tunesmith.store import database
from tunesmith.store.tables import RequestRow


def served(
    scene: Scene, key: str, arm: str, *, step: int, rollout: int | None = 1, ok: bool = True, **scores: Any
) -> None:
    with database.writing(scene.store.engine) as session:
        session.add(
            RequestRow(
                id=key, at="2026-01-01T00:00:00Z", name="home", version="sha256:" + "0" * 64, rollout=rollout,
                arm=arm, ok=ok, seconds=0.1, scores=scores, features={STEP: step},
            )
        )  # fmt: skip


def test_only_the_requests_of_this_rollout_and_step_count(scene: Scene) -> None:
    served(scene, "a", "canary", step=2, json_valid=1.0)
    served(scene, "b", "stable", step=2, json_valid=0.0)
    served(scene, "c", "canary", step=1, json_valid=0.5)
    served(scene, "d", "canary", step=2, rollout=7, json_valid=0.5)
    served(scene, "e", "stable", step=2, rollout=None, json_valid=0.5)
    served(scene, "f", "canary", step=2, ok=False)
    canary, stable = arms(scene.store, 1, 2, "json_valid", None)
    assert (canary.scores, canary.requests, canary.failed) == ([1.0], 2, 1)
    assert (stable.scores, stable.requests, stable.failed) == ([0.0], 1, 0)


def test_requests_that_were_left_are_counted_apart(scene: Scene) -> None:
    served(scene, "a", "canary", step=0, json_valid=1.0)
    for key in ("b", "c"):
        served(scene, key, "canary", step=0)
        with database.writing(scene.store.engine) as session:
            row = session.get_one(RequestRow, key)
            row.features = {**row.features, LEFT: True}
    canary, _ = arms(scene.store, 1, 0, "json_valid", None)
    assert (canary.requests, canary.failed, canary.left, canary.scores) == (3, 0, 2, [1.0])


def test_nan_in_the_table_is_handed_on_and_not_dropped(scene: Scene) -> None:
    served(scene, "a", "canary", step=0, exact_match=math.nan)
    canary, _ = arms(scene.store, 1, 0, "exact_match", None)
    (score,) = canary.scores
    assert score is None or math.isnan(score)  # as the database reads what is no JSON


def test_the_share_of_the_canary_is_the_weight() -> None:
    for weight in (0, 10, 50, 100):
        share = sum(goes_to_canary(3, weight, f"request-{number}") for number in range(4000)) / 4000
        assert abs(share - weight / 100) < 0.03
    assert {goes_to_canary(3, 0, str(number)) for number in range(1000)} == {False}
    assert {goes_to_canary(3, 100, str(number)) for number in range(1000)} == {True}


@given(st.text(), st.integers(0, 100), st.integers(0, 100), st.integers(1, 99))
def test_a_user_keeps_the_canary_as_the_weight_grows(key: str, one: int, other: int, rollout: int) -> None:
    low, high = sorted((one, other))
    assert goes_to_canary(rollout, high, key) or not goes_to_canary(rollout, low, key)
