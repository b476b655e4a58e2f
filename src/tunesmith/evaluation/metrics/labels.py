"""Labels row by row: how they are kept (`labels.jsonl`) and read back with suspicion, for figures of a whole set.

A line is {"candidate", "metric", "id", "group", "wanted", "given"}, and "confidence" where the row states one. Macro-F1
and calibration error are no means over rows, so a gate on them cannot be judged again from scores alone.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from tunesmith.core.digests import canonical
from tunesmith.core.errors import Inconclusive
from tunesmith.data.dataset import Example
from tunesmith.evaluation.metrics.declared import Answered, LabelScorer, label_of
from tunesmith.evaluation.scores import Column
from tunesmith.evaluation.stats.statistics import Floats
from tunesmith.store.records import Record
from tunesmith.store.store import Store

LABELS = "labels.jsonl"
_KEYS = {"candidate", "metric", "id", "group", "wanted", "given"}


@dataclass(frozen=True, slots=True)
class Labelled:
    """One candidate's labels by one metric, a row each. confidences: None where not every row states one."""

    ids: tuple[str, ...]
    groups: tuple[str, ...]
    wanted: tuple[str, ...]
    given: tuple[str, ...]
    confidences: tuple[float, ...] | None

    @property
    def right(self) -> Floats:
        """1 where the label is the wanted one, else 0."""
        return np.array([one == other for one, other in zip(self.given, self.wanted, strict=True)], dtype=np.float64)


def label_rows(
    scorer: LabelScorer, lines: Mapping[str, Mapping[str, Any]], seen: Mapping[str, Answered], test: Sequence[Example]
) -> Labelled:
    """The labels in a candidate's answers. lines: as answers are kept, by row's id. Raises Inconclusive, UsageError."""
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
    """The lines of labels.jsonl. labelled: (candidate, metric) -> rows."""
    lines = []
    for (candidate, metric), rows in labelled.items():
        for place, identifier in enumerate(rows.ids):
            line = {"candidate": candidate, "metric": metric, "id": identifier, "group": rows.groups[place]}
            line |= {"wanted": rows.wanted[place], "given": rows.given[place]}
            sure = {} if rows.confidences is None else {"confidence": rows.confidences[place]}
            lines.append(canonical({**line, **sure}))
    return b"\n".join(lines) + b"\n"


def read_labels(
    store: Store, evaluation: Record, columns: Mapping[tuple[str, str], Column]
) -> dict[tuple[str, str], Labelled]:
    """(candidate, metric) -> rows in the order of their ids; empty where the evaluation keeps none.

    Raises Inconclusive for a line that is no label, and for labels that are not those which were scored: other rows,
    other groups, or right where the score is 0.
    """
    if LABELS not in evaluation.blobs:
        return {}
    kept: dict[tuple[str, str], dict[str, dict[str, Any]]] = {}
    for number, raw in enumerate(store.read_blob(evaluation.blobs[LABELS]).splitlines(), start=1):
        line = _read_line(raw, f"{LABELS}, line {number}")
        rows = kept.setdefault((line["candidate"], line["metric"]), {})
        if line["id"] in rows:
            raise Inconclusive(f"the row {line['id']!r} is labelled twice", where=f"{LABELS}, line {number}")
        rows[line["id"]] = line
    return {key: _as_scored(key, rows, columns.get(key)) for key, rows in kept.items()}


def _as_scored(key: tuple[str, str], rows: Mapping[str, Mapping[str, Any]], column: Column | None) -> Labelled:
    ordered = [rows[identifier] for identifier in sorted(rows)]
    ids, groups, wanted, given = (tuple(line[name] for line in ordered) for name in ("id", "group", "wanted", "given"))
    stated = [line.get("confidence") for line in ordered]
    sure = None if None in stated else tuple(float(value) for value in stated if value is not None)
    found = Labelled(ids, groups, wanted, given, sure)
    if column is None or (column.ids, column.groups) != (ids, groups) or (column.values != found.right).any():
        raise Inconclusive(f"the labels of {key[0]!r} by {key[1]!r} are not those that were scored")
    return found


def _read_line(raw: bytes, where: str) -> dict[str, Any]:
    try:
        line = json.loads(raw)
    except (ValueError, RecursionError) as error:
        raise Inconclusive(f"not a label: {error}", where=where) from error
    if not isinstance(line, dict) or set(line) - {"confidence"} != _KEYS:
        raise Inconclusive(f"a label has the keys {', '.join(sorted(_KEYS))}", where=where)
    if not all(isinstance(line[key], str) for key in _KEYS):
        raise Inconclusive("a label is text", where=where)
    if "confidence" in line:
        _share(line["confidence"], where)
    return line


def _share(value: Any, where: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0.0 <= value <= 1.0:
        raise Inconclusive(f"a confidence is {value!r}, not 0 to 1", where=where)
    return float(value)
