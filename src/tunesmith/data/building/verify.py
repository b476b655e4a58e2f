"""Verifies a dataset version: recomputes what its record states."""

from __future__ import annotations

from collections import Counter
from typing import Any

from tunesmith.core.errors import TunesmithError
from tunesmith.core.view import Problem, View
from tunesmith.data.building.build import counts, near_threshold
from tunesmith.data.building.outside_sets import OUTSIDE, Outside, decode_outside
from tunesmith.data.dataset import SPLITS, Dataset, Example, example_id, load_dataset
from tunesmith.data.settings import DataSettings
from tunesmith.data.splitting.assignment import split_of
from tunesmith.data.splitting.duplicates import request_text
from tunesmith.data.splitting.groups import wording_group
from tunesmith.data.splitting.leakage import Nearness, leakage
from tunesmith.store.store import Store


class DatasetVerification(View):
    """Whether a dataset version is what its record says. checked: number of comparisons."""

    dataset: str
    ok: bool
    checked: int
    problems: tuple[Problem, ...]


def verify_dataset(store: Store, digest: str) -> DatasetVerification:
    """Recompute a dataset version's digests, ids, splits, counts and leakage, and compare them with its record."""
    problems: list[dict[str, str]] = []
    checked = 1
    try:
        dataset = load_dataset(store, digest)
        settings = DataSettings.model_validate(dataset.record.body["settings"])
    except (TunesmithError, KeyError, ValueError) as error:
        return _verification(digest, checked, [{"path": "record", "reason": str(error)}])
    splits: dict[str, list[Example]] = {}
    for name in SPLITS:
        checked += 1
        try:
            splits[name] = dataset.examples(name)
        except TunesmithError as error:
            problems.append({"path": error.where or f"{name}.jsonl", "reason": error.what})
    try:
        checked += 1
        removed = dataset.removed()
    except (TunesmithError, KeyError) as error:
        problems.append({"path": "removed.jsonl", "reason": str(error)})
    if problems:  # damaged rows cannot be checked further
        return _verification(digest, checked, problems)
    try:
        outside = _outside(store, dataset, settings)
    except (TunesmithError, KeyError) as error:
        return _verification(digest, checked, [{"path": OUTSIDE, "reason": str(error)}])
    problems.extend(_row_problems(splits, settings, frozenset(dataset.record.body.get("held_groups", ()))))
    problems.extend(_outside_problems(splits, outside))
    stated = {**_stated(dataset), "rows removed": dataset.record.body["rows"]["removed"]}
    shared = leakage(splits, Nearness(splits, near_threshold(settings), outside.requests), settings.split)
    again = {
        **counts(splits),
        "leakage": shared.as_json(near_threshold(settings)),
        "rows kept": sum(map(len, splits.values())),
        "rows read": sum(map(len, splits.values())) + len(removed),
        "rows removed": dict(sorted(Counter(str(row["reason"]) for row in removed).items())),
    }
    for what, value in again.items():
        if stated[what] != value:
            problems.append({"path": what, "reason": f"the record says {stated[what]}, the rows say {value}"})
    for what, number in shared.faults().items():
        problems.append({"path": f"leakage.{what}", "reason": f"is {number}, and must be 0"})
    return _verification(digest, checked + len(again) + sum(map(len, splits.values())), problems)


def _outside(store: Store, dataset: Dataset, settings: DataSettings) -> Outside:
    return decode_outside(store.read_blob(dataset.record.blobs[OUTSIDE])) if settings.decontaminate else Outside()


def _outside_problems(splits: dict[str, list[Example]], outside: Outside) -> list[dict[str, str]]:
    return [
        {"path": f"{name}.jsonl, {example.id}", "reason": "has the wording of a row of an outside test set"}
        for name, examples in splits.items()
        for example in examples
        if outside.wordings and wording_group(request_text(example.messages), example.answer) in outside.wordings
    ]


def _stated(dataset: Dataset) -> dict[str, Any]:
    body = dataset.record.body
    rows = {f"rows {key}": body["rows"][key] for key in ("read", "kept")}
    return {**{key: body[key] for key in ("splits", "groups", "licences", "leakage")}, **rows}


def _row_problems(
    splits: dict[str, list[Example]], settings: DataSettings, held: frozenset[str]
) -> list[dict[str, str]]:
    problems = []
    by_hash = settings.split.time is None and settings.split.stratify is None
    seen: set[str] = set()
    for name, examples in splits.items():
        for example in examples:
            path = f"{name}.jsonl, {example.id}"
            if example.id != example_id(example.messages, example.source):
                problems.append({"path": path, "reason": "the id does not match the content"})
            if example.id in seen:
                problems.append({"path": path, "reason": "the id occurs twice"})
            if by_hash and split_of(example.group, settings.split, held) != name:
                problems.append({"path": path, "reason": "the row's group belongs to another split"})
            seen.add(example.id)
    return problems


def _verification(digest: str, checked: int, problems: list[dict[str, str]]) -> DatasetVerification:
    found = tuple(Problem.model_validate(problem) for problem in problems)
    return DatasetVerification(dataset=digest, ok=not found, checked=checked, problems=found)
