"""Changes of a training that the product does not have, to be screened by `study.py` before any code of theirs is kept.

- twice: the request stands twice in the prompt, in training and in use (Kukić et al. 2026).
- swapped: rows more, with values of other rows in the place of their own; each epoch reads twice as many rows.
- averaged: the mean of the weights after 70, 80, 90 and 100% of the steps.
- dft: each label's loss is weighted by its probability (Wu et al. 2025, "On the Generalization of SFT").
- dropped: at each step a tenth of the entries of all A counts as zero, the same for all its tokens (DropConnect, Wan et
  al. 2013): a dropout on the adapter.
- consistent: each step twice, with other entries of A dropped, and with the divergence between both distributions of
  each label (R-Drop, Liang et al. 2021). An epoch takes 2.8 times as long.
- smoothed: a tenth of each label's weight goes to all tokens alike (label smoothing, Szegedy et al. 2016).
- contrastive: where an answer begins, requests with the same answer shall be nearer to each other than to the others of
  the last 256 rows (Gunel et al. 2021; Wang et al. 2020, "Cross-Batch Memory"): for labels.

`python benchmarks/tricks.py TRICK ...` is `tunesmith ...` with a trick that changes the steps.
"""

from __future__ import annotations

import json
import random
import sys
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, NamedTuple
from unittest.mock import patch

import torch
import torch.nn.functional as F

from leakage import Row
from tasks import Split, Task
from tunesmith.cli.main import main
from tunesmith.engines.batch import Batch
from tunesmith.engines.native.adapters import trainable
from tunesmith.engines.native.adapters.trainable import NativeTrainable
from tunesmith.engines.native.network.ops import cross_entropy_
from tunesmith.engines.training_protocol import TrainableModel
from tunesmith.training.batches.batch_plan import Step
from tunesmith.training.objectives import Objective
from tunesmith.training.schedule import TrainerState
from tunesmith.training.steps import gradients, parameters

TRICKS = ("twice", "swapped", "averaged", "dft", "dropped", "smoothed", "contrastive", "consistent")
_DROPPED = 0.1
_SMOOTHED = 0.1
_CONSISTENT = 1.0  # weight of the divergence
_CONTRAST, _TEMPERATURE, _REMEMBERED = 0.3, 0.3, 256  # its weight beside the labels' loss
_LOSS = "tunesmith.engines.native.network.ops.cross_entropy_"
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


Gradients = Callable[..., float]  # as steps.gradients


@contextmanager
def _masked(model: TrainableModel, kept: torch.Tensor) -> Iterator[torch.Tensor]:
    """While some entries of A are zero. A is the first of the groups, B the second (LoRA+)."""
    (inner,) = model.parameter_groups()[0].tensors
    with torch.no_grad():
        whole = inner.clone()
        inner.mul_(kept)
        model.parameters_changed()
    yield inner
    with torch.no_grad():
        inner.copy_(whole)
        model.parameters_changed()


def _draw(model: TrainableModel, random: torch.Generator) -> torch.Tensor:
    (inner,) = model.parameter_groups()[0].tensors
    return (torch.rand(inner.shape, generator=random) >= _DROPPED) / (1 - _DROPPED)


def _with_dropout() -> Gradients:
    random = torch.Generator().manual_seed(0)

    def dropped(model: TrainableModel, *step: Any) -> float:
        kept = _draw(model, random)
        with _masked(model, kept) as inner:
            loss = gradients(model, *step)
            assert inner.grad is not None
            inner.grad.mul_(kept)
        return loss

    return dropped


def _consistent() -> Gradients:
    random = torch.Generator().manual_seed(0)

    def twice(model: TrainableModel, objective: Objective, step: Step, *ranks: Any) -> float:
        masks = [_draw(model, random) for _ in range(2)]
        heard = list[list[torch.Tensor]]()  # log-probabilities of all tokens by the model with either mask
        for kept in masks:
            with _masked(model, kept), _scores_heard() as scores:
                for batch in step:
                    model.label_losses(batch)
            heard.append(scores)
        losses, found = list[float](), list[list[torch.Tensor]]()
        for kept, other in zip(masks, reversed(heard), strict=True):
            with _masked(model, kept) as inner, patch(_LOSS, _pulled(iter(other))):
                losses.append(gradients(model, objective, step, *ranks))
                assert inner.grad is not None
                inner.grad.mul_(kept)
            found.append([each for tensor in parameters(model) if (each := tensor.grad) is not None])
            for tensor in parameters(model):
                tensor.grad = None
        for tensor, *both in zip(parameters(model), *found, strict=True):
            tensor.grad = torch.stack(both).mean(0)
        return sum(losses) / len(losses)

    return twice


def _pulled(others: Iterator[torch.Tensor]) -> Callable[..., torch.Tensor]:
    """ops.cross_entropy_ with a pull towards other log-probabilities, of one chunk after another."""

    def loss(scores: torch.Tensor, labels: torch.Tensor, share: torch.Tensor | None) -> torch.Tensor:
        own = torch.log_softmax(scores.float(), -1)
        losses = cross_entropy_(scores, labels, share)
        if share is not None:
            scores.add_(_pull(own, next(others)).mul_(_CONSISTENT / 2 * share[:, None]))
        return losses

    return loss


@contextmanager
def _scores_heard() -> Iterator[list[torch.Tensor]]:
    heard = list[torch.Tensor]()

    def listening(scores: torch.Tensor, labels: torch.Tensor, share: Any) -> torch.Tensor:
        heard.append(torch.log_softmax(scores.float(), -1))
        return cross_entropy_(scores, labels, share)

    with patch(_LOSS, listening):
        yield heard


def _pull(own: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """The gradient of KL(own, other) + KL(other, own) by the scores of own, [N, V] each, as log-probabilities."""
    shares = own.exp()
    apart = own - other
    return shares * (apart - (shares * apart).sum(-1, keepdim=True) + 1) - other.exp()


def _smoothed(scores: torch.Tensor, labels: torch.Tensor, share: torch.Tensor | None) -> torch.Tensor:
    loss = cross_entropy_(scores, labels, share)
    if share is not None:
        moved = _SMOOTHED * share[:, None]
        scores.sub_(moved / scores.shape[1]).scatter_add_(1, labels[:, None], moved.to(scores.dtype))
    return loss


def _contrasted() -> Callable[..., torch.Tensor]:
    """NativeTrainable.loss with a term for the hidden states at which answers begin."""
    plain, predicting, seen = NativeTrainable.loss, trainable._predicting, list[torch.Tensor]()
    remembered = list[tuple[tuple[int, ...], torch.Tensor]]()

    def watched(*given: Any) -> torch.Tensor:
        seen.append(predicting(*given))
        return seen[-1]

    def loss(model: NativeTrainable, batch: Batch, weights: Any) -> torch.Tensor:
        with patch("tunesmith.engines.native.adapters.trainable._predicting", watched):
            total = plain(model, batch, weights)
        rows, hidden = batch.label_rows, seen.pop().float()
        answers = [tuple(batch.labels[rows == row].tolist()) for row in rows.unique()]
        firsts = F.normalize(torch.stack([hidden[rows == row][0] for row in rows.unique()]), dim=-1)
        terms = []
        for place, answer in enumerate(answers):
            others = [*remembered, *((answers[each], firsts[each]) for each in range(len(answers)) if each != place)]
            same = torch.tensor([each == answer for each, _ in others])
            if same.any():
                near = torch.stack([state for _, state in others]) @ firsts[place] / _TEMPERATURE
                terms.append(-torch.log_softmax(near, 0)[same].mean())
        remembered.extend(zip(answers, firsts.detach(), strict=True))
        del remembered[:-_REMEMBERED]
        return total + _CONTRAST * sum(terms, torch.zeros(())) / len(answers)

    return loss


# What a trick puts in whose place.
_REPLACED: Mapping[str, tuple[str, Callable[[], Any]]] = {
    "dft": ("tunesmith.training.train.objective_of", lambda: lambda _: _ByProbability()),
    "dropped": ("tunesmith.training.trainer.gradients", _with_dropout),
    "consistent": ("tunesmith.training.trainer.gradients", _consistent),
    "smoothed": (_LOSS, lambda: _smoothed),
    "contrastive": ("tunesmith.engines.native.adapters.trainable.NativeTrainable.loss", _contrasted),
}


@contextmanager
def applied(trick: str, steps: int) -> Iterator[Watch | None]:
    """While a training of so many steps runs. Gives what watches it."""
    if trick in _REPLACED:
        place, made = _REPLACED[trick]
        with patch(place, made()):
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


if __name__ == "__main__":
    name = sys.argv.pop(1) if len(sys.argv) > 1 else ""
    if name not in _REPLACED:
        sys.exit(f"{name!r} does not change a step: state one of {', '.join(_REPLACED)}")
    with applied(name, 0):
        main()
