"""What the trainer counts as a training's time, on a model of one number and by an injected clock."""

from __future__ import annotations

from typing import Any

import torch

from tunesmith.engines.training_protocol import ParameterGroup
from tunesmith.training.schedule import Annealed, Decisions
from tunesmith.training.settings import TrainSettings
from tunesmith.training.trainer import Trainer


class Part:
    """A batch of ten tokens, one of which is learned."""

    tokens = 10
    labels = torch.zeros(1)


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
    plan: Any = [[Part()]] * 10_000
    before = Decisions(warmup=1, validate_every=more.pop("every", 10_000), scored_rows=0, seconds=0.0)
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
