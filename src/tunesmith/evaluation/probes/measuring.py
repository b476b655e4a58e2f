"""Items that a probe asks, and what came of them: paired before and after tuning, written to files, and read back."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np

from tunesmith.candidates.candidate import Candidate
from tunesmith.core.errors import Inconclusive
from tunesmith.core.messages import Message
from tunesmith.evaluation.lines import (
    ITEMS,
    Asked,
    CandidateLine,
    Name,
    answers_to,
    encode_lines,
    read_answer_lines,
    read_items,
)
from tunesmith.evaluation.metrics.declared import Scoring
from tunesmith.evaluation.probes.catalog import suite_of
from tunesmith.evaluation.scores import rounded
from tunesmith.evaluation.stats.statistics import Floats
from tunesmith.records.evaluation import AnswersBody, ArmResults, BestEpoch, EvaluationBody, RiskResults
from tunesmith.records.training import TrainingBody, TrainingFigures
from tunesmith.store.records import Record
from tunesmith.store.store import Store


class Item(Asked):
    """One item of a probe. Measured are the log-probabilities of its choices; without choices an answer is decoded.

    arm: the kind of item within the probe. turns: how many of the last messages are the request's own. expected: the
    right answer. call: the turn that is the right answer, where it calls functions. personal: values that the answer
    must not hold.
    """

    group: str
    arm: str
    messages: tuple[Message, ...]
    turns: int = 1
    choices: tuple[str, ...] = ()
    expected: str | None = None
    call: Message | None = None
    personal: tuple[str, ...] = ()


class Measurement(CandidateLine):
    """What came of one item: a number under the candidate's weights, and under the base's where they are asked too."""

    file = "measurements.jsonl"
    unique = ("suite", "candidate", "id")
    suite: Name
    arm: Name
    before: float | None
    after: float


class Arm(NamedTuple):
    """The measurements of one kind of item. ids (ascending), groups, before and after have the same length.

    before: under the base's weights; None where the probe does not measure the base.
    """

    ids: tuple[str, ...]
    groups: tuple[str, ...]
    before: Floats | None
    after: Floats

    @property
    def sample(self) -> tuple[Floats, tuple[str, ...]]:
        """The measurements under the candidate's weights, with their groups."""
        return self.after, self.groups

    @property
    def base(self) -> Floats:
        """The measurements under the base's weights. Raises Inconclusive where there are none."""
        if self.before is None:
            raise Inconclusive("the base model was not measured")
        return self.before


Measured = dict[str, Arm]


def encode_items(items: Sequence[Item]) -> bytes:
    """Canonical JSON, one item a line."""
    return encode_lines(item.model_dump(mode="json", exclude_defaults=True) for item in items)


def by_arm(rows: Iterable[Measurement]) -> Measured:
    """Measurements of one suite and candidate by arm. Raises Inconclusive where only some have the base's value."""
    return {arm: _arm(own) for arm, own in Measurement.grouped(rows, "arm").items()}


def arm_results(measured: Measured) -> dict[str, ArmResults]:
    """The evaluation record's account of measurements: count and means by arm."""
    return {
        name: ArmResults(
            n=len(arm.ids),
            before=None if arm.before is None else rounded(arm.before.mean()),
            after=rounded(arm.after.mean()),
        )
        for name, arm in measured.items()
    }


def read_measurements(store: Store, evaluation: Record) -> dict[tuple[str, str], Measured]:
    """(suite, candidate) -> measurements. Raises Inconclusive, naming the line, for measurements that are not valid.

    That is: a line that is no Measurement; an item that was measured twice, or some items without the base's value;
    counts or means that differ from the record's account.
    """
    cells = Measurement.grouped(Measurement.read(store, evaluation), "suite", "candidate")
    measured = {key: by_arm(cell) for key, cell in cells.items()}
    risks = EvaluationBody.of(evaluation).risks
    told = {(suite, name): each.arms for suite, names in risks.items() for name, each in names.items()}
    for suite, name in sorted(measured.keys() | told.keys()):
        if (arm_results(measured.get((suite, name), {})) or None) != told.get((suite, name)):
            raise Inconclusive(f"the evaluation record contradicts the measurements of {suite!r} for {name!r}")
    return measured


def _arm(rows: Sequence[Measurement]) -> Arm:
    before = [row.before for row in rows if row.before is not None]
    if before and len(before) < len(rows):
        raise Inconclusive(f"{len(rows) - len(before)} of {len(rows)} items have no measurement of the base model")
    ids, groups, after = zip(*((row.id, row.group, row.after) for row in rows), strict=True)
    return Arm(ids, groups, np.array(before) if before else None, np.array(after))


def measure(
    store: Store, suite: str, candidate: Candidate, after: str, before: str | None, dataset: str, scoring: Scoring
) -> tuple[list[Measurement], RiskResults]:
    """Measurements of one suite for one candidate, and the evaluation record's account of them.

    after, before: digests of the answers to the suite's items, under the candidate's weights and, where measured, the
    base's. Unusable answers give no measurements and an account {"unusable": reason}, so that only this gate is
    inconclusive.
    """
    asked = suite_of(suite)
    try:
        record, body = _checked(store, after, suite, candidate, candidate.training, dataset)
        items = read_items(store, record, Item)
        if not items:
            raise Inconclusive(f"no item of this probe fits the rows: {asked.none}{left_out(body.left_out)}")
        values, earlier = _values(store, record, items, suite, scoring), dict[str, float]()
        if asked.before:
            if before is None:
                raise Inconclusive("the base model was not measured")
            base, _ = _checked(store, before, suite, candidate, None, dataset)
            if base.blobs.get(ITEMS) != record.blobs.get(ITEMS):
                raise Inconclusive("the items before tuning differ from those after")
            earlier = _values(store, base, items, suite, scoring)
    except Inconclusive as error:
        return [], RiskResults(unusable=error.reason)
    rows = [
        Measurement(
            suite=suite,
            candidate=candidate.name,
            id=item.id,
            group=item.group,
            arm=item.arm,
            before=earlier.get(item.id),
            after=values[item.id],
        )
        for item in items
    ]
    results = RiskResults(arms=arm_results(by_arm(rows)), left_out=body.left_out)
    if asked.own and candidate.training is not None:
        stop = best_epoch(TrainingBody.read(store, candidate.training))
        results = results.model_copy(update={"stop": stop})
    return rows, results


def left_out(count: int | None) -> str:
    """The end of a sentence about a probe: how many answers it leaves out."""
    return f"; {count:,} answers that are calls of functions were left out" if count else ""


def best_epoch(training: TrainingFigures) -> BestEpoch | None:
    """The epoch with the lowest validation loss; None for under two losses."""
    curve, steps, epochs = training.validation, training.steps, training.epochs
    if not steps or len(curve) < 2 or not all(math.isfinite(point.loss) for point in curve):
        return None
    best = min(curve, key=lambda point: point.loss)
    return BestEpoch(
        epoch=round(best.step / steps * epochs, 2),
        of=round(epochs, 2),
        loss=best.loss,
        last=curve[-1].loss,
        kept=round(training.kept / steps * epochs, 2),
    )


def _checked(
    store: Store, digest: str, suite: str, candidate: Candidate, training: str | None, dataset: str
) -> tuple[Record, AnswersBody]:
    own = {"dataset": dataset} if suite_of(suite).own else {}
    return answers_to(store, digest, suite, f"probe {suite}", base=candidate.base, training=training, **own)


def _values(store: Store, record: Record, items: Sequence[Item], suite: str, scoring: Scoring) -> dict[str, float]:
    lines = read_answer_lines(store, record, [item.id for item in items], f"answers to {suite}", "items")
    value = suite_of(suite).value
    return {item.id: value(item, lines[item.id], scoring) for item in items}
