"""Labels of each row: written to `labels.jsonl`, and read back with checks, for macro-F1 and calibration.

A line is {"candidate", "metric", "id", "group", "wanted", "given"}, and "confidence" where the row states one. Macro-F1
and calibration error are not means over rows, so the scores alone are not enough to judge a gate on them again.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from tunesmith.core.errors import Inconclusive
from tunesmith.data.dataset import Example
from tunesmith.evaluation.lines import LineFile, encode_lines, is_share
from tunesmith.evaluation.metrics.declared import Answered, LabelScorer, label_of
from tunesmith.evaluation.scores import Column
from tunesmith.evaluation.stats.statistics import Floats
from tunesmith.store.records import Record
from tunesmith.store.store import Store

_FILE = LineFile(
    "labels.jsonl",
    "a label",
    "labelled",
    unique=("candidate", "metric", "id"),
    texts=("group",),
    values=("wanted", "given"),
    optional=frozenset({"confidence"}),
)
LABELS = _FILE.name


@dataclass(frozen=True, slots=True)
class Labelled:
    """One candidate's labels by one metric, with one entry per row. wanted: the right labels; given: the candidate's.

    confidences: 0 to 1; None where some row states none.
    """

    ids: tuple[str, ...]
    groups: tuple[str, ...]
    wanted: tuple[str, ...]
    given: tuple[str, ...]
    confidences: tuple[float, ...] | None

    @property
    def right(self) -> Floats:
        """1 for each right label, else 0."""
        return np.array([one == other for one, other in zip(self.given, self.wanted, strict=True)], dtype=np.float64)


def label_rows(
    scorer: LabelScorer, lines: Mapping[str, Mapping[str, Any]], seen: Mapping[str, Answered], test: Sequence[Example]
) -> Labelled:
    """The labels in a candidate's answers. lines: row id -> line of the answers record.

    Raises Inconclusive for a confidence that is not 0 to 1, UsageError for a reference without a label.
    """
    stated = [lines[example.id].get("confidence") for example in test]
    return Labelled(
        ids=tuple(example.id for example in test),
        groups=tuple(example.group for example in test),
        wanted=tuple(label_of(example.answer, scorer, reference=True) for example in test),
        given=tuple(label_of(seen[example.id].text, scorer) for example in test),
        confidences=None
        if any(value is None for value in stated)
        else tuple(_share(value, f"test row {row.id}") for value, row in zip(stated, test, strict=True)),
    )


def encode_labels(labelled: Mapping[tuple[str, str], Labelled]) -> bytes:
    """The bytes of labels.jsonl. labelled: (candidate, metric) -> labels."""
    lines = []
    for (candidate, metric), rows in labelled.items():
        for place, identifier in enumerate(rows.ids):
            line = {"candidate": candidate, "metric": metric, "id": identifier, "group": rows.groups[place]}
            line |= {"wanted": rows.wanted[place], "given": rows.given[place]}
            sure = {} if rows.confidences is None else {"confidence": rows.confidences[place]}
            lines.append({**line, **sure})
    return encode_lines(lines)


def read_labels(
    store: Store, evaluation: Record, columns: Mapping[tuple[str, str], Column]
) -> dict[tuple[str, str], Labelled]:
    """(candidate, metric) -> labels in the order of row ids; empty where the evaluation keeps none.

    columns: the evaluation's scores. Raises Inconclusive for a line that is not a label, and for labels that differ
    from the scores: other rows, other groups, or a right label where the score is 0.
    """
    if LABELS not in evaluation.blobs:
        return {}
    kept: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for place, line in _FILE.read(store, evaluation):
        if not all(isinstance(line[key], str) for key in ("wanted", "given")):
            raise Inconclusive("a label is not text", where=place)
        if "confidence" in line:
            _share(line["confidence"], place)
        kept.setdefault((line["candidate"], line["metric"]), []).append(line)
    return {key: _as_scored(key, rows, columns.get(key)) for key, rows in kept.items()}


def _as_scored(key: tuple[str, str], rows: Sequence[Mapping[str, Any]], column: Column | None) -> Labelled:
    """The labels of one candidate and metric. Raises Inconclusive where they differ from the scores."""
    ordered = sorted(rows, key=lambda line: str(line["id"]))
    ids, groups, wanted, given = (tuple(line[name] for line in ordered) for name in ("id", "group", "wanted", "given"))
    stated = [line.get("confidence") for line in ordered]
    sure = None if None in stated else tuple(float(value) for value in stated if value is not None)
    found = Labelled(ids, groups, wanted, given, sure)
    if column is None or (column.ids, column.groups) != (ids, groups) or (column.values != found.right).any():
        raise Inconclusive(f"the labels of {key[0]!r} by {key[1]!r} differ from the scores")
    return found


def _share(value: Any, where: str) -> float:
    if not is_share(value):
        raise Inconclusive(f"a confidence is {value!r}, not a number from 0 to 1", where=where)
    return float(value)
