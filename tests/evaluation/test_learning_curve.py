"""What a learning curve says of scores that follow a known curve."""

from itertools import pairwise
from typing import Any

import numpy as np
import pytest

from tunesmith.evaluation.learning_curve import Forecast, Measured, extrapolate

SIZES = (25, 50, 100, 200)


def curve(rows: float, most: float = 0.9, half: float = 100.0) -> float:
    return most / (1 + half / rows)


def measured(means: list[float], untuned: float | None = 0.1, *, rows: int = 200, each: int = 1, seed: int = 0) -> Any:
    """Answers of which about these shares are right; the rows of a group are all as hard."""
    draw = np.random.RandomState(seed)
    hard = np.repeat(draw.random_sample(-(-rows // each)), each)[:rows]
    scores = (hard[:, None] < np.array(means)).astype(float)
    others = np.empty((rows, 0)) if untuned is None else (draw.random_sample(rows) < untuned).astype(float)[:, None]
    return Measured(SIZES[-len(means) :], scores, others, [str(place // each) for place in range(rows)])


def test_what_widens_the_interval() -> None:
    def width(given: Measured, rows: int = 400, test: int = 400) -> float:
        found = extrapolate(given, rows, test, 0.05).score
        return found.high - found.low

    means = [curve(n) for n in SIZES]
    usual = width(measured(means))
    assert width(measured(means), rows=3200) > usual, "more rows beyond the largest subset"
    assert width(measured(means), test=30) > usual, "fewer test rows"
    assert width(measured(means, each=10)) > usual, "fewer groups"
    found = extrapolate(measured(means), 1000, 400, 0.05)
    assert [point.rows for point in found.curve] == [*SIZES, 1000, 2000]
    assert all(one.median <= more.median + 0.02 for one, more in pairwise(found.curve)), "more rows, no lower score"
    assert found == extrapolate(measured(means), 1000, 400, 0.05), "the same scores, the same draws"


@pytest.mark.parametrize(
    ("untuned", "goal", "decision"),
    [(0.1, 0.05, "train"), (0.97, 0.05, "don't"), (0.7, 0.0, "undecided"), (None, 0.05, None)],
)
def test_decisions(untuned: float | None, goal: float, decision: str | None) -> None:
    found = extrapolate(measured([curve(n) for n in SIZES], untuned), 400, 400, goal)
    assert found.decision == decision
    assert (found.lift is None) == (found.likely is None) == (untuned is None)
    assert (found.said, found.from_rows) == (True, None)


def test_a_wide_interval_says_from_how_many_rows_the_score_could_be_said() -> None:
    steep = measured([0.02, 0.04, 0.1, 0.2])
    found = extrapolate(steep, 6400, 400, 0.05)
    assert not found.said
    assert found.score.high - found.score.low > 0.3
    assert found.decision == "train", "that it pays can be said"
    assert found.from_rows in (800, 1600, 3200)
    assert extrapolate(steep, 410, 400, 0.05).from_rows is None, "half of the rows are trained on"
    for rows, larger in ((10_000, 800), (1000, 400), (410, None)):  # scores at the floor say nothing yet
        found = extrapolate(measured([0.0, 0.0, 0.01, 0.01]), rows, 400, 0.5)
        assert (found.said, found.decision, found.from_rows) == (False, "undecided", larger)


def forecast(**changes: Any) -> Forecast:
    interval = {"median": 0.5, "low": 0.4, "high": 0.6}
    return Forecast.model_validate({
        "name": "tuned", "metric": "exact_match", "rows": 1400, "held": {"validation": 200}, "seconds": 9.0,
        "confidence": 0.9, "goal": 0.05, "rival": "plain", "rivals": {"plain": 0.1}, "score": interval,
        "lift": interval, "likely": 0.97, "decision": "train", "curve": [],
        "subsets": [{"rows": 12, "epochs": 3.0, "mean": 0.02}],
        "training": {"seconds": 90.0, "epochs": 3.0, "money": None}, "forecast": "sha256:0", **changes,
    })  # fmt: skip


def test_what_is_said() -> None:
    found = forecast()
    assert "about 50.0%" in found.reasons[0]
    assert "a lift of +50.0 points (90% interval +40.0 to +60.0) over plain (10.0%)" in found.reasons[1]
    assert found.reasons[-1] == "Training on all rows takes about 90 s."
    alone = forecast(decision=None, lift=None, likely=None, rival=None, rivals={})
    for told, said in (
        (found, "Train tuned: it is likely to reach the goal, a lift of at least +5.0 points"),
        (forecast(decision="don't"), "Don't train tuned"),
        (forecast(decision="undecided"), "Undecided: tuned"),
        (alone, "No decision on tuned: there is no untuned candidate"),
    ):
        assert told.headline.startswith(said)
    for requests, said in ((1200, "from 1,200 requests on."), (None, "never repay the training.")):
        priced = {"training": {"seconds": 90.0, "epochs": 3.0, "money": 0.09}, "currency": "EUR"}
        reasons = forecast(**priced, break_even={"training": 0.09, "saved_per_1000": 0.1, "requests": requests}).reasons
        assert "90 s and 0.09 EUR." in reasons[-2]
        assert reasons[-1].endswith(said)
    unsaid = {"said": False, "from_rows": 700, "from_seconds": 240.0}
    floor = forecast(**unsaid)
    assert floor.headline.startswith("The score cannot be said yet. Train tuned")
    for said in ("No subset scores more than 2.0%", "700 rows, which train for about 4 min"):
        assert said in floor.reasons[2]
    wide = forecast(**unsaid | {"from_rows": None}, subsets=[{"rows": 12, "epochs": 3.0, "mean": 0.03}])
    assert "over 30 points wide, and larger subsets would not change that" in wide.reasons[2]
