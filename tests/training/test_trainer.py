"""What the trainer counts as a training's time, on a model of one number and by an injected clock."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from tests.said import Said
from tunesmith.core.progress import Task
from tunesmith.engines.training_protocol import ParameterGroup
from tunesmith.training.schedule import Annealed, Decisions
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

    def loss(self, _batch: Part, _objective: object, _divisor: float) -> torch.Tensor:
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
    return Trainer(model, plan, settings, disk, schedule=schedule, clock=clock, **more), clock, disk


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
