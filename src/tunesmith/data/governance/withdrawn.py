"""Recalled rows, which a build leaves out even where the sources still have them.

A row is recognised by its folded content and not by its place, so that no copy in another file takes its place, nor one
with hidden characters, accents or look-alike letters.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from tunesmith.core.digests import digest_of
from tunesmith.core.text.folding import fold
from tunesmith.data.dataset import SPLITS, Example, load_dataset
from tunesmith.data.splitting.duplicates import answer_key, request_key
from tunesmith.store import database
from tunesmith.store.recalls import causes
from tunesmith.store.store import Store


@dataclass(frozen=True, slots=True)
class Withdrawn:
    """values: `source`, `licence`, `subject` or `row` -> what was recalled. contents: content keys of recalled rows."""

    values: Mapping[str, frozenset[str]] = field(default_factory=dict)
    contents: frozenset[str] = frozenset()

    def holds(self, example: Example) -> bool:
        """Whether an example was recalled."""
        of = {"row": example.id, "source": example.source, "licence": example.licence, "subject": example.subject}
        if any(of[kind] in values for kind, values in self.values.items()):
            return True
        return bool(self.contents) and content_key(example) in self.contents

    def as_json(self) -> dict[str, Any]:
        """The values and contents as JSON, which a build's memo depends on."""
        return {kind: sorted(values) for kind, values in self.values.items()} | {"contents": sorted(self.contents)}


def content_key(example: Example) -> str:
    """A key that is equal for two rows with the same folded request and answer."""
    return digest_of([request_key(example.request, fold), fold(answer_key(example.answer))])


def load_withdrawn(store: Store) -> Withdrawn:
    """Everything that was recalled from a store's rows so far."""
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
    """The content keys of a row in the recalled dataset versions that contain it."""
    datasets = [digest for digest in digests if store.record(digest).kind == "dataset"]
    return {
        content_key(example)
        for digest in datasets
        for split in SPLITS
        for example in load_dataset(store, digest).examples(split)
        if example.id == row
    }
