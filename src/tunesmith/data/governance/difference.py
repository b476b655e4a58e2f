"""Differences between two dataset versions, and a sample of the rows that a build removed."""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

from tunesmith.core.digests import digest_of
from tunesmith.core.errors import Refused
from tunesmith.core.reading.strict_json import Fields, values_in
from tunesmith.core.text.folding import visible
from tunesmith.core.values import View
from tunesmith.data.dataset import BALANCED, SPLITS, Dataset, Example, load_dataset
from tunesmith.data.duplicates import request_text
from tunesmith.data.settings import DataSettings
from tunesmith.data.sources.files import find_files, open_source
from tunesmith.records.dataset import RemovedRow
from tunesmith.store.store import Store


class ChangedRow(View):
    """A row of both versions with another answer. before, after: its ids."""

    before: str
    after: str


class MovedRow(View):
    """A row that is in another split. before, after: the splits."""

    id: str
    before: str
    after: str


class Difference(View):
    """What changed from one dataset version to another. rows: how many are the same, moved, added, removed, changed.

    added, removed: ids. splits: split -> rows before and after. balance: attribute -> value -> rows before and after.
    removed_reasons: reason -> rows left out before and after. settings: the path of each setting that differs -> its
    value before and after; None where there is none.
    """

    before: str
    after: str
    rows: dict[str, int]
    added: tuple[str, ...]
    removed: tuple[str, ...]
    changed: tuple[ChangedRow, ...]
    moved: tuple[MovedRow, ...]
    splits: dict[str, tuple[int, int]]
    balance: dict[str, dict[str, tuple[int, int]]]
    removed_reasons: dict[str, tuple[int, int]]
    settings: dict[str, tuple[Any, Any]]


def difference(store: Store, before: str, after: str) -> Difference:
    """Rows that were added, removed, changed or moved between splits, and the shift of licences, sources and so on.

    Rows with the same id are the same. Among the others, a row of each version with the same source and request count
    as one row with a changed answer.
    """
    first, second = load_dataset(store, before), load_dataset(store, after)
    old, new = _placed(first), _placed(second)
    gone = {name: old[name][1] for name in old.keys() - new.keys()}
    come = {name: new[name][1] for name in new.keys() - old.keys()}
    changed = _changed(gone, come)
    added = sorted(come.keys() - {pair.after for pair in changed})
    removed = sorted(gone.keys() - {pair.before for pair in changed})
    both = sorted(old.keys() & new.keys())
    places = (MovedRow(id=name, before=old[name][0], after=new[name][0]) for name in both)
    moved = [one for one in places if one.before != one.after]
    return Difference(
        before=before,
        after=after,
        rows={
            "same": len(both) - len(moved),
            "moved": len(moved),
            "added": len(added),
            "removed": len(removed),
            "changed": len(changed),
        },
        added=tuple(added),
        removed=tuple(removed),
        changed=tuple(changed),
        moved=tuple(moved),
        splits={name: (first.splits[name], second.splits[name]) for name in SPLITS},
        balance={name: _shift(old, new, name) for name in BALANCED},
        removed_reasons=_both(Counter(first.body.rows.removed), Counter(second.body.rows.removed)),
        settings=_other_settings(first, second),
    )


def _other_settings(first: Dataset, second: Dataset) -> dict[str, tuple[Any, Any]]:
    before, after = (_flat(dataset.body.settings) for dataset in (first, second))
    return {
        path: (before.get(path), after.get(path))
        for path in sorted(before.keys() | after.keys())
        if before.get(path) != after.get(path)
    }


def _flat(settings: Fields) -> dict[str, Any]:
    """The values inside settings by their dotted paths."""
    inner = ((keys, value) for keys, value in values_in(settings) if value == {} or not isinstance(value, dict | list))
    return {".".join(map(str, keys)): value for keys, value in inner}


def _placed(dataset: Dataset) -> dict[str, tuple[str, Example]]:
    return {example.id: (name, example) for name in SPLITS for example in dataset.examples(name)}


def _changed(gone: dict[str, Example], come: dict[str, Example]) -> list[ChangedRow]:
    """Pairs of rows, one of each version, with the same source and request but another answer."""
    waiting: defaultdict[tuple[str, str], list[str]] = defaultdict(list)
    for name in sorted(come, reverse=True):
        waiting[come[name].source, request_text(come[name].messages, visible)].append(name)
    pairs = []
    for name in sorted(gone):
        same = waiting[gone[name].source, request_text(gone[name].messages, visible)]
        if same:
            pairs.append(ChangedRow(before=name, after=same.pop()))
    return pairs


def _shift(
    old: dict[str, tuple[str, Example]], new: dict[str, tuple[str, Example]], attribute: str
) -> dict[str, tuple[int, int]]:
    counts = [Counter(str(getattr(one, attribute) or "") for _, one in rows.values()) for rows in (old, new)]
    return _both(*counts)


def _both(before: Counter[str], after: Counter[str]) -> dict[str, tuple[int, int]]:
    return {value: (before[value], after[value]) for value in sorted(before.keys() | after.keys())}


def removed_sample(dataset: Dataset, root: Path, each: int) -> dict[str, list[RemovedRow]]:
    """Reason -> at most `each` of the rows that were removed for it, as their files have them.

    The rows are read from the sources again, since removed rows are not stored: they may be private. Their hashes
    decide which ones are shown, so nobody chooses them. Raises Refused where a source has changed since the build.
    """
    classes: defaultdict[str, list[RemovedRow]] = defaultdict(list)
    for entry in sorted(dataset.removed(), key=lambda entry: digest_of(entry.model_dump())):
        if len(classes[entry.reason]) < each:
            classes[entry.reason].append(entry)
    wanted = {(entry.source, entry.row) for entries in classes.values() for entry in entries}
    fields: dict[tuple[str, int], Any] = {}
    read = {source.path: source.digest for source in dataset.body.sources}
    for file in find_files(DataSettings.model_validate(dataset.body.settings).sources, root):
        if all(source != file.name for source, _ in wanted):
            continue
        with open_source(file) as opened:
            if opened.digest != read.get(file.name):
                fix = "restore it, or build the data again"
                raise Refused("the file changed since the build", where=file.name, fix=fix)
            for row in opened.rows():
                if (place := (file.name, row.number)) in wanted:
                    # Dates, bytes and NaN of Parquet become text.
                    fields[place] = json.loads(json.dumps(dict(row.fields), default=str), parse_constant=str)
    return {
        reason: [entry.model_copy(update={"fields": fields.get((entry.source, entry.row))}) for entry in entries]
        for reason, entries in sorted(classes.items())
    }
