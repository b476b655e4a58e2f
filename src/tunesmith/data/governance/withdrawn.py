"""Rows that were recalled: a build leaves them out, whatever the sources still hold.

A row is known again by what it says, not by where it stands: else the copy of it in another file, left out as its
duplicate until then, would take its place.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from tunesmith.core.digests import digest_of
from tunesmith.data.dataset import SPLITS, Example, load_dataset
from tunesmith.data.splitting.duplicates import answer_key, request_key
from tunesmith.store import database
from tunesmith.store.recalls import causes
from tunesmith.store.store import Store


@dataclass(frozen=True, slots=True)
class Withdrawn:
    """values: `source`, `licence`, `subject` or `row` -> what was withdrawn; contents: of the rows, source left out."""

    values: Mapping[str, frozenset[str]] = field(default_factory=dict)
    contents: frozenset[str] = frozenset()

    def holds(self, example: Example) -> bool:
        """Whether an example is among what was withdrawn."""
        of = {"row": example.id, "source": example.source, "licence": example.licence, "subject": example.subject}
        if any(of[kind] in values for kind, values in self.values.items()):
            return True
        return bool(self.contents) and content_key(example) in self.contents

    def as_json(self) -> dict[str, Any]:
        """What a build depends on."""
        return {kind: sorted(values) for kind, values in self.values.items()} | {"contents": sorted(self.contents)}


def content_key(example: Example) -> str:
    """The same for two rows that a build takes for exact duplicates."""
    return digest_of([request_key(example.request), answer_key(example.answer)])


def load_withdrawn(store: Store) -> Withdrawn:
    """What was recalled from a store's rows until now."""
    with database.reading(store.engine) as session:
        recalled = causes(session)
    values: defaultdict[str, set[str]] = defaultdict(set)
    contents: set[str] = set()
    for cause, digests in recalled.items():
        kind, _, value = cause.partition(" ")
        if kind in ("row", "source", "licence", "subject"):
            values[kind].add(value)
        if kind == "row":
            contents.update(_contents(store, digests, value))
    return Withdrawn({kind: frozenset(some) for kind, some in sorted(values.items())}, frozenset(contents))


def _contents(store: Store, digests: list[str], row: str) -> set[str]:
    """What the row says, from the recalled dataset versions that hold it."""
    datasets = [digest for digest in digests if store.record(digest).kind == "dataset"]
    return {
        content_key(example)
        for digest in datasets
        for split in SPLITS
        for example in load_dataset(store, digest).examples(split)
        if example.id == row
    }
