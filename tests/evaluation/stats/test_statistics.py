"""Intervals, tests and the power promised before a run: held against scipy, and against what must never pass."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from tests.fabricate import answer_lines, fabricate, put_answers
from tunesmith.core.errors import Inconclusive, UsageError
from tunesmith.data.dataset import load_dataset
from tunesmith.evaluation import planning
from tunesmith.evaluation.gates.settings import GATES
from tunesmith.evaluation.metrics.declared import make_scoring
from tunesmith.evaluation.planning import Assumed, measured_on_validation, plan_gates
from tunesmith.evaluation.stats import statistics
from tunesmith.evaluation.stats.statistics import Level, interval, mcnemar, sign_flip

SCORES = (0.0, 1.0)
GAPS = (-1.0, 1.0)


def alone(n: int) -> list[str]:
    return [f"g{i}" for i in range(n)]


@pytest.mark.parametrize(
    ("right", "n", "confidence"), [(0, 40, 0.9), (1, 40, 0.95), (20, 40, 0.99), (40, 40, 0.95), (700, 700, 0.95)]
)
def test_is_clopper_pearson_for_single_rows_scored_0_or_1(right: int, n: int, confidence: float) -> None:
    exact = stats.binomtest(right, n).proportion_ci(confidence, method="exact")
    values = np.array([1.0] * right + [0.0] * (n - right))
    found = interval(values, alone(n), SCORES, Level(confidence, 0))
    assert found.mean == right / n
    assert (found.low, found.high) == pytest.approx((exact.low, exact.high), abs=0.004)
    ties = interval(np.zeros(100), alone(100), GAPS, Level(0.95, 0))
    rule_of_three = 1 - 0.025 ** (1 / 100)
    assert (ties.mean, ties.low, ties.high) == pytest.approx((0.0, -rule_of_three, rule_of_three), abs=0.002)
    with pytest.raises(Inconclusive, match="no scored rows"):
        interval(np.array([]), [], SCORES, Level(0.95, 0))


def test_rows_of_one_group_count_as_one_observation() -> None:
    values = np.repeat([1.0, 0.0] * 15, 10)
    grouped = interval(values, [f"g{i // 10}" for i in range(300)], SCORES, Level(0.95, 0))
    by_group = interval(values[::10], alone(30), SCORES, Level(0.95, 0))
    apart = interval(values, alone(300), SCORES, Level(0.95, 0))
    assert (grouped.low, grouped.high) == pytest.approx((by_group.low, by_group.high))
    assert grouped.high - grouped.low > 2 * (apart.high - apart.low)
    for groups, weight in ((alone(30), 30), (["a"] * 90 + alone(10), 100**2 / (90**2 + 10)), ([], 0.0)):
        assert statistics.effective_groups(groups) == pytest.approx(weight)


def test_is_the_same_on_every_call_in_pieces_and_whatever_else_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    values = np.random.default_rng(0).random((60, 3))
    together = statistics.intervals(values, alone(60), SCORES, Level(0.95, 7))
    one = interval(values[:, 1], alone(60), SCORES, Level(0.95, 7))
    assert (together[1].low, together[1].high) == pytest.approx((one.low, one.high), abs=1e-12)
    assert interval(values[:, 1], alone(60), SCORES, Level(0.95, 8)) != one
    monkeypatch.setattr(statistics, "CHUNK", 61 * 333)
    pieces = interval(values[:, 1], alone(60), SCORES, Level(0.95, 7))
    assert (pieces.low, pieces.high) == pytest.approx((one.low, one.high), abs=1e-12)


@settings(max_examples=15, deadline=None)
@given(
    rows=st.lists(st.tuples(st.floats(0, 1), st.integers(0, 8)), min_size=1, max_size=40),
    confidence=st.sampled_from([0.8, 0.95, 0.99]),
)
def test_interval_holds_the_mean_and_widens_with_confidence(rows: list[tuple[float, int]], confidence: float) -> None:
    values, groups = np.array([value for value, _ in rows]), [str(group) for _, group in rows]
    found = interval(values, groups, SCORES, Level(confidence, 0))
    wider = interval(values, groups, SCORES, Level(0.995, 0))
    assert max(0.0, wider.low - 1e-9) <= found.low <= found.mean <= found.high <= min(1.0, wider.high + 1e-9)
    mirrored = interval(1.0 - values, groups, SCORES, Level(confidence, 0))
    assert mirrored.low == pytest.approx(1.0 - found.high, abs=1e-9)
    turned = interval(values[::-1], groups[::-1], SCORES, Level(confidence, 0))
    assert (turned.low, turned.high) == pytest.approx((found.low, found.high), abs=1e-9), "rows have no order"


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 60), st.integers(0, 60))
def test_mcnemar_is_the_exact_binomial_test(wins: int, losses: int) -> None:
    expected = min(1.0, 2 * stats.binom.cdf(min(wins, losses), wins + losses, 0.5)) if wins + losses else 1.0
    assert mcnemar(wins, losses) == pytest.approx(expected, abs=1e-9)


@settings(max_examples=12)
@given(st.lists(st.integers(-4, 4), min_size=2, max_size=10))
def test_sign_flip_of_whole_sums_against_scipy(sums: list[int]) -> None:
    gaps = np.array(sums, dtype=np.float64)
    expected = stats.permutation_test(
        (gaps,), lambda sample, axis: np.sum(sample, axis=axis), permutation_type="samples", n_resamples=np.inf
    )
    assert sign_flip(gaps, alone(len(sums)), seed=0) == pytest.approx(min(1.0, expected.pvalue), abs=1e-9)
    # Six groups that all win: two of the 64 ways to set signs are as extreme.
    assert sign_flip(np.ones(12), [f"g{i // 2}" for i in range(12)], seed=0) == pytest.approx(2 / 64)
    assert sign_flip(np.full(6, 0.3), ["g"] * 6, seed=0) == 1.0, "one group shows nothing"


def test_looks_share_the_allowed_error() -> None:
    tails = [(1 - statistics.confidence_at_use(0.95, use)) / 2 for use in range(1, 23)]
    assert tails[0] == pytest.approx(0.025)
    assert tails == sorted(tails, reverse=True)
    assert sum(tails) < 0.05
    with pytest.raises(Inconclusive, match="fresh rows"):
        statistics.confidence_at_use(0.95, 23)


# The power promised before a run: against exact sums, against the gate itself, and where nothing is promised


def test_what_raises_and_lowers_power_and_what_no_number_of_rows_shows() -> None:
    usual = planning.LiftTest(0.3)
    chance, needed = usual.chance(300, 0.1), usual.rows_needed(0.1)
    assert needed is not None
    # Pinned, so that a plan says tomorrow what it says today.
    for at_least, *expected in ((0.0, 0.874, 249), (0.05, 0.319, 953), (-0.05, 0.997, 115)):
        found = planning.LiftTest(0.3, at_least)
        assert [round(found.chance(300, 0.1), 3), found.rows_needed(0.1)] == expected
    assert usual.chance(600, 0.1) > chance
    changes: list[dict[str, Any]] = [
        {"grouping": planning.Grouping(5.0, 0.5)}, {"use": 4}, {"differing": 0.5}, {"at_least": 0.04}
    ]  # fmt: skip
    for change in changes:
        harder = usual._replace(**change)
        more = harder.rows_needed(0.1)
        assert more is not None
        assert more > needed
        assert harder.chance(300, 0.1) < chance
    assert usual.smallest_lift(needed) == pytest.approx(0.1, abs=0.003)
    assert planning.LiftTest(0.3, 0.05).rows_needed(0.05) is None, "a lift of just the bound"
    assert planning.LiftTest(0.5).smallest_lift(15) is None, "fewer than twenty groups conclude nothing"
    assert planning.LiftTest(0.2, grouping=planning.Grouping(10.0)).chance(100, 0.2) == 0.0, "ten groups"
    with pytest.raises(UsageError, match="differ on at least that share"):
        planning.LiftTest(0.1).chance(500, 0.2)
    assert planning.LiftTest(0.3, -1.0).chance(100, 0.0) == pytest.approx(1.0), "any difference passes"
    assert planning.LiftTest(1.0, 1.0).chance(100, 1.0) == pytest.approx(0.0)


def test_correlation_within_groups_from_differences() -> None:
    draw = np.random.default_rng(1)
    groups = [f"g{i // 5}" for i in range(2000)]
    shared = draw.normal(size=400).repeat(5)
    own = draw.normal(size=2000)
    half = planning.grouping_of(groups, np.sqrt(0.5) * shared + np.sqrt(0.5) * own)
    assert half.correlation == pytest.approx(0.5, abs=0.08)
    assert half.effect == pytest.approx(3.0, abs=0.4)
    assert planning.grouping_of(groups).effect == pytest.approx(5.0), (
        "rows of a group count as one until it is known better"
    )
    assert planning.grouping_of([]).effect == 1.0


def test_each_gate_is_planned_by_how_its_own_metric_differs(tmp_path: Path) -> None:
    """Two candidates give valid JSON always, and differ in exact_match on eight of ten validation rows."""
    made = fabricate(tmp_path / "store", n=60)
    dataset = load_dataset(made.store, made.dataset)
    rows = dataset.examples("validation")
    wrong = answer_lines(rows, lambda row: row.answer if row in rows[:2] else "{}")
    right = answer_lines(rows, lambda row: row.answer)
    answers = [
        put_answers(made.store, made.candidates[name], made.dataset, lines, suite="validation")
        for name, lines in (("rag", wrong), ("tuned", right))
    ]
    scorings = {metric: make_scoring(metric, None, tmp_path) for metric in ("exact_match", "json_valid")}
    measured = measured_on_validation(made.store, answers, dataset, scorings)
    told = {
        "lift": {"metric": "exact_match", "over": "rag", "at_least": 0.0},
        "kept": {"metric": "json_valid", "not_below": "rag", "drop_at_most": 0.5},
        "better": {"metric": "judged", "over": "rag", "at_least": 0.0},
    }
    gates = GATES.validate_python(told)
    plan = plan_gates(dataset, gates, uses=0, assumed=Assumed(), measured=measured, lift=0.25)
    assert [gate.differing for gate in plan.gates] == pytest.approx(
        [9 / 11, 1 / 11, planning.ASSUMED_DIFFERING], abs=1e-6
    )
    assert [gate.measured for gate in plan.gates] == [True, True, False]
    lift = {"lift": gates["lift"]}
    one, ten = (plan_gates(dataset, lift, uses=1, new=new, assumed=Assumed(), lift=0.25) for new in (1, 10))
    assert (one.test_set_use, ten.test_set_use) == (2, 11), "all that the next evaluation adds"
    assert ten.gates[0].power < one.gates[0].power
    assert "11 candidates will have used these rows" in ten.sentence(ten.gates[0])
