"""Learning curves, extrapolated: the truth of made-up curves is within the interval as often as it says."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from tests.evaluation.made_up_subsets import made_up
from tunesmith.evaluation.stats.learning_curve import Drawn, Floats, Subsets, draw_curves, from_angle, to_angle

SIZES = (12.0, 50.0, 100.0, 200.0)


def _subsets(means: list[float], **changes: Any) -> Subsets:
    return made_up(SIZES, means, **changes)


def _ends(values: Floats) -> tuple[float, float]:
    low, high = np.quantile(values, [0.05, 0.95])
    return float(low), float(high)


def _power(rows: float, top: float, tail: float) -> float:
    return top * (1 - (1 + rows / 15) ** -tail)


def _sigmoid(rows: float, top: float, half: float) -> float:
    return top / (1 + (half / rows) ** 1.5)


def test_the_interval_holds_made_up_curves_of_two_families() -> None:
    hits, halves = 0, []
    truths = [(_power, (top, tail)) for top in (0.7, 0.98) for tail in (0.5, 1.0)]
    truths += [(_sigmoid, (top, half)) for top in (0.7, 0.98) for half in (40.0, 160.0)]
    for seed, (family, shape) in enumerate(truths):
        drawn = draw_curves(_subsets([family(size, *shape) for size in SIZES], seed=seed))
        low, high = _ends(drawn.scores(800.0))
        hits += low <= family(800.0, *shape) <= high
        halves.append((high - low) / 2)
    assert hits >= 7
    assert np.median(halves) < 0.2, "an interval of all scores would hold everything"


def test_the_same_scores_give_the_same_curves() -> None:
    one, two = (draw_curves(_subsets([0.1, 0.3, 0.5, 0.6])) for _ in range(2))
    assert np.array_equal(one.scores(700.0), two.scores(700.0))
    assert np.array_equal(one.lifts(700.0), two.lifts(700.0))


def _width(drawn: Drawn, rows: float) -> float:
    low, high = _ends(drawn.scores(rows))
    return high - low


def test_the_interval_is_wider_far_away_and_where_few_independent_rows_were_held_out() -> None:
    means = [0.2, 0.5, 0.6, 0.7]
    plain = draw_curves(_subsets(means))
    assert _width(plain, 200.0) < _width(plain, 800.0) < _width(plain, 6400.0)
    assert _width(draw_curves(_subsets(means, each=12)), 200.0) > _width(plain, 200.0), "groups, not rows, count"


def test_a_score_that_does_not_move_is_not_expected_to() -> None:
    flat = draw_curves(_subsets([0.6, 0.6, 0.6, 0.6]))
    low, high = _ends(flat.scores(800.0))
    assert low < 0.6 < high
    assert _width(flat, 800.0) < 0.4


@pytest.mark.parametrize("right", [0.5, 0.95, 1.0])
def test_a_score_that_losses_say_nothing_about_stays_as_it_was(right: float) -> None:
    """As of long answers with a valid form: their losses are far from where a score usually rises."""
    draw = np.random.RandomState(0)
    logs = 4.6 + np.array([0.3, 0.1, 0.05, 0.0]) + 0.4 * draw.standard_normal((300, 1))
    scores = (draw.random_sample(logs.shape) < right).astype(float)
    names = [str(place) for place in range(300)]
    found = draw_curves(Subsets(SIZES, np.exp(logs), scores, np.empty((300, 0)), names)).scores(800.0)
    low, high = _ends(found)
    assert low <= scores[:, -1].mean() <= high
    assert high - low < 0.25
    assert abs(float(np.median(found)) - scores.mean()) < 0.03


def test_a_score_of_one_or_nought_has_an_interval_within_nought_and_one() -> None:
    for means in ([1.0] * 4, [0.0] * 4):
        scores = draw_curves(_subsets(means)).scores(800.0)
        assert np.isfinite(scores).all()
        low, high = _ends(scores)
        assert 0.0 <= low < high <= 1.0, "never a number without an interval"


def test_scores_that_more_rows_lower_are_not_expected_to_rise_again() -> None:
    drawn = draw_curves(_subsets([0.2, 0.1, 0.06, 0.05]))
    assert _ends(drawn.scores(800.0))[1] < 0.2


def test_the_best_of_equal_untuned_candidates_is_taken_anew_for_each_choice_of_rows() -> None:
    measured = _subsets([0.2, 0.5, 0.6, 0.7])
    draw = np.random.RandomState(5)
    two = np.stack([draw.random_sample(240) < 0.4 for _ in range(8)], axis=1).astype(float)
    many = replace(measured, untuned=two)
    assert draw_curves(many).untuned.mean() > two.mean(axis=0).max(), "rows on which another is best exist as well"


def test_without_an_untuned_candidate_there_is_no_lift() -> None:
    assert np.isnan(draw_curves(_subsets([0.2, 0.5, 0.6, 0.7], untuned=None)).lifts(800.0)).all()


@pytest.mark.parametrize("score", [0.0, 0.2, 0.5, 1.0])
def test_angles_are_undone(score: float) -> None:
    assert from_angle(to_angle(np.array([score])))[0] == pytest.approx(score)
