"""What more time would bring, read from a training's validations."""

from __future__ import annotations

import math
import random
from typing import Any

import pytest

from tunesmith.training.estimates.more_time import more_time

ROWS = 200


def _training(scores: list[float], *, reason: str = "the budget is used", seconds: float = 1.0) -> dict[str, Any]:
    """A training that validated after every tenth step; its learning rate fell over the last two validations."""
    steps = 10 * len(scores)
    return {
        "settings": {"schedule": "wsd"},
        "validation": [{"step": 10 * (n + 1), "loss": 1 / (n + 1), "score": s} for n, s in enumerate(scores)],
        "curve": [{"step": n + 1, "seconds": seconds} for n in range(steps)],
        "decisions": {"decays": [{"start": steps - 20, "stop": steps, "reason": reason}]},
        "score": {"metric": "exact_match", "rows": ROWS},
        "ended": reason,
    }


def _rising(gain: float, noise: float = 0.0, seed: int = 0, count: int = 16) -> list[float]:
    """Scores that rise by `gain` with each doubling of the time, until the learning rate falls."""
    draw = random.Random(seed)
    rising = [0.4 + gain * math.log2(n + 1) + draw.gauss(0, noise) for n in range(count - 2)]
    return [*rising, rising[-1] + 0.02, rising[-1] + 0.03]


def test_the_gain_of_twice_the_time_is_the_slope() -> None:
    found, slow = more_time(_training(_rising(0.05))), more_time(_training(_rising(0.05), seconds=7.5))
    assert found is not None
    assert slow is not None
    assert slow["gain"] == pytest.approx(found["gain"]), "steps of any length give the same"
    assert found["gain"]["mean"] == pytest.approx(0.05)
    assert found["gain"]["low"] > 0
    assert found["text"].startswith("Validation was still improving: twice the time would bring about +5.0 points")


def test_the_interval_holds_the_gain_as_often_as_it_says() -> None:
    """Of a gain, and of none."""
    for gain in (0.03, 0.0):
        held = 0
        for seed in range(40):
            found = more_time(_training(_rising(gain, 0.02, seed)))
            assert found is not None
            held += found["gain"]["low"] <= gain <= found["gain"]["high"]
            assert ("is not clear" in found["text"]) == (found["gain"]["low"] <= 0)
        assert 32 <= held <= 40


def test_a_gain_stays_within_the_score_and_is_rounded_without_a_minus() -> None:
    rising = [0.85, 0.87, 0.9, 0.92, 0.94, 0.95, 0.96, 0.97, 0.98, 0.985, 0.985, 0.99]
    flat = [0.0, 0.0, 0.05, 0.0, 0.02, 0.05, 0.0, 0.03, 0.0, 0.0]
    high, low, nothing = (more_time(_training(scores)) for scores in (rising, flat, _rising(-1e-5)))
    assert high is not None
    assert high["gain"]["high"] <= 0.01 + 1e-9
    assert low is not None
    assert low["gain"]["low"] == -0.05
    assert nothing is not None
    assert -0.0005 < nothing["gain"]["mean"] < 0
    assert "twice the time would bring +0.0 points" in nothing["text"]
    assert more_time(_training([])) is None


def test_a_longer_budget_brings_nothing_where_all_its_epochs_are_done() -> None:
    training = _training(_rising(0.05), reason="all epochs are done")
    found = more_time({**training, "settings": {"schedule": "wsd", "budget": 900, "epochs": 40}})
    assert found is not None
    assert found["gain"] is None
    assert "after 40 epochs, the most that a budget reads" in found["text"]
    assert "`epochs: 80` with `schedule: wsd`" in found["text"]
    epochs = more_time({**training, "settings": {"schedule": "wsd", "budget": None, "epochs": 40}})
    assert epochs is not None
    assert epochs["gain"] is not None, "twice the epochs take twice the time"


def _by_probability(*probabilities: float | None) -> dict[str, Any]:
    """A training without scores; earlier records have losses alone."""
    points = enumerate(probabilities, 1)
    told = [{"step": 10 * n, "loss": 1.0} | ({} if each is None else {"probability": each}) for n, each in points]
    return {**_training([0.0] * len(probabilities)), "validation": told}


# Without a decay of its own, every validation looks like one at a constant learning rate.
FELL = "The learning rate fell during the whole training"


@pytest.mark.parametrize(
    ("training", "said", "gains"),
    [
        (_training(_rising(0.05), reason="no better score in 4 validations"), "Validation stopped the training", False),
        (_training([0.5, 0.6, 0.7]), "too few to say", False),
        (_training([1.0] * 12), "Every validation row was right", False),
        (_training([0.5] * 12), "not clear: twice the time would bring +0.0 points", True),
        ({**_training(_rising(0.05)), "settings": {"schedule": "cosine"}, "decisions": None}, FELL, False),
        ({**_training([0.5] * 12), "settings": {"schedule": "linear"}, "decisions": None}, FELL, False),
        (_by_probability(0.2, 0.8, 0.9), "still rose at the end, from 80.0% to 90.0%", False),
        (_by_probability(0.2, 0.9, 0.8), "no longer rose", False),
        (_by_probability(0.9), "too few to say", False),
        (_by_probability(None, None, 0.9), "too few to say", False),
    ],
)
def test_what_else_is_said(training: dict[str, Any], said: str, gains: bool) -> None:
    found = more_time(training)
    assert found is not None
    assert said in found["text"]
    assert (found["gain"] is not None) == gains
