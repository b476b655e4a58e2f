"""What a forecast says."""

from __future__ import annotations

from typing import Any

import pytest

from tunesmith.evaluation.forecasting.wording import headline, reasons
from tunesmith.evaluation.report.wording import money


def _found(needed: tuple[int | None, int | None, int | None], **changes: Any) -> dict[str, Any]:
    """A forecast whose goal takes so many rows: low, median, high."""
    training = {"seconds": 90.0, "epochs": 3.0, "money": None}
    ends = {
        name: rows and {"rows": rows, **training} for name, rows in zip(("low", "median", "high"), needed, strict=True)
    }
    interval = {"median": 0.5, "low": 0.4, "high": 0.6}
    return {
        "name": "tuned", "metric": "exact_match", "rows": 400, "score": interval, "lift": interval, "confidence": 0.9,
        "rival": "plain", "rival_named": False, "rivals": {"plain": 0.1}, "goal": 0.05, "likely": 0.5,
        "subsets": [{"rows": 12, "epochs": 3.0, "mean": 0.2}], "needed": {**ends, "never": 0.75}, "within": None,
        "training": training, "pays": None, "decision": "train", **changes,
    }  # fmt: skip


def _said(*given: Any, **changes: Any) -> str:
    return " ".join(reasons(_found(*given, **changes)))


def test_as_few_rows_as_the_smallest_subset_has_are_an_upper_bound() -> None:
    assert "takes about 90 rows (90% interval 30 to 700)." in _said((30, 90, 700))
    assert "takes about 90 rows (90% interval at most 12 to 700)." in _said((12, 90, 700))
    assert "takes at most 12 rows (90% interval at most 12 to 40)." in _said((12, 12, 40))

    assert "with 75.0% probability; at best it takes 12 or fewer." in _said((12, None, None))
    assert "with 75.0% probability; at best it takes 30." in _said((30, None, None))


def test_a_decision_is_about_the_goal_and_not_about_running_costs() -> None:
    """Which may be repaid where the goal is not reached, and never repaid where it is."""
    goal = "reach the goal, a lift of at least +5.0 points"
    found = _found((30, 90, 700))
    assert headline(found) == f"Train tuned: it is likely to {goal}."
    assert headline({**found, "decision": "don't"}) == f"Don't train tuned on these rows: it is unlikely to {goal}."
    assert headline({**found, "decision": "undecided"}) == f"Undecided: tuned may {goal}, or not."
    assert headline({**found, "decision": None}).startswith("No decision on tuned: there is no untuned candidate")
    assert "That is a lift of +50.0 points (90% interval +40.0 to +60.0) over plain, " in _said((30, 90, 700))


@pytest.mark.parametrize(("amount", "said"), [(4e-5, "0.00004"), (1e-9, "0.000000001"), (0, "0.00"), (0.053, "0.053")])
def test_little_money_is_written_out(amount: float, said: str) -> None:
    assert money(amount) == said


def test_a_rival_s_score_is_said_as_it_counts_where_answers_are_few() -> None:
    assert "on the held-out rows (10.0%)." in _said((30, 90, 700))
    assert "on the held-out rows (10.0%)." in _said((30, 90, 700), rival_counted=0.1015)
    few = _said((30, 90, 700), rivals={"plain": 0.0}, rival_counted=0.5 / 17)
    assert "on the held-out rows (0%, counted as 2.9%: with half a right and half a wrong answer more)." in few


def test_out_of_reach_is_said_of_the_training_s_length() -> None:
    assert "is out of reach of more rows of this kind with 75.0% probability" in _said((None, None, None))
    assert "of this kind within a training of 15 min 0 s with 75.0%" in _said((None, None, None), within=900.0)
    assert "to no number of rows within a training of 15 min 0 s (" in _said((30, 90, None), within=900.0)


def test_a_training_s_time_is_no_upper_bound() -> None:
    assert "Training on all rows takes about 90 s: 3.0 epochs." in _said((30, 90, 700))
    assert "Training on all rows takes about 90 s: about 3.0 epochs." in _said((30, 90, 700), within=90.0)


@pytest.mark.parametrize(
    ("daily", "said"),
    [(121.24, "from 122 requests a day on."), (121.0000000001, "from 121 requests"), (0.4, "from 1 request a day on.")],
)
def test_money_has_a_currency_and_so_many_requests_repay_the_training(daily: float, said: str) -> None:
    pays = {"unit": "money", "days": 30.0, "training": 0.053, "tuned_per_1000": 0.0061, "rival_per_1000": 0.021,
            "requests_a_day": daily}  # fmt: skip
    training = {"seconds": 90.0, "epochs": 3.0, "money": 0.053}
    found = _said((30, 90, 700), pays=pays, training=training, currency="EUR")
    assert "takes about 90 s and 0.053 EUR: " in found
    assert "1,000 requests cost 0.0061 EUR, with plain 0.021 EUR: " in found
    assert said in found


def test_a_larger_budget_is_advised_only_where_it_measures_more() -> None:
    undecided = {"decision": "undecided", "seconds": 40.0}
    assert "A larger budget (--budget) trains larger subsets and asks more rows" in _said((30, 90, 700), **undecided)
    complete = _said((30, 90, 700), **undecided, complete=True)
    assert "A larger budget (--budget) does not narrow it: train, or collect more rows." in complete


def test_rows_that_are_missing_are_compared_with_those_of_the_training() -> None:
    assert "(90% interval 30 to 900), 200 more than the training has." in _said((30, 600, 900))


def test_a_training_that_costs_nothing_needs_no_repayment() -> None:
    pays = {"unit": "money", "days": 30.0, "training": 0.0, "tuned_per_1000": 0.0, "rival_per_1000": 0.0,
            "requests_a_day": None}  # fmt: skip
    said = _said((30, 90, 700), pays=pays)
    assert "The training costs nothing, so nothing has to be repaid." in said
    assert "never repay" not in said


def test_costs_that_cannot_be_compared() -> None:
    pays = {"unit": "seconds", "days": 30.0, "training": 90.0, "tuned_per_1000": 5.0, "rival_per_1000": None,
            "requests_a_day": None}  # fmt: skip
    said = _said((30, 90, 700), pays=pays)
    assert "What 1,000 requests cost with tuned and with plain cannot be compared" in said
