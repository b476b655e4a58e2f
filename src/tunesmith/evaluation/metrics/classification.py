"""Labels of each row, kept in `labels.jsonl`, and their metrics: macro-F1, results by label, calibration, Brier score.

Macro-F1 and calibration error are not means over rows, so the scores alone do not suffice to judge a gate on them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, Self

import numpy as np

from tunesmith.core.errors import Inconclusive
from tunesmith.core.values import Omitted
from tunesmith.data.dataset import Example
from tunesmith.evaluation.lines import CandidateLine, Lines, Name, Share, is_share
from tunesmith.evaluation.metrics.declared import Answered, LabelScorer, label_of
from tunesmith.evaluation.scores import Columns, metric_interval, rounded
from tunesmith.evaluation.stats.statistics import SHARES, Floats, Interval, Level, by_group, interval, resampled_figure
from tunesmith.records.evaluation import (
    Calibration,
    CalibrationBin,
    ClassResults,
    Confusion,
    LabelResult,
)
from tunesmith.store.records import Record
from tunesmith.store.store import Store


class LabelLine(CandidateLine):
    """The label of one answer. wanted: the right one. confidence: where the answer states one."""

    file = "labels.jsonl"
    unique = ("candidate", "metric", "id")
    metric: Name
    wanted: str
    given: str
    confidence: Omitted[Share] = None


class Labelled(NamedTuple):
    """One candidate's labels by one metric, with one entry per row. wanted: the right labels; given: the candidate's.

    confidences: 0 to 1; None where some row states none.
    """

    ids: tuple[str, ...]
    groups: tuple[str, ...]
    wanted: tuple[str, ...]
    given: tuple[str, ...]
    confidences: tuple[float, ...] | None

    @classmethod
    def of(cls, lines: Sequence[LabelLine]) -> Self:
        """The labels that lines state, one or more."""
        ids, groups, wanted, given, stated = zip(
            *((line.id, line.group, line.wanted, line.given, line.confidence) for line in lines), strict=True
        )
        return cls(ids, groups, wanted, given, None if None in stated else stated)

    @property
    def right(self) -> Floats:
        """1 for each right label, else 0."""
        return np.array([one == other for one, other in zip(self.given, self.wanted, strict=True)], dtype=np.float64)


def label_rows(
    name: str,
    scorer: LabelScorer,
    lines: Lines,
    seen: Mapping[str, Answered],
    test: Sequence[Example],
) -> list[LabelLine]:
    """The labels in the answers of the candidate `name`. lines: row id -> line of the answers record.

    Raises Inconclusive for a confidence that is not 0 to 1, UsageError for a reference without a label.
    """
    labels = []
    for row in test:
        stated = lines[row.id].get("confidence")
        if stated is not None and not is_share(stated):
            raise Inconclusive(f"a confidence is {stated!r}, not a number from 0 to 1", where=f"test row {row.id}")
        labels.append(
            LabelLine(
                candidate=name,
                metric=scorer.name,
                id=row.id,
                group=row.group,
                wanted=label_of(row.answer, scorer, reference=True),
                given=label_of(seen[row.id].text, scorer),
                confidence=stated,
            )
        )
    if any(each.confidence is None for each in labels):  # those of all answers count, or none
        return [each.model_copy(update={"confidence": None}) for each in labels]
    return labels


def read_labels(store: Store, evaluation: Record, columns: Columns) -> dict[tuple[str, str], Labelled]:
    """(candidate, metric) -> labels in the order of row ids; empty where the evaluation keeps none.

    columns: the evaluation's scores. Raises Inconclusive for a line that is not a label, and for labels that differ
    from the scores: other rows, other groups, or a right label where the score is 0.
    """
    kept = LabelLine.grouped(LabelLine.read(store, evaluation), "candidate", "metric")
    labelled = {key: Labelled.of(lines) for key, lines in kept.items()}
    for (name, metric), own in labelled.items():
        column = columns.get((name, metric))
        scored = column and (column.ids, column.groups, column.values.tolist())
        if scored != (own.ids, own.groups, own.right.tolist()):
            raise Inconclusive(f"the labels of {name!r} by {metric!r} differ from the scores")
    return labelled


_DRAWS = 2_000
_BINS = 10
_SHOWN = 40


def classes(rows: Labelled, level: Level) -> ClassResults:
    """Macro-F1 with an interval, and the results by label.

    Macro-F1 is the mean F1 of the labels that are wanted, as in scikit-learn's f1_score with those labels. The interval
    is a Bayesian bootstrap over groups (Rubin 1981).
    """
    labels, counts = sorted(set(rows.wanted)), _counts(rows)
    _, said, held = whole = counts.sum(axis=1)
    each = _f1(*whole)
    # RandomState's streams never change (NEP 19), so the record can be computed again years later.
    weights = np.random.RandomState(level.seed).standard_exponential((_DRAWS, counts.shape[1]))
    drawn = _f1(*(weights @ counts)).mean(axis=-1)
    tail = (1.0 - level.confidence) / 2.0
    mean = float(each.mean())
    low, high = (float(np.quantile(drawn, q)) for q in (tail, 1.0 - tail))
    order = sorted(range(len(labels)), key=lambda n: (-held[n], labels[n]))[:_SHOWN]
    wrong = Counter(pair for pair in zip(rows.wanted, rows.given, strict=True) if pair[0] != pair[1])
    most = sorted(wrong.items(), key=lambda item: (-item[1], item[0]))[:10]
    return ClassResults(
        macro_f1=metric_interval(Interval(mean, min(low, mean), max(high, mean))),
        labels=len(labels),
        by_label=tuple(
            LabelResult(label=labels[n], n=int(held[n]), said=int(said[n]), f1=rounded(each[n])) for n in order
        ),
        confused=tuple(Confusion(wanted=truth, given=answer, n=count) for (truth, answer), count in most),
    )


def calibration(rows: Labelled) -> Calibration:
    """The difference between stated confidences and accuracy. Raises Inconclusive where confidences are not stated.

    ece: expected calibration error over ten bins of equal width (Guo et al. 2017). brier: mean squared error of the
    confidences (Brier 1950). bins: the bins that have rows.
    """
    stated, truth = _confidences(rows), rows.right
    which = np.minimum((stated * _BINS).astype(int), _BINS - 1)
    bins, error = [], 0.0
    for number in range(_BINS):
        inside = which == number
        if not inside.any():
            continue
        confidence, accuracy = float(stated[inside].mean()), float(truth[inside].mean())
        error += inside.mean() * abs(confidence - accuracy)
        figures = {"confidence": rounded(confidence), "right": rounded(accuracy)}
        bins.append(CalibrationBin(low=number / _BINS, n=int(inside.sum()), **figures))
    return Calibration(
        n=len(stated),
        ece=rounded(error),
        brier=rounded(((stated - truth) ** 2).mean()),
        bins=tuple(bins),
    )


def macro_f1_interval(rows: Labelled, level: Level) -> Interval:
    """Macro-F1 with the interval that gates use: a Bayesian bootstrap over groups (Rubin 1981).

    As in statistics.py, a worst-case group is added. It has the mean size and the label frequencies of all rows. None
    of its answers are right for the lower end, all of them for the upper end.
    """
    counts = _counts(rows)
    groups = counts.shape[1]
    more = counts[2].sum(axis=0) / groups  # the labels of a mean group

    def drawn(weights: Floats) -> tuple[Floats, Floats]:
        right, said, held = weights[:, :-1] @ counts
        added = weights[:, -1:] * more
        shown = said + added, held + added
        return _f1(right, *shown).mean(axis=-1), _f1(right + added, *shown).mean(axis=-1)

    return resampled_figure(float(_f1(*counts.sum(axis=1)).mean()), drawn, level, groups + 1)


def calibration_error_interval(rows: Labelled, level: Level) -> Interval:
    """Expected calibration error as in `calibration`, with an interval as in `macro_f1_interval`.

    The added group has an error of 1 on every row for the upper end, and of 0 for the lower end. A bin with few rows
    has an error above 0 even where the confidences are right, so the estimate is too high rather than too low. The
    lower end takes that noise off: where a bin's error changes its sign in a draw, three times its size is subtracted
    from the others. Raises Inconclusive where confidences are not stated.
    """
    stated, truth = _confidences(rows), rows.right
    index, sizes = by_group(rows.groups)
    bins = np.minimum((stated * _BINS).astype(int), _BINS - 1)
    gaps = np.zeros((len(sizes), _BINS))
    np.add.at(gaps, (index, bins), stated - truth)
    mean = float(np.abs(gaps.sum(0)).sum() / sizes.sum())
    signs = np.sign(gaps.sum(0))

    def drawn(whole: Floats) -> tuple[Floats, Floats]:
        weights, added = whole[:, :-1], whole[:, -1] * sizes.mean()
        errors, total = weights @ gaps, weights @ sizes + added
        off = np.abs(errors).sum(axis=-1)
        # The sum of absolute errors holds the noise of the rows and that of the draw; 2 * signed - off holds neither.
        return np.maximum(0.0, 2.0 * (errors @ signs) - off) / total, (off + added) / total

    return resampled_figure(mean, drawn, level, len(sizes) + 1)


def brier_interval(rows: Labelled, level: Level) -> Interval:
    """Mean squared error of the stated confidences, with its interval.

    Raises Inconclusive where confidences are not stated.
    """
    off = (_confidences(rows) - rows.right) ** 2
    return interval(off, rows.groups, SHARES, level)


def _confidences(rows: Labelled) -> Floats:
    if rows.confidences is None:
        raise Inconclusive("some answers state no confidence: set the scorer's calibrate, or the endpoint's logprobs")
    return np.array(rows.confidences)


def _counts(rows: Labelled) -> Floats:
    """float64[3, groups, labels (sorted)]: how often a label was given rightly, was given, and was wanted."""
    labels = sorted(set(rows.wanted))
    place = {label: number for number, label in enumerate(labels)}
    index, sizes = by_group(rows.groups)
    right, said, held = counts = np.zeros((3, len(sizes), len(labels)))
    for group, answer, truth in zip(index, rows.given, rows.wanted, strict=True):
        held[group, place[truth]] += 1
        if answer in place:
            said[group, place[answer]] += 1
        right[group, place[truth]] += answer == truth
    return counts


def _f1(right: Any, said: Any, held: Any) -> Any:
    whole = said + held
    return np.divide(2.0 * right, whole, out=np.zeros_like(whole), where=whole > 0)
