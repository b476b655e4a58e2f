"""What the trainer counts as time, on a model of one number and by an injected clock; what validations say."""

from __future__ import annotations

import contextlib
import math
import random
from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import torch

from tests.fabricate import training_body
from tests.said import Said
from tunesmith.core.progress import Task
from tunesmith.engines.training_protocol import ParameterGroup
from tunesmith.records.training import Decisions
from tunesmith.training.objectives import CrossEntropy
from tunesmith.training.schedule import Annealed, TrainerState, more_time
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
    assert len(state.curve) == 510, "of 600 without the pause, which counts as ten of the first tenth's steps"
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
    made, clock, _ = trainer(TrainSettings(budget=20_000), steps, plan=plan, every=15, validate=validate)
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
    state.validation = state.validation[:9]
    assert state.best == 8
    state.validation = state.validation[:8]
    assert state.best == 4
    assert TrainerState().best is None


def test_a_score_s_error_counts_rows_of_one_group_together() -> None:
    """They are right or wrong together."""
    assert mean_score([1.0, 1.0, 0.0, 0.0, 1.0, 1.0], [*"aabbcc"]) == (pytest.approx(2 / 3), pytest.approx(1 / 3))
    assert mean_score([1.0, 0.0, 1.0], [*"abc"]) == (pytest.approx(2 / 3), pytest.approx(1 / 3))
    assert mean_score([1.0, 1.0], ["a", "b"]) == (1.0, 0.0)
    assert mean_score([0.0, 1.0], ["a", "a"]) == (0.5, 0.5), "one group alone counts as rows"


@pytest.mark.parametrize(
    ("budget", "reasons", "said"),
    [
        (900.0, ["the budget is used"], "The budget held 2.0 of 5 epochs; all of them take about 15 min 50 s"),
        (900.0, ["all epochs are done", "the budget was used before"], "held 2.0 of 5 epochs"),
        (900.0, ["all epochs are done"], None),
        (None, ["all epochs are done"], None),
    ],
)
def test_which_budget_would_have_held_all_epochs(budget: float | None, reasons: list[str], said: str | None) -> None:
    decays = [{"start": 2 + place, "stop": 20 - place, "reason": reason} for place, reason in enumerate(reasons)]
    told = more_time(
        training_body(
            settings={"method": "lora", "epochs": 5, "batch": 8, "budget": budget},
            epochs=2.0,
            seconds=360.0,
            decisions={"warmup": 1, "validate_every": 10, "scored_rows": 200, "seconds": 50.0, "decays": decays},
        )
    )
    assert (told is None) == (said is None)
    assert (said or "") in (told or "")
