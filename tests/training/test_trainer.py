"""What the trainer counts as time, on a model of one number and by an injected clock; what validations say."""

from __future__ import annotations

import contextlib
import math
import random
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import pytest
import torch

from tests.fabricate import training_body
from tests.said import Said
from tunesmith.core.progress import Task
from tunesmith.engines.training_protocol import ParameterGroup
from tunesmith.records.training import Decisions, TrainingBody
from tunesmith.training.estimates.more_time import MoreTime, more_time
from tunesmith.training.objectives import CrossEntropy
from tunesmith.training.schedule import Annealed, TrainerState
from tunesmith.training.scoring import mean_score
from tunesmith.training.settings import TrainSettings
from tunesmith.training.trainer import Trainer


class Part:
    """A batch of so many tokens, one of which is learned."""

    labels = torch.zeros(1)

    def __init__(self, tokens: int = 10) -> None:
        self.tokens = tokens


class OneNumber:
    """A trainable model whose loss is the square of a number."""

    device = torch.device("cpu")

    def __init__(self, clock: Clock, steps: list[float]) -> None:
        """steps: how long the first ones take; the others take as long as the last of these."""
        self.number, self._clock, self._steps = torch.ones(1, requires_grad=True), clock, steps

    def parameter_groups(self) -> list[ParameterGroup]:
        return [ParameterGroup([self.number])]

    def loss(self, _batch: Part, _weights: object) -> torch.Tensor:
        self._clock.now += self._steps.pop(0) if len(self._steps) > 1 else self._steps[0]
        return (self.number**2).sum()

    def collect_gradients(self) -> None:
        pass

    def parameters_changed(self) -> None:
        pass

    def flops(self, _batch: Part) -> float:
        return 1.0

    def peak_flops(self, _batch: Part) -> float:
        return 1.0


class Clock:
    """Seconds that go on only where something takes time."""

    now = 0.0

    def __call__(self) -> float:
        return self.now


class SlowDisk:
    """Checkpoints that take so long to write. states: what they hold."""

    def __init__(self, clock: Clock, seconds: float) -> None:
        self._clock, self._seconds, self.states = clock, seconds, list[dict[str, Any]]()

    def load(self) -> tuple[None, list[str]]:
        return None, []

    def save(self, _step: int, _tensors: object, state: dict[str, Any]) -> None:
        self._clock.now += self._seconds
        self.states.append(state)


def trainer(
    settings: TrainSettings, steps: list[float], *, writing: float = 0.0, **more: Any
) -> tuple[Trainer, Clock, SlowDisk]:
    """A trainer within a budget whose steps take so long, the last of these times from then on."""
    clock = Clock()
    model: Any = OneNumber(clock, steps)
    disk: Any = SlowDisk(clock, writing)
    plan: Any = more.pop("plan", [[Part()]] * 10_000)
    before = Decisions(warmup=1, validate_every=more.pop("every", len(plan)), scored_rows=0, seconds=0.0)
    schedule = Annealed(len(plan), settings, before, None, budget=settings.budget)
    more |= {"objective": CrossEntropy(), "schedule": schedule, "clock": clock}
    return Trainer(model, plan, settings, disk, **more), clock, disk


def test_a_budget_counts_what_checkpoints_take() -> None:
    settings = TrainSettings(budget=100, checkpoint_seconds=30)
    made, clock, disk = trainer(settings, [1.0], writing=10.0)
    state = made.run()
    assert 100 <= state.seconds <= 1.05 * 100 + 10, "the last checkpoint comes on top"
    assert state.seconds == clock.now
    assert disk.states[-1]["seconds"] == state.seconds - 10, "a checkpoint does not hold its own time"
    assert len(disk.states) >= 3


def test_a_pause_uses_up_no_budget() -> None:
    said = Said()
    made, clock, disk = trainer(TrainSettings(budget=1200), [*[2.0] * 19, 1202.0, 2.0], progress=said)
    state = made.run()
    assert len(state.curve) == 588, "of 600 without the pause, which counts as ten steps"
    assert state.paused == clock.now - state.seconds == 1182
    assert [line for line in said.lines if "pause" in line] == [
        "step 20 took 1202 s, more than 10 times as long as the ones before it: 1182 s count as a pause, and not as "
        "training"
    ]
    assert disk.states[-1]["paused"] == 1182


def test_a_machine_that_has_become_slow_does_not_pause() -> None:
    """Or a training on it would go on for as long as it likes. The first slow step alone is taken for a pause."""
    made, clock, _ = trainer(TrainSettings(budget=1200), [*[2.0] * 20, 100.0])
    state = made.run()
    assert state.paused == 80
    assert clock.now <= 1.05 * 1200 + 2 * 100 + 80


def test_long_rows_and_validations_are_no_pauses() -> None:
    clocks, took = list[Clock](), iter([300.0, 200.0, 6000.0, *[200.0] * 100])

    def validate() -> dict[str, float]:
        clocks[0].now += next(took)
        return {"loss": 1.0, "probability": 0.5}

    plan, steps = [*[[Part(10)]] * 9, [Part(1000)]] * 100, [*[1.0] * 9, 100.0] * 100
    made, clock, _ = trainer(TrainSettings(budget=20_000, patience=100), steps, plan=plan, every=15, validate=validate)
    clocks.append(clock)
    state = made.run()
    assert len(state.validation) > 10
    assert 2000 < state.paused < 4000, "a pause in a validation is one"


def test_progress_is_that_of_what_ends_first() -> None:
    """Few rows are read as often as a budget does long before it ends: the time left is not the rest of the budget."""

    class Counted(Said):
        @contextlib.contextmanager
        def task(self, name: str, total: float) -> Iterator[Task]:
            with super().task(name, total) as task:
                task.advance = lambda more=1.0: shares.append(more / total)  # type: ignore[method-assign]
                yield task

    for budget, steps in ((1000, 40), (1000, 10_000)):
        shares = list[float]()
        made, _, _ = trainer(TrainSettings(budget=budget), [1.0], plan=[[Part()]] * steps, progress=Counted())
        state = made.run()
        assert sum(shares) == pytest.approx(1.0, abs=0.01)
        half = sum(shares[: state.step // 2 + 1])
        assert half == pytest.approx(0.5, abs=0.02), f"{steps} steps"


# Which validation's weights are kept


ROWS = 100


def _state(points: Sequence[tuple[float, float]], rows: int = ROWS) -> TrainerState:
    """A training with these scores and probabilities of the labels, of so many rows."""
    return TrainerState(
        validation=[
            {"step": step, "probability": each, "score": score, "score_error": math.sqrt(score * (1 - score) / rows)}
            for step, (score, each) in enumerate(points)
        ]
    )


def test_a_score_that_is_higher_by_chance_gives_way_to_a_higher_probability() -> None:
    """Scores of a training on SNIPS, of which the highest was kept, before the rate fell."""
    losses = [(0.57, 0.0771), (0.84, 0.0352), (0.9, 0.0328), (0.89, 0.0294), (0.81, 0.0345), (0.87, 0.0251)]
    points = [(score, math.exp(-loss)) for score, loss in losses]
    assert _state(points).best == 5
    assert _state(points, rows=10_000).best == 2, "of many rows the difference is none of chance"
    assert _state([(0.9, 0.1), (0.8, 0.5)]).best == 0, "a score below the error never takes the place of the best"
    assert _state([(0.8, 0.5), (0.9, 0.1)]).best == 1


def test_among_equal_scores_the_probability_decides() -> None:
    """A metric that is 0 or 100% from the start decides nothing."""
    for flat in (0.0, 1.0):
        assert _state([(flat, 0.5), (flat, 0.8), (flat, 0.7)]).best == 1
    rising = [(1.0, 0.5), (1.0, 0.6), (1.0, 0.7), (1.0, 0.8)]
    assert _state(rising).exhausted(2) is None
    assert _state([*rising, (1.0, 0.8), (1.0, 0.8)]).exhausted(2) == "no better score in 2 validations"


def test_the_best_is_one_whose_weights_are_held() -> None:
    """Each validation replaces the best one before it or does not; an earlier one never comes back."""
    drawn = random.Random(5)
    for _ in range(50):
        points = [(drawn.choice((0.0, 0.5, 0.8, 0.85, 0.9, 1.0)), drawn.random()) for _ in range(12)]
        kept = [_state(points[: end + 1]).best for end in range(len(points))]
        for end, best in enumerate(kept):
            assert best == end or best == kept[end - 1]
            assert best is not None
            highest = max(score for score, _ in points[: end + 1])
            assert points[best][0] >= highest - math.sqrt(highest * (1 - highest) / ROWS)


def test_without_scores_the_highest_probability_of_the_labels_counts() -> None:
    """Of a training that read 200 requests for music 20 times, with the mean probability in percent. Its loss rose."""
    found = [91.03, 94.50, 94.36, 94.59, 95.18, 94.06, 94.55, 94.40, 95.41, 95.99]
    state = TrainerState(validation=[{"loss": 0.01 * n, "probability": each} for n, each in enumerate(found)])
    assert state.best == 9
    assert state.exhausted(4) is None
    state.validation = state.validation[:9]
    assert state.best == 8
    state.validation = state.validation[:8]
    assert state.best == 4
    assert state.exhausted(3) == "no higher probability of the expected answers in 3 validations"
    assert TrainerState().best is None


def test_a_score_s_error_counts_rows_of_one_group_together() -> None:
    """They are right or wrong together."""
    assert mean_score([1.0, 1.0, 0.0, 0.0, 1.0, 1.0], [*"aabbcc"]) == (pytest.approx(2 / 3), pytest.approx(1 / 3))
    assert mean_score([1.0, 0.0, 1.0], [*"abc"]) == (pytest.approx(2 / 3), pytest.approx(1 / 3))
    assert mean_score([1.0, 1.0], ["a", "b"]) == (1.0, 0.0)
    assert mean_score([0.0, 1.0], ["a", "a"]) == (0.5, 0.5), "one group alone counts as rows"


def test_patience_lasts_while_the_score_rises_within_its_error() -> None:
    rising = [(0.50, 0.95), (0.51, 0.94), (0.52, 0.93), (0.53, 0.92), (0.54, 0.91)]
    assert _state(rising).best == 4
    assert _state(rising).exhausted(4) is None
    later = [*rising, (0.54, 0.90), (0.53, 0.90), (0.52, 0.89)]
    assert _state(later).exhausted(4) is None
    assert _state([*later, (0.54, 0.88)]).exhausted(4) == "no better score in 4 validations"


# What more time would bring, read from a training's validations


def _settings(**given: object) -> dict[str, object]:
    return {"method": "lora", "epochs": 1, "batch": 8, **given}


def _training(
    scores: list[float], *, reason: str = "the budget is used", seconds: float = 1.0, **changes: object
) -> TrainingBody:
    """A training that validated after every tenth step; its learning rate fell over the last two validations."""
    steps = 10 * len(scores)
    step = {"loss": 1.0, "learning_rate": 1e-3, "tokens": 1, "seconds": seconds}
    decays = [{"start": max(0, steps - 20), "stop": max(1, steps), "reason": reason}]
    stated = {
        "settings": _settings(schedule="wsd"),
        "validation": [{"step": 10 * (n + 1), "loss": 1 / (n + 1), "score": s} for n, s in enumerate(scores)],
        "curve": [{"step": n + 1, **step} for n in range(steps)],
        "decisions": {"warmup": 1, "validate_every": 10, "scored_rows": 200, "seconds": 0.0, "decays": decays},
        "score": {"metric": "exact_match", "rows": 200},
        "ended": reason,
    }
    return training_body(**{**stated, **changes})


def _rising(gain: float, noise: float = 0.0) -> list[float]:
    """Scores that rise by `gain` with each doubling of the time, until the learning rate falls."""
    rising = [0.4 + gain * math.log2(n + 1) + noise * (-1) ** n for n in range(14)]
    return [*rising, rising[-1] + 0.02, rising[-1] + 0.03]


def _more(training: TrainingBody) -> MoreTime:
    found = more_time(training)
    assert found is not None
    return found


@pytest.mark.parametrize(
    ("noise", "gain"),
    [
        (0.0, {"mean": 0.05, "low": 0.043715, "high": 0.056285}),  # not known better than to one row of 200
        (0.02, {"mean": 0.042321, "low": 0.014669, "high": 0.069973}),
    ],
)
def test_the_gain_of_twice_the_time_is_the_slope(noise: float, gain: dict[str, float]) -> None:
    for seconds in (1.0, 7.5):  # steps of any length give the same
        found = _more(_training(_rising(0.05, noise), seconds=seconds))
        assert found.gain is not None
        assert found.gain.model_dump() == pytest.approx(gain, abs=1e-6)
        assert found.validations == 10
        mean = f"{100 * gain['mean']:.1f}"
        assert found.text.startswith(f"Validation was still improving: twice the time would bring about +{mean} po")


def test_a_gain_stays_within_the_score_and_is_rounded_without_a_minus() -> None:
    rising = [0.85, 0.87, 0.9, 0.92, 0.94, 0.95, 0.96, 0.97, 0.98, 0.985, 0.985, 0.99]
    flat = [0.0, 0.0, 0.05, 0.0, 0.02, 0.05, 0.0, 0.03, 0.0, 0.0]
    high, low, nothing = (_more(_training(scores)) for scores in (rising, flat, _rising(-1e-5)))
    assert high.gain is not None
    assert low.gain is not None
    assert nothing.gain is not None
    assert high.gain.high <= 0.01 + 1e-9
    assert low.gain.low == -0.05
    assert -0.0005 < nothing.gain.mean < 0
    assert "twice the time would bring +0.0 points" in nothing.text
    assert more_time(_training([])) is None


def test_a_longer_budget_brings_nothing_where_all_its_epochs_are_done() -> None:
    done = partial(_training, _rising(0.05), reason="all epochs are done")
    found = _more(done(settings=_settings(schedule="wsd", budget=900, epochs=40)))
    assert found.gain is None
    assert "after 40 epochs, the most that a budget reads" in found.text
    assert "`epochs: 80` with `schedule: wsd`" in found.text
    epochs = _more(done(settings=_settings(schedule="wsd", budget=None, epochs=40)))
    assert epochs.gain is not None, "twice the epochs take twice the time"


def _by_probability(*probabilities: float | None) -> TrainingBody:
    """A training without scores; earlier records have losses alone."""
    points = enumerate(probabilities, 1)
    told = [{"step": 10 * n, "loss": 1.0} | ({} if each is None else {"probability": each}) for n, each in points]
    return _training([0.0] * len(probabilities), validation=told)


# Without a decay of its own, every validation looks like one at a constant learning rate.
FELL = "The learning rate fell during the whole training"


@pytest.mark.parametrize(
    ("training", "said", "gains"),
    [
        (_training(_rising(0.05), reason="no better score in 4 validations"), "Validation stopped the training", False),
        (_training([0.5, 0.6, 0.7]), "too few to say", False),
        (_training([1.0] * 12), "Every validation row was right", False),
        (_training([0.5] * 12), "not clear: twice the time would bring +0.0 points", True),
        (_training(_rising(0.05), settings=_settings(schedule="cosine"), decisions=None), FELL, False),
        (_training([0.5] * 12, settings=_settings(schedule="linear"), decisions=None), FELL, False),
        (_by_probability(0.2, 0.8, 0.9), "still rose at the end, from 80.0% to 90.0%", False),
        (_by_probability(0.2, 0.9, 0.8), "no longer rose", False),
        (_by_probability(0.9), "too few to say", False),
        (_by_probability(None, None, 0.9), "too few to say", False),
    ],
)
def test_what_else_is_said(training: TrainingBody, said: str, gains: bool) -> None:
    found = _more(training)
    assert said in found.text
    assert (found.gain is not None) == gains
