"""Dataset versions: build, inspect, verify, compare, describe and sign them."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

from pydantic import Field

from tunesmith.core.errors import UsageError
from tunesmith.core.progress import SILENT, Progress
from tunesmith.core.reading.strict_json import parse_json
from tunesmith.core.text.display import json_text
from tunesmith.core.view import Omitted, View
from tunesmith.data.building.shards import LocalRunner, ShardRunner
from tunesmith.data.building.summary import DatasetSummary, dataset_summary
from tunesmith.data.building.verify import DatasetVerification, verify_dataset
from tunesmith.data.dataset import load_dataset
from tunesmith.data.governance import cards
from tunesmith.data.governance.difference import Difference, removed_sample
from tunesmith.data.governance.difference import difference as compare_versions
from tunesmith.data.governance.signoff import sign_off, sign_offs
from tunesmith.data.privacy.originals import read_originals
from tunesmith.pipeline.context import PipelineContext
from tunesmith.project import Project
from tunesmith.store.people.identities import acting
from tunesmith.store.store import Store


class ShownDataset(DatasetSummary):
    """A dataset version with the first rows of a split, or of those that were removed. total: rows of that split."""

    split: str
    examples: tuple[dict[str, Any], ...]
    total: Annotated[int, Field(exclude=True)]


class Originals(View):
    """What pseudonyms stand for: example -> pseudonym -> original text."""

    originals: dict[str, dict[str, str]]


class RemovedRows(View):
    """Samples of the rows that were left out: reason -> rows."""

    dataset: str
    removed: dict[str, tuple[dict[str, Any], ...]]


class SignedDataset(View):
    """A steward's sign-off. signoff: its record's digest."""

    dataset: str
    steward: str
    signoff: str


class QualityReport(View):
    """Rows that a person should look at. quality: the record's digest; flags: flag -> rows; examples: some flags.

    flagged: flag -> distinct rows. balance: attribute -> value -> rows. names, languages, alike: what the
    options asked for.
    """

    dataset: str
    quality: str
    rows: int
    flags: dict[str, int]
    looked_for: tuple[str, ...]
    balance: dict[str, dict[str, Any]]
    names: Omitted[dict[str, Any]] = None
    languages: Omitted[dict[str, Any]] = None
    alike: Omitted[dict[str, Any]] = None
    examples: tuple[dict[str, Any], ...]
    flagged: Annotated[dict[str, int], Field(exclude=True)]


def build(project: Project, *, progress: Progress = SILENT, shards: ShardRunner | None = None) -> DatasetSummary:
    """Read, check, clean, split and freeze the project's sources. shards: reads the files; this machine by default."""
    digest = PipelineContext(project, progress, shards=shards or LocalRunner()).dataset.digest
    return dataset_summary(project.store, digest)


def show(store: Store, dataset: str | None = None, *, split: str = "train", limit: int = 0) -> ShownDataset:
    """A dataset version, by default the newest, with the first rows of a split. limit: how many; 0 for all.

    split: train, validation, test or removed.
    """
    digest = _find(store, dataset)
    loaded = load_dataset(store, digest)
    if split == "removed":
        rows = [dict(row) for row in loaded.removed()]
    else:
        rows = [example.model_dump(mode="json") for example in loaded.examples(split)]
    shown = tuple(rows[:limit] if limit else rows)
    return ShownDataset(**dict(dataset_summary(store, digest)), split=split, examples=shown, total=len(rows))


def summary(store: Store, dataset: str) -> DatasetSummary:
    """The account of a dataset version. Raises Refused where its record is missing or damaged."""
    return dataset_summary(store, dataset)


def verify(store: Store, dataset: str | None = None) -> DatasetVerification:
    """Recompute the digests, counts and leakage of a dataset version, by default of the newest."""
    return verify_dataset(store, _find(store, dataset))


def originals(project: Project, row: str | None = None) -> Originals:
    """What the pseudonyms of one row, or of all rows, stand for. Needs the key in $TUNESMITH_ORIGINALS_KEY."""
    place = project.settings.data.privacy.originals
    if place is None:
        raise UsageError("this project keeps no originals", where="data.privacy.originals")
    known = read_originals(project.root / place)
    if row is not None and row not in known:
        raise UsageError(f"nothing was replaced in a row {row!r}", fix="tunesmith data show names the rows")
    return Originals(originals=known if row is None else {row: known[row]})


def difference(store: Store, before: str, after: str) -> Difference:
    """What changed between two dataset versions: rows, splits, licences, balance."""
    return compare_versions(store, store.find_record(before), store.find_record(after))


def removed(store: Store, dataset: str, root: Path, each: int = 5) -> RemovedRows:
    """A sample of the rows that were left out, read again from the sources. each: rows for each reason."""
    digest = store.find_record(dataset)
    sample = removed_sample(load_dataset(store, digest), root, each)
    return RemovedRows(dataset=digest, removed={reason: tuple(rows) for reason, rows in sample.items()})


def datasheet(store: Store, dataset: str, name: str) -> tuple[str, str]:
    """The digest of a dataset version, and its datasheet in Markdown. name: of the project's folder."""
    digest = store.find_record(dataset)
    return digest, cards.datasheet(load_dataset(store, digest), name, sign_offs(store, digest))


def croissant(store: Store, dataset: str, name: str) -> tuple[str, str]:
    """The digest of a dataset version, and its Croissant 1.0 metadata (JSON-LD)."""
    digest = store.find_record(dataset)
    described = cards.croissant(load_dataset(store, digest), name)
    return digest, json_text(described, indent=2) + "\n"


def sign(store: Store, dataset: str, *, reason: str, actor: str | None = None) -> SignedDataset:
    """Verify a dataset version and sign it off as its steward. reason: what the steward checked."""
    digest, steward = store.find_record(dataset), acting(store, actor)
    return SignedDataset(
        dataset=digest, steward=steward, signoff=sign_off(store, digest, steward=steward, reason=reason)
    )


def quality(
    store: Store,
    dataset: str,
    *,
    label_noise: bool = False,
    language: bool = False,
    names: bool = False,
    alike: bool = False,
    limit: int = 0,
    progress: Progress = SILENT,
) -> QualityReport:
    """Flag rows that a person should look at. Drops none. limit: flags to return; 0 for all.

    label_noise, language, names and alike also look for wrong labels, other languages, people's names and requests that
    say the same.
    """
    from tunesmith.data.quality.flags import FLAGS, examine_quality

    digest, embed = store.find_record(dataset), None
    if alike:
        from tunesmith.models.embedding import find_embedder

        embed = find_embedder(progress).embed
    options = {"label_noise": label_noise, "language": language, "names": names}
    record = store.record(examine_quality(store, load_dataset(store, digest), embed=embed, **options))
    flags = [parse_json(line) for line in store.read_blob(record.blobs[FLAGS]).splitlines()]
    flagged = {what: len({flag["id"] for flag in flags if flag["flag"] == what}) for what in record.body["looked_for"]}
    examples = tuple(flags[:limit] if limit else flags)
    return QualityReport(dataset=digest, quality=record.digest, **record.body, examples=examples, flagged=flagged)


def _find(store: Store, prefix: str | None) -> str:
    """The digest of the dataset version that starts with prefix, or of the newest one."""
    if prefix is not None:
        return store.find_record(prefix)
    known = store.records_of("dataset")
    if not known:
        raise UsageError("there is no dataset version yet", where=str(store.root), fix="`tunesmith data build`")
    return known[-1]
