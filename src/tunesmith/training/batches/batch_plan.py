"""Which rows form which step of a training, in which order, and in which batches a step is computed."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from tunesmith.engines.batch import Batch, computed_tokens, empty_batch, label_count, lay_out
from tunesmith.engines.ranks import ALONE, Ranks
from tunesmith.models.rendering import Rendered
from tunesmith.training.settings import TrainSettings

# Rows are shuffled and then sorted by length within windows of this many steps: the rows of a step have similar
# lengths (attention pads them to the longest), while it stays random which rows meet.
_STEPS_PER_WINDOW = 8

# The batches of one step, computed one after another; their gradients are summed.
Step = Sequence[Batch]


class RankStep(list[Batch]):
    """A rank's batches of a step. Every rank has as many, so that they keep in step.

    all_tokens, all_labels: of all ranks.
    """

    def __init__(self, batches: Sequence[Batch], all_tokens: int, all_labels: int) -> None:
        super().__init__(batches)
        self.all_tokens, self.all_labels = all_tokens, all_labels


def plan(rows: Sequence[Rendered], batch: int, seed: int, epoch: int) -> list[list[int]]:
    """The rows of each step of an epoch, by index, in order. It depends on the arguments only."""
    generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
    order: list[int] = torch.randperm(len(rows), generator=generator).tolist()
    window = batch * _STEPS_PER_WINDOW
    steps: list[list[int]] = []
    for start in range(0, len(order), window):
        by_length = sorted(order[start : start + window], key=lambda row: (len(rows[row].ids), row))
        steps.extend(by_length[first : first + batch] for first in range(0, len(by_length), batch))
    return [steps[index] for index in torch.randperm(len(steps), generator=generator).tolist()]


def rehearsed_each_epoch(settings: TrainSettings, rows: int) -> int:
    """How many rows an epoch rehearses, on top of so many."""
    return max(1, round(settings.rehearse * rows)) if settings.rehearse else 0


def _parts(rows: Sequence[Rendered], step: Sequence[int], tokens: int, share: bool) -> list[list[int]]:
    """The rows of each batch of a step, by index."""
    parts: list[list[int]] = []
    for row in sorted(step, key=lambda row: len(rows[row].ids)):
        if not parts or computed_tokens([rows[each] for each in [*parts[-1], row]], share=share) > tokens:
            parts.append([])
        parts[-1].append(row)
    return parts


def lay_out_steps(
    steps: Sequence[Sequence[Rendered]], tokens: int, ranks: Ranks = ALONE, *, share: bool = True
) -> RankStep:
    """The batches of this rank, of at most so many computed tokens, for the rows of some steps, which all ranks compute
    together. A single longer row is a batch by itself.

    The rows of a step are given out by length, in turns of the ranks there and back, so that all have about as much.
    Only the rows of one batch share their common prefix, so there are as few and as full batches as possible. share:
    false where the engine shares no prefix.
    """
    parts: list[list[list[Rendered]]] = [[] for _ in range(ranks.size)]
    turns = [*range(ranks.size), *reversed(range(ranks.size))]
    for step in steps:
        ordered = sorted(step, key=lambda row: -len(row.ids))
        for rank, part in enumerate(parts):
            rows = [row for place, row in enumerate(ordered) if turns[place % len(turns)] == rank]
            part += [[rows[row] for row in batch] for batch in _parts(rows, range(len(rows)), tokens, share)]
        most = max(map(len, parts))
        for part in parts:
            part += [[]] * (most - len(part))
    every = [batch for part in parts for batch in part if batch]
    return RankStep(
        [lay_out(batch, share=share) if batch else empty_batch() for batch in parts[ranks.rank]],
        all_tokens=sum(computed_tokens(batch, share=share) for batch in every),
        all_labels=sum(label_count(row) for batch in every for row in batch),
    )


class TrainingPlan(Sequence[Step]):
    """All steps of a training, in order. An epoch is laid out when one of its steps is asked for: a training with a
    budget ends before most of them. rehearsal: further rows, of which each epoch has the next ones. ranks: whose
    rank's part of each step it gives."""

    def __init__(
        self,
        rows: Sequence[Rendered],
        settings: TrainSettings,
        *,
        rehearsal: Sequence[Rendered] = (),
        share: bool = True,
        ranks: Ranks = ALONE,
    ) -> None:
        self._rows, self._settings, self._share, self._ranks = rows, settings, share, ranks
        self._rehearsal = rehearsal
        self._each = rehearsed_each_epoch(settings, len(rows)) if rehearsal else 0
        self._epochs: dict[int, list[RankStep]] = {}
        self.epoch_steps = len(plan(self._of_epoch(0), settings.batch, settings.seed, 0))

    def _of_epoch(self, number: int) -> Sequence[Rendered]:
        """The rows of an epoch."""
        first = number * self._each
        return [*self._rows, *(self._rehearsal[(first + k) % len(self._rehearsal)] for k in range(self._each))]

    def epoch(self, number: int) -> list[RankStep]:
        """The steps of one epoch."""
        if number not in self._epochs:
            self._epochs.pop(number - 2, None)
            rows, settings = self._of_epoch(number), self._settings
            self._epochs[number] = [
                lay_out_steps([[rows[row] for row in step]], settings.tokens, self._ranks, share=self._share)
                for step in plan(rows, settings.batch, settings.seed, number)
            ]
        return self._epochs[number]

    def __len__(self) -> int:
        return self.epoch_steps * self._settings.epochs

    def __getitem__(self, index: int) -> Step:  # type: ignore[override]  # nothing asks for slices
        if not 0 <= index < len(self):
            raise IndexError(index)
        return self.epoch(index // self.epoch_steps)[index % self.epoch_steps]


def lay_out_validation(
    rows: Sequence[Rendered], settings: TrainSettings, *, share: bool = True, ranks: Ranks = ALONE
) -> RankStep:
    """The batches of the validation loss, of no more tokens than a step's."""
    steps = [[rows[row] for row in step] for step in plan(rows, settings.batch, 0, 0)]
    return lay_out_steps(steps, settings.tokens, ranks, share=share)


def validation_parts(rows: Sequence[Rendered], settings: TrainSettings, *, share: bool = True) -> list[list[int]]:
    """The rows of each batch of the validation loss, by index. A batch's labels are in the order of its rows."""
    steps = plan(rows, settings.batch, 0, 0)
    return [part for step in steps for part in _parts(rows, step, settings.tokens, share)]


def step_tokens(step: Step) -> int:
    """Tokens that a step computes, on all ranks."""
    return step.all_tokens if isinstance(step, RankStep) else sum(batch.tokens for batch in step)


def step_labels(step: Step) -> float:
    """Labels of all batches of a step, on all ranks."""
    return float(step.all_labels if isinstance(step, RankStep) else sum(batch.labels.numel() for batch in step))
