"""The power promised before a run: against exact sums, against the gate itself, and where nothing is promised."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from tests.fabricate import answer_lines, fabricate, put_answers
from tunesmith.core.errors import UsageError
from tunesmith.data.dataset import load_dataset
from tunesmith.evaluation.gates.settings import GATES
from tunesmith.evaluation.metrics.declared import make_scoring
from tunesmith.evaluation.planning import Assumed, measured_on_validation, plan_gates, plan_sentence
from tunesmith.evaluation.stats.power import (
    ASSUMED_DIFFERING,
    Grouping,
    _tail,
    grouping_of,
    lift_power,
    plan_lift,
    smallest_lift,
)


def tail_of(wins: int, losses: int, ties: int, bound: float) -> float:
    """The gate's tail at these counts, with the worst-case row among the losses."""
    return float(_tail(np.array([wins]), np.array([losses + 1.0]), np.array([ties]), bound, np.array([True]))[0])


@pytest.mark.parametrize(
    ("wins", "losses", "ties", "bound"), [(12, 4, 34, 0.05), (30, 25, 300, -0.03), (9, 1, 190, 0.0), (5, 0, 45, -0.03)]
)
def test_the_tail_is_that_of_the_resampled_mean_and_at_zero_exact_mcnemar(
    wins: int, losses: int, ties: int, bound: float
) -> None:
    draw = np.random.default_rng(0)
    sums = (1 - bound) * draw.gamma(wins, size=100_000) - (1 + bound) * draw.gamma(losses + 1, size=100_000)
    expected = float(np.mean(sums - bound * draw.gamma(ties, size=100_000) < 0))
    assert tail_of(wins, losses, ties, bound) == pytest.approx(expected, abs=0.01)
    exact = stats.binomtest(wins, wins + losses, 0.5, alternative="greater").pvalue
    assert tail_of(wins, losses, ties, 0.0) == pytest.approx(exact, abs=1e-9)


def test_what_raises_power_and_what_lowers_it() -> None:
    usual = plan_lift(300, lift=0.1, differing=0.3)
    assert usual.needed is not None
    assert plan_lift(600, lift=0.1, differing=0.3).power > usual.power
    for harder in (
        plan_lift(300, lift=0.1, differing=0.3, grouping=Grouping(5.0, 0.5)),
        plan_lift(300, lift=0.1, differing=0.3, use=4),
        plan_lift(300, lift=0.1, differing=0.5),
        plan_lift(300, lift=0.1, differing=0.3, at_least=0.04),
    ):
        assert harder.needed is not None
        assert harder.needed > usual.needed
        assert harder.power < usual.power
    seen = smallest_lift(usual.needed, differing=0.3)
    assert seen == pytest.approx(0.1, abs=0.003)


def test_what_no_number_of_rows_shows() -> None:
    assert plan_lift(500, lift=0.05, differing=0.3, at_least=0.05).needed is None, "a lift of just the bound"
    assert smallest_lift(15, differing=0.5) is None, "fewer than twenty groups conclude nothing"
    assert lift_power(100, 0.2, 0.2, 0.0, 0.025, Grouping(10.0)) == 0.0, "ten groups"
    with pytest.raises(UsageError, match="differ on at least that share"):
        plan_lift(500, lift=0.2, differing=0.1)
    assert plan_lift(100, lift=0.0, differing=0.3, at_least=-1.0).power == pytest.approx(1.0), "any difference passes"
    assert plan_lift(100, lift=1.0, differing=1.0, at_least=1.0).power == pytest.approx(0.0)


def test_correlation_within_groups_from_differences() -> None:
    draw = np.random.default_rng(1)
    groups = [f"g{i // 5}" for i in range(2000)]
    shared = draw.normal(size=400).repeat(5)
    own = draw.normal(size=2000)
    assert grouping_of(groups, own).correlation == pytest.approx(0.0, abs=0.05)
    assert grouping_of(groups, shared).correlation == pytest.approx(1.0, abs=0.01)
    half = grouping_of(groups, np.sqrt(0.5) * shared + np.sqrt(0.5) * own)
    assert half.correlation == pytest.approx(0.5, abs=0.08)
    assert half.effect == pytest.approx(3.0, abs=0.4)
    assert grouping_of(groups).effect == pytest.approx(5.0), "rows of a group count as one until it is known better"
    assert grouping_of([]).effect == 1.0


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
    assert [gate.differing for gate in plan.gates] == pytest.approx([9 / 11, 1 / 11, ASSUMED_DIFFERING], abs=1e-6)
    assert [gate.measured for gate in plan.gates] == [True, True, False]
    lift = {"lift": gates["lift"]}
    one, ten = (plan_gates(dataset, lift, uses=1, new=new, assumed=Assumed(), lift=0.25) for new in (1, 10))
    assert (one.test_set_use, ten.test_set_use) == (2, 11), "all that the next evaluation adds"
    assert ten.gates[0].power < one.gates[0].power
    assert "11 candidates will have used these rows" in plan_sentence(ten, ten.gates[0])
