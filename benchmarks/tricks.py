"""Changes of a training that the product does not have, to be screened by `study.py` before any code of theirs is kept.

- twice: the request stands twice in the prompt, in training and in use (Kukić et al. 2026).
- swapped: rows more, with values of other rows in the place of their own; each epoch reads twice as many rows.
- averaged: the mean of the weights after 70, 80, 90 and 100% of the steps.
- dft: each label's loss is weighted by its probability (Wu et al. 2025, "On the Generalization of SFT").
- dropped: at each step a tenth of the entries of all A counts as zero, the same for all its tokens (DropConnect, Wan et
  al. 2013): a dropout on the adapter.
"""

from __future__ import annotations

import json
import random
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, NamedTuple
from unittest.mock import patch

import torch

from leakage import Row
from tasks import Split, Task
from tunesmith.engines.training_protocol import TrainableModel
from tunesmith.training.objectives import Objective
from tunesmith.training.schedule import TrainerState
from tunesmith.training.steps import gradients, parameters

TRICKS = ("twice", "swapped", "averaged", "dft", "dropped")
_DROPPED = 0.1
_AVERAGED = (0.7, 0.8, 0.9, 1.0)
Watch = Callable[[TrainerState, TrainableModel], None]


class Prepared(NamedTuple):
    """A task and its rows as a trick has them."""

    task: Task
    split: Split
    asked: Sequence[Row]


def prepare(trick: str, task: Task, split: Split, asked: Sequence[Row]) -> Prepared:
    """The rows as the trick has them."""
    if trick == "twice":
        double: Callable[[Row], Row] = lambda row: (f"{row[0]}\n\n{row[0]}", row[1])  # noqa: E731
        made = Split(tuple(map(double, split.train)), tuple(map(double, split.held)))
        return Prepared(replace(task, rows=tuple(map(double, task.rows))), made, [double(row) for row in asked])
    if trick == "swapped":
        return Prepared(task, split._replace(train=(*split.train, *_swapped(split.train))), asked)
    return Prepared(task, split, asked)


def _swapped(rows: Sequence[Row]) -> Iterator[Row]:
    """A copy of each row whose answer is an object, with values that its request says replaced by those of others."""
    values, drawn = defaultdict[str, list[str]](list), random.Random("swapped")
    for request, answer in rows:
        for key, value in _texts(answer):
            if value in request:
                values[key].append(value)
    for request, answer in rows:
        asked, said = request, answer
        for key, value in _texts(answer):
            if asked.count(value) == 1 and said.count(json.dumps(value, ensure_ascii=False)) == 1:
                other = drawn.choice(values[key])
                asked = asked.replace(value, other)
                said = said.replace(json.dumps(value, ensure_ascii=False), json.dumps(other, ensure_ascii=False))
        if asked != request:
            yield asked, said


def _texts(answer: str) -> list[tuple[str, str]]:
    """Keys and texts of an answer that is an object, and of the objects in it."""
    try:
        found = json.loads(answer)
    except ValueError:
        return []
    places = [found, *(each for each in found.values() if isinstance(each, dict))] if isinstance(found, dict) else []
    return [(key, value) for place in places for key, value in place.items() if isinstance(value, str) and value]


class _ByProbability(Objective):
    def loss(self, batch: Any, log_probabilities: torch.Tensor, reference: Any, divisor: float) -> torch.Tensor:
        return -(log_probabilities.detach().exp() * log_probabilities).sum() / divisor


def _with_dropout(seed: int = 0) -> Callable[..., float]:
    """Gradients of a step in which some entries of A are zero. A is the first of the groups, B the second (LoRA+)."""
    random = torch.Generator().manual_seed(seed)

    def dropped(model: TrainableModel, *step: Any) -> float:
        (inner,) = model.parameter_groups()[0].tensors
        with torch.no_grad():
            whole, kept = inner.clone(), (torch.rand(inner.shape, generator=random) >= _DROPPED) / (1 - _DROPPED)
            inner.mul_(kept)
            model.parameters_changed()
        loss = gradients(model, *step)
        with torch.no_grad():
            inner.copy_(whole)
            assert inner.grad is not None
            inner.grad.mul_(kept)
            model.parameters_changed()
        return loss

    return dropped


@contextmanager
def applied(trick: str, steps: int) -> Iterator[Watch | None]:
    """While a training of so many steps runs. Gives what watches it."""
    if trick == "dft":
        with patch("tunesmith.training.train.objective_of", lambda _: _ByProbability()):
            yield None
        return
    if trick == "dropped":
        with patch("tunesmith.training.trainer.gradients", _with_dropout()):
            yield None
        return
    marks, held = {round(share * steps) for share in _AVERAGED}, list[list[torch.Tensor]]()

    @torch.no_grad()
    def watch(state: TrainerState, model: TrainableModel) -> None:
        if state.step in marks:
            held.append([tensor.detach().clone() for tensor in parameters(model)])
        if state.step == steps:
            for tensor, *each in zip(parameters(model), *held, strict=True):
                tensor.copy_(torch.stack(each).mean(0))
            model.parameters_changed()

    yield watch if trick == "averaged" else None
