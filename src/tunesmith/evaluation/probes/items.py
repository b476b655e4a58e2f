"""Items that a probe asks, and their measurements: written to files, and read back with checks."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from tunesmith.core.errors import Inconclusive
from tunesmith.core.messages import Message
from tunesmith.core.reading.strict_json import parse_json
from tunesmith.core.view import Frozen
from tunesmith.evaluation.lines import LineFile, encode_lines, is_number
from tunesmith.evaluation.scores import rounded
from tunesmith.evaluation.stats.statistics import Floats
from tunesmith.records.evaluation import ArmResults, EvaluationBody
from tunesmith.store.records import Record
from tunesmith.store.store import Store

_FILE = LineFile(
    "measurements.jsonl",
    "a measurement",
    "measured",
    unique=("suite", "candidate", "id"),
    texts=("group", "arm"),
    values=("before", "after"),
)
MEASUREMENTS = _FILE.name
ITEMS = "items.jsonl"


class Item(Frozen):
    """One item of a probe. Measured are the log-probabilities of its choices; without choices an answer is decoded.

    arm: the kind of item within the probe. turns: how many of the last messages are the request's own. expected: the
    right answer. call: the turn that is the right answer, where it calls functions. personal: values that the answer
    must not hold.
    """

    id: str
    group: str
    arm: str
    messages: tuple[Message, ...]
    turns: int = 1
    choices: tuple[str, ...] = ()
    expected: str | None = None
    call: Message | None = None
    personal: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Arm:
    """The measurements of one kind of item. ids (ascending), groups, before and after have the same length.

    before: under the base's weights; None where the probe does not measure the base.
    """

    ids: tuple[str, ...]
    groups: tuple[str, ...]
    before: Floats | None
    after: Floats


Measured = dict[str, Arm]


def encode_items(items: Sequence[Item]) -> bytes:
    """Canonical JSON, one item a line."""
    return encode_lines(item.model_dump(mode="json", exclude_defaults=True) for item in items)


def decode_items(data: bytes) -> list[Item]:
    """The items in the bytes that encode_items returns."""
    return [Item.model_validate(parse_json(line)) for line in data.splitlines()]


def by_arm(rows: Iterable[Mapping[str, Any]]) -> Measured:
    """Measurements by arm from rows with the keys id, group, arm, before, after."""
    sorted_rows: dict[str, list[Mapping[str, Any]]] = {}
    for row in sorted(rows, key=lambda row: str(row["id"])):
        sorted_rows.setdefault(str(row["arm"]), []).append(row)
    return {arm: _arm(found) for arm, found in sorted(sorted_rows.items())}


def arm_results(measured: Measured) -> dict[str, ArmResults]:
    """The evaluation record's account of measurements: count and means by arm."""
    return {
        arm: ArmResults(
            n=len(found.ids),
            before=None if found.before is None else rounded(float(found.before.mean())),
            after=rounded(float(found.after.mean())),
        )
        for arm, found in measured.items()
    }


def read_measurements(store: Store, evaluation: Record) -> dict[tuple[str, str], Measured]:
    """(suite, candidate) -> measurements. Raises Inconclusive, naming the line, for measurements that are not valid.

    That is: a line with other keys; a value that is not a finite number; an item that was measured twice, or some items
    without the base's value; counts or means that differ from the record's account.
    """
    if MEASUREMENTS not in evaluation.blobs:
        return {}
    rows: dict[tuple[str, str], list[Mapping[str, Any]]] = {}
    for place, line in _FILE.read(store, evaluation):
        for key in ("before", "after"):
            if (key == "after" or line[key] is not None) and not is_number(line[key]):
                raise Inconclusive(f"{key} is {line[key]!r}, not a finite number", where=place)
        rows.setdefault((line["suite"], line["candidate"]), []).append(line)
    found = {key: by_arm(cell) for key, cell in rows.items()}
    risks = EvaluationBody.of(evaluation).risks
    told = {(suite, name): each.arms for suite, names in risks.items() for name, each in names.items()}
    promised = {key: arms for key, arms in told.items() if arms is not None}
    for suite, name in sorted(found.keys() | promised.keys()):
        if (suite, name) not in found or arm_results(found[suite, name]) != promised.get((suite, name)):
            raise Inconclusive(f"the evaluation record contradicts the measurements of {suite!r} for {name!r}")
    return found


def _arm(rows: Sequence[Mapping[str, Any]]) -> Arm:
    known = [row["before"] is not None for row in rows]
    if any(known) and not all(known):
        raise Inconclusive(f"{known.count(False)} of {len(rows)} items have no measurement of the base model")
    before = np.array([row["before"] for row in rows], dtype=np.float64) if all(known) else None
    after = np.array([row["after"] for row in rows], dtype=np.float64)
    return Arm(tuple(str(row["id"]) for row in rows), tuple(str(row["group"]) for row in rows), before, after)
