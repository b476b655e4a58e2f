"""Verifies a dataset version: recomputes what its record states."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence

from tunesmith.core.errors import TunesmithError
from tunesmith.core.values import Problem, View
from tunesmith.data.building.build import counts
from tunesmith.data.building.outside_sets import OUTSIDE, Outside, decode_outside
from tunesmith.data.dataset import REMOVED, SPLITS, Dataset, Example, example_id, load_dataset
from tunesmith.data.duplicates import learned_parts, request_text
from tunesmith.data.settings import DataSettings
from tunesmith.data.splitting.assignment import split_of
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
    problems: list[Problem] = []
    checked = _check(store, digest, problems)
    return DatasetVerification(dataset=digest, ok=not problems, checked=checked, problems=tuple(problems))


def _check(store: Store, digest: str, problems: list[Problem]) -> int:
    """Add what is wrong with a dataset version to problems; returns the number of comparisons."""
    with _noted(problems, "record"):
        dataset = load_dataset(store, digest)
        settings = DataSettings.model_validate(dataset.body.settings)
    if problems:
        return 1
    splits: dict[str, list[Example]] = {}
    for name in SPLITS:
        with _noted(problems, f"{name}.jsonl"):
            splits[name] = dataset.examples(name)
    with _noted(problems, REMOVED):
        removed = dataset.removed()
    outside = Outside()
    if settings.decontaminate:
        with _noted(problems, OUTSIDE):
            outside = decode_outside(store.read_blob(dataset.record.blobs[OUTSIDE]))
    checked = 2 + len(SPLITS)
    if problems:  # damaged rows cannot be checked further
        return checked
    problems.extend(_row_problems(dataset, splits, settings, outside))
    shared = leakage(Nearness(splits, settings.duplicates.threshold, outside.requests), settings.split)
    kept = sum(map(len, splits.values()))
    body = dataset.body
    compared: dict[str, tuple[object, object]] = {
        **{what: (getattr(body, what), again) for what, again in counts(splits).items()},
        "licences": (body.licences, dict(Counter(row.licence for rows in splits.values() for row in rows))),
        "leakage": (body.leakage, shared),
        "rows kept": (body.rows.kept, kept),
        "rows read": (body.rows.read, kept + len(removed)),
        "rows removed": (body.rows.removed, dict(Counter(row.reason for row in removed))),
    }
    for what, (stated, again) in compared.items():
        if stated != again:
            problems.append(Problem(path=what, reason=f"the record says {stated}, the rows say {again}"))
    for what, number in shared.faults().items():
        problems.append(Problem(path=f"leakage.{what}", reason=f"is {number}, and must be 0"))
    return checked + len(compared) + kept


@contextlib.contextmanager
def _noted(problems: list[Problem], path: str) -> Iterator[None]:
    """Add an error in the block to problems. path: of the problem where the error names none."""
    try:
        yield
    except TunesmithError as error:
        problems.append(Problem(path=error.where or path, reason=error.what))
    except (KeyError, ValueError) as error:
        problems.append(Problem(path=path, reason=str(error)))


def _row_problems(
    dataset: Dataset, splits: Mapping[str, Sequence[Example]], settings: DataSettings, outside: Outside
) -> Iterator[Problem]:
    by_hash = settings.split.time is None and settings.split.stratify is None
    held = frozenset(dataset.body.held_groups)
    seen: set[str] = set()
    for name, examples in splits.items():
        for example in examples:
            path = f"{name}.jsonl, {example.id}"
            if example.id != example_id(example.messages, example.source):
                yield Problem(path=path, reason="the id does not match the content")
            if example.id in seen:
                yield Problem(path=path, reason="the id occurs twice")
            if by_hash and split_of(example.group, settings.split, held) != name:
                yield Problem(path=path, reason="the row's group belongs to another split")
            parts = learned_parts(example.messages) if outside.wordings else []
            if any(wording_group(request_text(part), part[-1].text) in outside.wordings for part in parts):
                yield Problem(path=path, reason="has the wording of a row of an outside test set")
            seen.add(example.id)
