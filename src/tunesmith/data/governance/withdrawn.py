"""Recalled rows, which a build leaves out even where the sources still have them.

A row, and a row of a recalled subject, is recognised by its folded content and not by its place, so that no copy in
another file takes its place, nor one with another system turn, hidden characters, accents or look-alike letters.
Sources and subjects are recognised by their names in one spelling (`same_name`), and licences by expressions that need
them.
"""

from __future__ import annotations

import contextlib
import difflib
import json
from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence, Set
from typing import Final, NamedTuple

from sqlalchemy.orm import Session

from tunesmith.core.digests import digest_bytes, digest_of
from tunesmith.core.reading.strict_json import parse_json
from tunesmith.core.system.files import write_atomic
from tunesmith.core.text.folding import fold, visible
from tunesmith.data.dataset import SPLITS, SUBJECTS, Example, load_dataset
from tunesmith.data.duplicates import answer_key, request_key
from tunesmith.data.governance.licences import needs
from tunesmith.store.records import causes
from tunesmith.store.store import Store

ROW_CAUSES: Final = ("row", "source", "licence", "subject", "tenant")
_BY_CONTENT = ("row", "subject")
_BY_NAME = ("source", "subject")
_LONGEST, _SHOWN = 200, 100  # characters of a name; a longer one is compared by its digest
_ALIKE = 0.85  # of difflib's ratio: names that one slip of the pen may have made of each other
_REVISION = 2  # raise it when the same versions give other contents of recalled rows


class Withdrawn(NamedTuple):
    """values: `source`, `licence`, `subject` or `row` -> what was recalled. contents: content keys of recalled rows."""

    values: Mapping[str, frozenset[str]] = {}
    contents: frozenset[str] = frozenset()

    def names(self, kind: str, stated: str | None) -> bool:
        """Whether a recall of this kind reaches what states this."""
        values = self.values.get(kind, frozenset())
        if kind == "licence":
            return any(reaches(kind, value, stated) for value in values)
        if stated is None:
            return False
        return same_name(kind, stated) in values

    def holds(self, example: Example) -> bool:
        """Whether an example was recalled."""
        return any(self.names(kind, _value(example, kind)) for kind in self.values) or self._has_copy(example)

    def _has_copy(self, example: Example) -> bool:
        return bool(self.contents) and content_key(example) in self.contents

    def reaches_copies(self, example: Example) -> bool:
        """Whether rows with the content of a recalled example are recalled with it: not where its source or licence is
        what was recalled."""
        stated = any(_value(example, kind) in self.values.get(kind, ()) for kind in _BY_CONTENT)
        return stated or self._has_copy(example)

    def as_json(self) -> dict[str, list[str]]:
        """The values and contents as JSON, which a build's memo depends on."""
        return {kind: sorted(values) for kind, values in self.values.items()} | {"contents": sorted(self.contents)}


class Traced(NamedTuple):
    """Rows that a cause reaches: their ids, and where copies are reached too, the content keys."""

    ids: frozenset[str]
    contents: Set[str]


class TracedRows:
    """The rows of dataset versions, by which a cause is followed to its rows' copies and edits.

    kinds: of the causes that are followed. rows: dataset version -> split -> ids.
    """

    def __init__(self, store: Store, digests: Iterable[str], kinds: Collection[str]) -> None:
        self.rows: dict[str, dict[str, list[str]]] = {}
        self._by_content = any(kind in _BY_CONTENT for kind in kinds)
        self._named: dict[str, defaultdict[str, set[str]]] = {kind: defaultdict(set) for kind in kinds}
        self._contents: dict[str, str] = {}  # a row's id -> its content key
        self._holders: defaultdict[str, list[str]] = defaultdict(list)  # a content key -> its rows' ids
        self._edits: defaultdict[str, set[str]] = defaultdict(set)  # a reviewed row's id -> what it said and says
        # (version, split) -> (kind, value) -> rows, of sources and licences
        self._stated: defaultdict[tuple[str, str], Counter[tuple[str, str]]] = defaultdict(Counter)
        for digest in digests:
            dataset = load_dataset(store, digest)
            self.rows[digest] = {split: self._add(digest, split, dataset.examples(split)) for split in SPLITS}
            for row, contents in dataset.body.edits.items():
                self._edits[row].update(contents)
            if SUBJECTS in dataset.record.blobs and "subject" in self._named:
                for line in store.read_blob(dataset.record.blobs[SUBJECTS]).splitlines():
                    copy = parse_json(line)
                    self._named["subject"][same_name("subject", copy["subject"])].add(copy["id"])

    def _add(self, digest: str, split: str, examples: Sequence[Example]) -> list[str]:
        for example in examples:
            if self._by_content and example.id not in self._contents:
                content = self._contents[example.id] = content_key(example)
                self._holders[content].append(example.id)
            for kind, by_value in self._named.items():
                if (value := _value(example, kind)) is not None:
                    by_value[value].add(example.id)
                    if kind not in _BY_CONTENT:
                        self._stated[digest, split][kind, value] += 1
        return [example.id for example in examples]

    def licences(self) -> set[str]:
        """The licence expressions of the rows, where licences are followed."""
        return set(self._named.get("licence", ()))

    def reached(self, kind: str, value: str) -> dict[str, dict[str, int]]:
        """Dataset version -> split -> how many rows a cause reaches, for the versions in which it reaches any.

        A row whose licence was corrected keeps its id, so a licence reaches only versions that state it.
        """
        ids, named = self.trace(kind, value).ids, self._values(kind, value)
        versions: dict[str, dict[str, int]] = {}
        for digest, splits in self.rows.items():
            counts = {split: sum(self._stated[digest, split][kind, each] for each in named) for split in splits}
            if kind in _BY_CONTENT:
                counts = {split: sum(name in ids for name in names) for split, names in splits.items()}
            if any(counts.values()):
                versions[digest] = counts
        return versions

    def trace(self, kind: str, value: str) -> Traced:
        """The rows of a cause; of a row or a subject also every copy, and the rows before and after an edit."""
        ids = {name for each in self._values(kind, value) for name in self._named[kind].get(each, ())}
        if kind not in _BY_CONTENT:
            return Traced(frozenset(ids), frozenset())
        if kind == "row":
            ids.add(value)  # no version holds a row that was edited before the first build
        while True:
            contents = {self._contents[name] for name in ids if name in self._contents}
            contents.update(*(self._edits[name] for name in ids & self._edits.keys()))
            more = {name for content in contents for name in self._holders.get(content, ())}
            more |= {name for name, edited in self._edits.items() if not edited.isdisjoint(contents)}
            if more <= ids:
                return Traced(frozenset(ids), contents)
            ids |= more

    def _values(self, kind: str, value: str) -> list[str]:
        """What rows state that a cause reaches."""
        if kind == "licence":
            return [each for each in self._named[kind] if reaches(kind, value, each)]
        return [same_name(kind, value)]

    def near(self, kind: str, value: str, recalled: Collection[str]) -> list[str]:
        """Names of sources or subjects that a recall does not reach and that may mean the same, in one spelling each.

        Those with the same words but for accents and look-alike letters, with more or fewer words, and subjects with
        nearly the same letters where no digit says that they are ids. recalled: values that are withdrawn already.
        """
        if kind not in _BY_NAME:
            return []
        own, words = fold(value), _words(value)
        others = {each: fold(each) for each in self._named[kind].keys() - {same_name(kind, value), *recalled}}
        spelled = (
            [each for each in others.values() if not any(map(str.isdigit, own + each))] if kind == "subject" else []
        )
        alike = set(difflib.get_close_matches(own, spelled, n=50, cutoff=_ALIKE))
        return sorted(
            each for each, folded in others.items()
            if folded in alike or ((its := _words(each)) and words and (its <= words or words <= its))
        )  # fmt: skip


def reaches(kind: str, value: str, stated: str | None) -> bool:
    """Whether the recall of a value reaches what states this: of a licence, also an expression that needs it."""
    if kind == "licence":
        return stated == value or (stated is not None and needs(stated, value))
    return stated is not None and same_name(kind, stated) == same_name(kind, value)


def content_key(example: Example) -> str:
    """A key that equal folded requests with equal answers share, whatever their system turns and tools."""
    spoken = [turn.model_copy(update={"tools": None}) for turn in example.request if turn.role != "system"]
    return digest_of([request_key(spoken, fold), fold(answer_key(example.answer))])


def recalled_values(session: Session, kind: str) -> dict[str, set[str]]:
    """What was recalled of a kind -> digests of the records that it reached. Recalls of before state a name as it was
    typed; here each is in its one spelling."""
    recalled: defaultdict[str, set[str]] = defaultdict(set)
    for cause, digests in causes(session).items():
        if cause.startswith(f"{kind} "):
            recalled[same_name(kind, cause.partition(" ")[2])].update(digests)
    return recalled


def load_withdrawn(store: Store) -> Withdrawn:
    """Everything that was recalled from a store's rows and documents so far."""
    with store.reading() as session:
        recalled = causes(session)
    values: defaultdict[str, set[str]] = defaultdict(set)
    datasets: set[str] = set()
    for cause, digests in recalled.items():
        kind, _, value = cause.partition(" ")
        if kind in ROW_CAUSES:
            values[kind].add(same_name(kind, value))
        if kind in _BY_CONTENT:
            datasets |= {digest for digest in digests if store.record(digest).kind == "dataset"}
    named = {kind: sorted(values.get(kind, ())) for kind in _BY_CONTENT}
    contents = _contents(store, named, sorted(datasets)) if datasets else frozenset()
    return Withdrawn({kind: frozenset(some) for kind, some in sorted(values.items())}, contents)


def _contents(store: Store, named: Mapping[str, Sequence[str]], datasets: Sequence[str]) -> frozenset[str]:
    """The content keys of recalled rows. They are kept in a file: to read all versions with them takes long."""
    kept, key = store.local("withdrawn.json"), digest_of([_REVISION, named, datasets])
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        before = parse_json(kept.read_bytes())
        if before["key"] == key:
            return frozenset(before["contents"])
    rows = TracedRows(store, datasets, _BY_CONTENT)
    contents = {each for kind, values in named.items() for value in values for each in rows.trace(kind, value).contents}
    write_atomic(kept, json.dumps({"key": key, "contents": sorted(contents)}).encode())
    return frozenset(contents)


def _value(example: Example, kind: str) -> str | None:
    value: str | None = getattr(example, "id" if kind == "row" else kind)
    return None if value is None else same_name(kind, value)


def same_name(kind: str, value: str) -> str:
    """The spelling by which a value is compared: of sources and subjects as a reader sees it, without case, in at most
    200 characters; of others the value itself."""
    if kind not in _BY_NAME:
        return value
    spelled = visible(value)
    return spelled if len(spelled) <= _LONGEST else f"{spelled[:_SHOWN]} {digest_bytes(spelled.encode())}"


def _words(name: str) -> frozenset[str]:
    return frozenset("".join(letter if letter.isalnum() else " " for letter in fold(name)).split())
