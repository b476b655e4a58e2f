"""The canary's test: its decisions, its refusals to decide, and its error rates under constant peeking."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tunesmith.rollout.analysis import Arm, evidence_not_worse, evidence_worse, interval, judge
from tunesmith.rollout.settings import Analysis


def arm(ones: int, total: int, failed: int = 0) -> Arm:
    return Arm(scores=[1.0] * ones + [0.0] * (total - ones), requests=total + failed, failed=failed)


@pytest.mark.parametrize(
    ("metric", "least", "canary", "stable", "outcome"),
    [
        ("exact_match", None, arm(0, 40), arm(108, 360), "fail"),
        ("exact_match", None, arm(0, 45), arm(14, 45), "fail"),
        ("exact_match", None, arm(26, 40), arm(10, 40), "pass"),
        ("exact_match", None, arm(24, 40), arm(100, 360), "pass"),
        ("json_valid", None, arm(130, 130), arm(1170, 1170), "pass"),
        ("exact_match", None, arm(120, 200), arm(0, 200), "pass"),
        ("exact_match", 0.9, arm(120, 200), arm(0, 200), "fail"),
    ],
)
def test_few_requests_decide_clear_cases(
    metric: str, least: float | None, canary: Arm, stable: Arm, outcome: str
) -> None:
    found = judge(Analysis(metric=metric, min_requests=10, at_least=least), canary, stable)
    assert found.outcome == outcome
    document = found.as_json()
    assert (document["canary"]["n"], document["evidence"]["needed"]) == (len(canary.scores), 20)
    assert document["canary"]["low"] <= np.mean(canary.scores) <= document["canary"]["high"]
    assert "allowed to be worse by 0.05" in document["reason"]


def test_a_pass_waits_for_min_requests_and_a_failure_does_not() -> None:
    assert judge(Analysis(metric="exact_match", min_requests=50), arm(49, 49), arm(0, 400)).outcome == "inconclusive"
    assert judge(Analysis(metric="exact_match", min_requests=50), arm(50, 50), arm(0, 400)).outcome == "pass"
    assert judge(Analysis(metric="exact_match", min_requests=500), arm(0, 60), arm(400, 400)).outcome == "fail"


def test_equal_arms_without_margin_exhaust_max_requests() -> None:
    open_question = Analysis(metric="exact_match", worse_by_at_most=0.0, max_requests=100)
    before, after = judge(open_question, arm(30, 99), arm(30, 99)), judge(open_question, arm(30, 100), arm(30, 100))
    assert (before.outcome, before.exhausted) == ("inconclusive", False)
    assert (after.outcome, after.exhausted) == ("inconclusive", True)


@pytest.mark.parametrize(
    ("canary", "stable", "says"),
    [
        (Arm(), Arm(), "the canary had no traffic"),
        (Arm(), arm(90, 100), "the canary had no traffic"),
        (Arm(requests=200), arm(90, 100), "no scored request yet"),
        (Arm(scores=[math.nan] * 200, requests=200), arm(90, 100), "no usable score yet"),
        (Arm(scores=[True, "1", None, 1.5, -1, math.inf], requests=6), arm(90, 100), "no usable score yet"),
        (arm(200, 200), Arm(), "stable has no traffic to compare with"),
    ],
)
def test_missing_evidence_is_inconclusive(canary: Arm, stable: Arm, says: str) -> None:
    judgement = judge(Analysis(metric="exact_match"), canary, stable)
    assert judgement.outcome == "inconclusive"
    assert judgement.reason.startswith(says)


def test_nan_among_good_scores_counts_against_a_pass() -> None:
    good = [1.0] * 150
    passing = judge(Analysis(metric="json_valid"), Arm(good, 150), arm(150, 150))
    spoilt = judge(Analysis(metric="json_valid"), Arm([*good, *[math.nan] * 50], 200), arm(150, 150))
    assert (passing.outcome, spoilt.outcome) == ("pass", "inconclusive")
    assert spoilt.canary["unusable"] == 50


def test_only_errors_fail_whatever_the_metric() -> None:
    errors_only = Arm(requests=60, failed=60)
    for metric in ("exact_match", "json_valid", "error_rate", "success_rate"):
        judgement = judge(Analysis(metric=metric), errors_only, arm(30, 60))
        assert judgement.outcome == "fail", metric


def test_good_scores_do_not_pass_with_more_failures() -> None:
    good = Analysis(metric="exact_match")
    assert judge(good, arm(60, 60), arm(10, 60)).outcome == "pass"
    failing = judge(good, arm(60, 60, failed=5), arm(10, 60))
    assert failing.outcome == "inconclusive"
    assert failing.reason.startswith("5 of 65 canary requests failed")


@pytest.mark.parametrize("metric", ["json_valid", "success_rate"])
def test_a_canary_whose_clients_leave_does_not_pass(metric: str) -> None:
    analysis = Analysis.model_validate({"metric": metric})
    stable = Arm([1.0] * 200, requests=200)
    assert judge(analysis, Arm([1.0] * 200, requests=200), stable).outcome == "pass"
    slow = judge(analysis, Arm([1.0] * 200, requests=300, left=100), stable)
    assert (slow.outcome, slow.canary["n"], slow.canary["left"]) == ("inconclusive", 200, 100)
    assert slow.reason.startswith("the clients of 100 of 300 canary requests left before any text came")
    also = Arm([1.0] * 200, requests=300, left=100)
    assert judge(analysis, also, also).outcome == "pass", "as often as stable's"


def test_the_error_rate_is_shown_as_an_error_rate() -> None:
    judgement = judge(Analysis(metric="error_rate"), Arm(requests=300, failed=3), Arm(requests=300, failed=1))
    assert judgement.canary["mean"] == pytest.approx(0.01)
    assert judgement.canary["low"] <= 0.01 <= judgement.canary["high"]  # type: ignore[operator]
    assert judgement.outcome == "pass"


def test_a_floor_decides_alone_where_stable_has_no_traffic() -> None:
    floor = Analysis(metric="json_valid", at_least=0.9)
    assert judge(floor, arm(100, 100), Arm()).outcome == "pass"
    assert judge(floor, arm(50, 100), Arm()).outcome == "fail"
    assert judge(floor, arm(91, 100), Arm()).outcome == "inconclusive"


scores = st.lists(st.sampled_from([0.0, 0.25, 0.5, 1.0]) | st.floats(0, 1), max_size=60)


@settings(max_examples=25, deadline=None)
@given(scores, scores, st.sampled_from([0.0, 0.05, 0.5, 0.99]))
def test_evidence_is_finite_one_sided_and_ignores_order(
    canary: list[float], stable: list[float], margin: float
) -> None:
    ours, theirs = np.array(canary), np.array(stable)
    better, worse = evidence_not_worse([ours], [theirs], margin)[0], evidence_worse([ours], [theirs], margin)[0]
    assert math.isfinite(better)
    assert math.isfinite(worse)
    assert not (better >= 20 and worse >= 20)
    assert evidence_worse([ours[::-1]], [theirs[::-1]], margin)[0] == pytest.approx(worse, rel=1e-6)


@settings(max_examples=25, deadline=None)
@given(scores.filter(bool))
def test_the_interval_holds_the_mean_of_what_was_seen(values: list[float]) -> None:
    low, high = interval(np.array(values), 0.95)
    assert 0 <= low <= float(np.mean(values)) + 1e-9
    assert float(np.mean(values)) - 1e-9 <= high <= 1


def looks_until(fires: Any, rng: np.random.Generator, canary: float, stable: float, share: float, most: int) -> bool:
    """Whether fires ever says yes, looking after every request."""
    ours: list[float] = []
    theirs: list[float] = []
    for _ in range(most):
        arm_scores, mean = (ours, canary) if rng.random() < share else (theirs, stable)
        arm_scores.append(float(rng.random() < mean))
        if fires(np.array(ours), np.array(theirs)):
            return True
    return False


def test_peeking_rarely_raises_an_alarm_at_equal_arms_or_passes_a_worse_canary() -> None:
    """A cheap guard: benchmarks/canary_false_alarms.py measures the rates."""
    rng = np.random.default_rng(7)
    alarms = sum(
        looks_until(lambda ours, theirs: evidence_worse([ours], [theirs], 0.0)[0] >= 10, rng, 0.3, 0.3, 0.5, 60)
        for _ in range(15)
    )
    passes = sum(
        looks_until(lambda ours, theirs: evidence_not_worse([ours], [theirs], 0.1)[0] >= 10, rng, 0.4, 0.5, 0.5, 60)
        for _ in range(15)
    )
    # At most 1 in 10 by the theorem: 5 or more of 15 would then have a probability of 0.02 at most.
    assert max(alarms, passes) <= 4
