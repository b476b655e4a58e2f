"""What the scores of subsets say about a whole training."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from tests.evaluation.made_up_subsets import made_up
from tunesmith.evaluation.forecasting.extrapolate import Whole, decide, extrapolate, worth
from tunesmith.evaluation.stats.learning_curve import Subsets

SIZES = (12.0, 50.0, 100.0, 200.0)


def _measured(means: list[float], untuned: float | None, **changes: Any) -> Subsets:
    return made_up(SIZES, means, untuned=untuned, **changes)


def _whole(rows: int = 800, test: int = 300) -> Whole:
    return Whole(rows, lambda _rows: 1.0, [str(place) for place in range(test)])


def test_a_clear_lift_a_clear_loss_and_neither() -> None:
    rising = [0.3, 0.7, 0.8, 0.85]
    assert extrapolate(_measured(rising, 0.3), _whole(), 0.05)["decision"] == "train"
    assert extrapolate(_measured(rising, 0.99), _whole(), 0.05)["decision"] == "don't"
    close = extrapolate(_measured([0.3, 0.6, 0.68, 0.72], 0.75), _whole(), 0.02)
    assert close["decision"] == "undecided"
    assert close["lift"]["low"] < 0.02 < close["lift"]["high"]


def test_an_untuned_candidate_that_is_always_right_leaves_nothing_to_gain() -> None:
    found = extrapolate(_measured([0.9, 1.0, 1.0, 1.0], 1.0), _whole(), 0.02)
    assert found["decision"] == "don't"
    assert found["needed"]["median"] is None
    assert found["needed"]["never"] > 0.9


def test_scores_of_nought_are_forecast_from_the_losses() -> None:
    def after(logs: list[float], rows: int) -> dict[str, Any]:
        measured = _measured([0.0] * 4, 0.4)
        spread = np.log(measured.losses) - np.log(measured.losses).mean(axis=0)
        return extrapolate(replace(measured, losses=np.exp(0.3 * spread + np.array(logs))), _whole(rows), 0.05)

    falling, still = after([3.6, 2.9, 2.3, 1.7], 2900), after([3.6, 3.5, 3.48, 3.47], 2900)
    assert falling["score"]["high"] > 0.4
    assert falling["decision"] != "don't"
    assert still["score"]["median"] < 0.1
    assert still["decision"] == "don't"


def test_rows_that_the_goal_takes() -> None:
    measured = _measured([0.1, 0.3, 0.4, 0.5], 0.6)
    found = extrapolate(measured, _whole(400), 0.05)["needed"]
    assert found["low"] <= found["median"]
    assert found["median"] > 400, "at 200 rows it is 15 points below the goal"
    further = extrapolate(measured, _whole(400), 0.15)["needed"]["median"]
    assert further is None or further > found["median"]


def test_a_goal_that_the_smallest_subset_reaches_takes_no_more_rows() -> None:
    """The largest subset is worth 200 rows: rows are looked for below it, and in rows, not in what they are worth."""
    measured = _measured([0.6, 0.7, 0.8, 0.85], 0.3)
    three_times = Whole(800, lambda _rows: 3.0, [str(place) for place in range(300)])
    assert extrapolate(measured, three_times, 0.05)["needed"] == {"low": 12, "median": 12, "high": 12, "never": 0.0}


def test_the_curve_begins_before_the_smallest_subset() -> None:
    """Whose twelve rows, read three times, are worth more than twice as many."""
    measured = replace(_measured([0.3, 0.6, 0.7, 0.75], 0.5), sizes=tuple(worth(rows, 3.0) for rows in SIZES))
    curve = extrapolate(measured, _whole(), 0.05)["curve"]
    assert curve[0]["rows"] == SIZES[0] / 2
    assert curve[-1]["rows"] == 3200


def test_fewer_test_rows_or_groups_widen_the_interval() -> None:
    measured = _measured([0.3, 0.6, 0.7, 0.75], 0.5)

    def width(whole: Whole) -> float:
        score = extrapolate(measured, whole, 0.05)["score"]
        return float(score["high"] - score["low"])

    assert width(_whole(test=30)) > 1.05 * width(_whole(test=3000))
    grouped = Whole(800, lambda _rows: 1.0, [str(place // 30) for place in range(300)])
    rows_of_groups = _measured([0.3, 0.6, 0.7, 0.75], 0.5, each=30)
    alone = extrapolate(rows_of_groups, _whole(), 0.05)["score"]
    together = extrapolate(rows_of_groups, grouped, 0.05)["score"]
    assert together["high"] - together["low"] > alone["high"] - alone["low"]


def test_a_candidate_that_was_asked_few_rows_is_not_known_to_be_wrong_always() -> None:
    measured = _measured([0.3, 0.5, 0.55, 0.6], 0.0)
    few = np.where(np.arange(240)[:, None] < 4, measured.untuned, np.nan)
    sure, unsure = (extrapolate(replace(measured, untuned=each), _whole(), 0.05) for each in (measured.untuned, few))
    assert unsure["lift"]["low"] < sure["lift"]["low"]
    assert unsure["lift"]["high"] <= sure["lift"]["high"] + 0.02
    joined = replace(measured, untuned=np.hstack([few, np.full((240, 1), 0.4)]))
    assert abs(extrapolate(joined, _whole(), 0.05)["lift"]["median"] - sure["lift"]["median"] + 0.4) < 0.05


def test_one_subset_gives_a_wide_interval() -> None:
    four = _measured([0.3, 0.5, 0.55, 0.6], 0.4)
    one = replace(four, sizes=SIZES[:1], losses=four.losses[:, :1], scores=four.scores[:, :1])
    wide, narrow = (extrapolate(each, _whole(), 0.05)["score"] for each in (one, four))
    assert wide["high"] - wide["low"] > 1.5 * (narrow["high"] - narrow["low"])
    assert wide["low"] < 0.6 < wide["high"]


def test_without_an_untuned_candidate_there_is_a_score_and_no_decision() -> None:
    found = extrapolate(_measured([0.3, 0.6, 0.7, 0.75], None), _whole(), 0.05)
    assert found["score"]["low"] < found["score"]["median"] < found["score"]["high"]
    assert [found[key] for key in ("lift", "decision", "likely", "needed")] == [None] * 4
    json.dumps(found, allow_nan=False)


def test_more_epochs_are_worth_more_rows_ever_less_so() -> None:
    assert worth(100, 0.5) == 50
    assert worth(100, 1.0) == 100
    gains = [worth(100, epochs + 1) - worth(100, epochs) for epochs in range(1, 10)]
    assert gains == sorted(gains, reverse=True)
    assert 100 > gains[0] > gains[-1] > 0
    assert worth(200, 3) == pytest.approx(2 * worth(100, 3))


def test_decisions_are_as_sure_as_the_interval() -> None:
    assert [decide(likely) for likely in (0.0, 0.1, 0.5, 0.9, 1.0)] == ["don't", "don't", "undecided", "train", "train"]
