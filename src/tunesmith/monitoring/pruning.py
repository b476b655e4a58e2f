"""What takes a store's space, and `store prune`: delete what no policy keeps and nothing needs.

A training goes with everything that was made from it, so that no record names one that is gone. What a registered
version reaches stays, whatever became of the version. So do datasets, and all that was not made from a training.

The index forgets the records in one transaction with the audit entry. From then on they are gone, and whoever prunes
next deletes the files that a killed process left: those of records that are not in the index and were made from a
training that the log says was pruned. Other files without a place in the index stay: an older database may have been
put back. Files go in write transactions, within a day of an entry in the log; for that day a record enters the index
only while its files are there. So neither misses the other.
"""

from __future__ import annotations

import json
import os
import time
from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import suppress
from datetime import datetime
from graphlib import TopologicalSorter
from pathlib import Path
from typing import Any, Self

from sqlalchemy import delete, select

from tunesmith.core.system.scratch import remove_leftovers_below
from tunesmith.core.values import View
from tunesmith.monitoring.erasure import resume
from tunesmith.monitoring.settings import KeepSettings
from tunesmith.monitoring.traces import Place, in_use, places_of, size_of, work_folders
from tunesmith.store import audit
from tunesmith.store.blobs import named_digest
from tunesmith.store.locks import COPYING, LockHeld
from tunesmith.store.people.identities import require
from tunesmith.store.records import KINDS, Record, ancestors, decode
from tunesmith.store.store import DATABASE, PREFIXES, PRUNE, Store, blob_key, record_key
from tunesmith.store.tables import AuditRow, EdgeRow, ErasedRow, MemoRow, RecordRow

FRESH = 86_400.0  # seconds in which what was written may not be named by its record yet, or may be used by a run
_TOGETHER = 20  # objects that are deleted in one transaction, for which other writers wait
_PURPOSE = "pruning the store"


class Usage(View):
    """What takes a store's space, the largest first."""

    places: tuple[Place, ...]
    bytes: int

    @classmethod
    def by(cls, sized: Iterable[tuple[str, int]], **more: Any) -> Self:
        """Sums of what lies in each place. sized: places, with the bytes of one thing there."""
        places = places_of(sized)
        return cls(places=places, bytes=sum(place.bytes for place in places), **more)


class Pruned(Usage):
    """What went, or would go. done: False where nothing was deleted.

    trainings: digests of those that went. in_use: who may use a training now, so that none goes.
    """

    done: bool
    trainings: tuple[str, ...]
    in_use: tuple[str, ...]


class _Survey:
    """A store's objects. sizes, written: in bytes, and when, by key. records: by their names, also those that the
    index does not have; files: their keys."""

    def __init__(self, store: Store) -> None:
        with store.reading() as session:
            erased = {row.old: row.new for row in session.scalars(select(ErasedRow))}
        self._store = Store(store.root, store.url, store.blobs, erased)
        names = {self._store.left_of(old, record_key): old for old in erased.keys() - set(erased.values())}
        listed = [each for prefix in PREFIXES for each in store.blobs.entries(prefix)]
        self.sizes = {key: size for key, size, _ in listed}
        self.written = {key: written for key, _, written in listed}
        self.records: dict[str, Record] = {}
        self.files: dict[str, str] = {}
        for key in (key for key in self.sizes if key.startswith("records/")):
            with suppress(FileNotFoundError):  # an erasure replaced it meanwhile
                if (digest := named_digest(key)) is not None:
                    # Its digest says that it was read strictly when it was made; to do so again takes long.
                    record = decode(store.blobs.get(key), digest, store.blobs.where(key), json.loads)
                    self.records[name := names.get(digest, digest)] = record
                    self.files[name] = key

    def record(self, name: str) -> Record:
        """A record, also one that was made since. Raises Refused where it is lost: nobody knows what it names."""
        if name not in self.records:
            self.records[name] = self._store.record(name)
        return self.records[name]

    def blobs_of(self, records: Iterable[str]) -> set[str]:
        """The keys of the blobs that records name, and of what erasures left of them."""
        named = {blob for name in records for blob in self.record(name).blobs.values()}
        return {blob_key(each) for blob in named for each in (blob, self._store.left_of(blob, blob_key))}

    def candidates(self) -> Mapping[str, set[str]]:
        """Training -> the names of its candidates."""
        named: dict[str, set[str]] = defaultdict(set)
        for record in self.records.values():
            if record.kind == "candidate" and "training" in record.parents:
                named[record.parents["training"]].add(str(record.body["name"]))
        return named

    def made_from(self, roots: Iterable[str]) -> set[str]:
        """Some records, and all that were made from them."""
        found, some = set[str](), set(roots)
        while some:
            found |= some
            some = {name for name, each in self.records.items() if not found.isdisjoint(each.parents.values())} - found
        return found


def usage(store: Store) -> Usage:
    """What takes the space of a store, of its database where that is SQLite, and of this machine's folders."""
    survey, owned, sized = _Survey(store), set[str](), list[tuple[str, int]]()
    names, kinds = survey.candidates(), list(KINDS)
    for name, record in sorted(survey.records.items(), key=lambda one: kinds.index(one[1].kind)):
        own = (survey.blobs_of([name]) & survey.sizes.keys()) - owned
        owned |= own
        of = f"trainings of {', '.join(sorted(names.get(name, ['no candidate'])))}"
        place = of if record.kind == "training" else f"files of {record.kind} records"
        sized += [(place, sum(survey.sizes[key] for key in own))] if record.blobs else []
    rest = ((key.partition("/")[0], size) for key, size in survey.sizes.items() if key not in owned)
    sized += [(folder.replace("blobs", "blobs that no record names"), size) for folder, size in rest]
    sized += [(_work(folder), size_of(folder)[0]) for folder in work_folders(store)]
    sized += [("copies of a bucket on this machine", size_of(cache)[0]) for cache in store.root.glob("cache")]
    sized += [("database", file.stat().st_size) for file in store.root.glob(f"{DATABASE}*")]
    return Usage.by(sized)


def prune(store: Store, keep: KeepSettings, *, actor: str, dry_run: bool = False) -> Pruned:
    """Delete what the settings do not keep, and what nothing names. dry_run: change nothing.

    Raises LockHeld while somebody prunes, erases or copies the store, and Refused for a record that is damaged or lost,
    since nobody knows what it names.
    """
    require(store, actor, PRUNE)
    resume(store)
    busy, now = in_use(store, ()), time.time()
    with store.lock(COPYING, _PURPOSE):
        survey = _Survey(store)
        sizes = {} if keep.work is None else {folder: size_of(folder) for folder in work_folders(store)}
        folders = {folder: size for folder, (size, changed) in sizes.items() if changed < now - (keep.work or 0)}
        with store.reading() if dry_run else store.writing() as session:
            made = {row.digest: row.created_at for row in session.scalars(select(RecordRow))}
            trainings = [] if busy else _trainings(survey, made, keep, now)
            log = session.scalars(select(AuditRow.detail).where(AuditRow.action == PRUNE))
            left = survey.made_from({each for detail in log for each in detail["trainings"]} - made.keys())
            going = survey.made_from(trainings)
            keys = list(_keys(survey, going | (left - made.keys()), now))
            sized = [(f"files in {key.partition('/')[0]}/", survey.sizes[key]) for key in keys]
            sized += [(_work(folder), size) for folder, size in folders.items()]
            done = Pruned.by(sized, done=not dry_run, trainings=tuple(trainings), in_use=tuple(busy))
            if sized and not dry_run:
                for column in (RecordRow.digest, EdgeRow.child, MemoRow.digest):
                    for name in sorted(going):
                        session.execute(delete(column.class_).where(column == name))
                audit.append(session, actor=actor, action=PRUNE, subject="store", detail=done.document())
        if not dry_run:
            remove_leftovers_below(store.root)
            _delete(store, survey, keys, made.keys() - going)
            for folder in folders:  # at once: half a folder would look as if it was used
                with suppress(LockHeld, FileNotFoundError), store.lock(folder.name, _PURPOSE), store.scratch() as new:
                    os.replace(folder, new / folder.name)
    return done


def _trainings(survey: _Survey, made: Mapping[str, str], keep: KeepSettings, now: float) -> list[str]:
    """The trainings that go, oldest first. made: when each record that is in the index was."""
    trainings = [name for name in sorted(made, key=lambda name: made[name]) if survey.record(name).kind == "training"]
    names, several = survey.candidates(), defaultdict[str, list[str]](list)
    for training in trainings:
        for candidate in names.get(training, [""]):
            several[candidate].append(training)
    stay = {each for trained in several.values() for each in trained[-(keep.trainings or len(trained)) :]}
    # Also versions whose registration was stopped: their folders are there.
    needed = {name for name, record in survey.records.items() if record.kind == "version"}
    needed |= {name for name, at in made.items() if datetime.fromisoformat(at).timestamp() > now - FRESH}
    stay |= ancestors(survey.record, needed).keys()
    return [each for each in trainings if each not in stay]


def _keys(survey: _Survey, gone: set[str], now: float) -> Iterator[str]:
    """The objects to delete, in order: blobs, then records, each before those that it names. So what a killed process
    leaves is found again."""
    gone = gone & survey.files.keys()
    needed, freed = survey.blobs_of(survey.records.keys() - gone), survey.blobs_of(gone)
    for key, written in survey.written.items():
        stray = key.startswith("blobs/") and named_digest(key) is not None and written < now - FRESH
        if (stray or key in freed) and key not in needed:
            yield key
    order = TopologicalSorter({name: gone & {*survey.records[name].parents.values()} for name in gone})
    yield from (survey.files[name] for name in reversed([*order.static_order()]))


def _delete(store: Store, survey: _Survey, keys: list[str], index: Collection[str]) -> None:
    """Delete objects, without those that records name which were indexed meanwhile."""
    for start in range(0, len(keys), _TOGETHER):
        with store.writing() as session:
            new = set(session.scalars(select(RecordRow.digest))).difference(index)
            needed = survey.blobs_of(new) | set(map(record_key, new))
            for key in keys[start : start + _TOGETHER]:
                if key not in needed:
                    store.blobs.delete(key)


def _work(folder: Path) -> str:
    return f"work on this machine: {folder.name.partition('-')[0]}"
