"""Dataset versions: build, list, inspect, verify, compare, describe and sign them; their rows page by page."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import Field
from sqlalchemy import select

from tunesmith.core.errors import NextStep, NotThere, Refused, UsageError
from tunesmith.core.messages import Message
from tunesmith.core.progress import SILENT, Progress
from tunesmith.core.text.display import json_text
from tunesmith.core.values import Omitted, Page, View
from tunesmith.data.building.shards import LocalRunner, ShardRunner
from tunesmith.data.building.signoff import (
    DatasetVerification,
    SignOff,
    sign_off,
    sign_offs,
    sign_offs_of,
    verify_dataset,
)
from tunesmith.data.dataset import SPLITS, Dataset, DatasetSummary, Example, dataset_summary, load_dataset
from tunesmith.data.governance import cards
from tunesmith.data.governance.difference import Difference, removed_sample
from tunesmith.data.governance.difference import difference as compare_versions
from tunesmith.data.privacy.originals import new_key, read_originals
from tunesmith.pipeline.context import PipelineContext
from tunesmith.project import Project
from tunesmith.records.dataset import DatasetBody, Flag, QualityBody, RemovedRow
from tunesmith.services.actions import Acting, Because, Named, Request, action
from tunesmith.store.database import paged
from tunesmith.store.store import Store
from tunesmith.store.tables import RecordRow

EACH_PAGE = 25


class ShownDataset(DatasetSummary):
    """A dataset version with the first rows of a split, or of those that were removed. total: rows of that split."""

    split: str
    examples: tuple[Example | RemovedRow, ...]
    total: int = Field(exclude=True)


class Originals(View):
    """What pseudonyms stand for: example -> pseudonym -> original text."""

    originals: dict[str, dict[str, str]]


class OriginalsKey(View):
    """A new key for $TUNESMITH_ORIGINALS_KEY."""

    key: str


class RemovedRows(View):
    """Samples of the rows that were left out: reason -> rows."""

    dataset: str
    removed: dict[str, tuple[RemovedRow, ...]]


class SignDataset(Request):
    """A steward's sign-off. dataset: a dataset version's digest or its start; reason: what was checked."""

    dataset: Named
    reason: Because


class SignedDataset(View):
    """A steward's sign-off. signoff: its record's digest."""

    dataset: str
    steward: str
    signoff: str


class QualityReport(QualityBody):
    """Rows that a person should look at. quality: the record's digest; examples: some flags.

    flagged: flag -> distinct rows.
    """

    dataset: str
    quality: str
    examples: tuple[Flag, ...]
    flagged: dict[str, int] = Field(exclude=True)


class DatasetLine(View):
    """A dataset version in a list. at: when it was sealed; signed: the stewards who signed it off.

    unreadable: why its record cannot be read; then there are no rows to count.
    """

    dataset: str
    at: str
    read: Omitted[int] = None
    kept: Omitted[int] = None
    removed: Omitted[int] = None
    splits: Omitted[Mapping[str, int]] = None
    signed: tuple[str, ...]
    unreadable: Omitted[str] = None


class DatasetPage(Page):
    """Some dataset versions, newest first."""

    datasets: tuple[DatasetLine, ...]


class FoundRow(View):
    """A row of a split, or one that was left out: without texts, and row is its number in the source."""

    id: str | None
    split: str
    source: str
    licence: str = ""
    group: str = ""
    subject: str | None = None
    tenant: str | None = None
    region: str | None = None
    row: int | None = None
    reason: str = ""
    messages: tuple[Message, ...] = ()


class RowPage(Page):
    """Some rows of a dataset version that match."""

    rows: tuple[FoundRow, ...]


class SignOffList(View):
    """The sign-offs that count, oldest first."""

    sign_offs: tuple[SignOff, ...]


def build(
    project: Project, *, engine: Literal["local", "ray"] = "local", progress: Progress = SILENT
) -> DatasetSummary:
    """Read, check, clean, split and freeze the project's sources. engine: reads the files: this machine, or Ray's."""
    shards: ShardRunner = LocalRunner()
    if engine == "ray":
        from tunesmith.data.building.ray_runner import RayRunner

        shards = RayRunner()
    return dataset_summary(project.store, PipelineContext(project, progress, shards=shards).dataset.digest)


def summary(store: Store, dataset: str) -> DatasetSummary:
    """The account of a dataset version: what happened to every row, splits, leakage, licences and privacy."""
    return dataset_summary(store, find_dataset(store, dataset))


def show(store: Store, dataset: str | None = None, *, split: str = "train", limit: int = 0) -> ShownDataset:
    """A dataset version, by default the newest, with the first rows of a split. limit: how many; 0 for all.

    split: train, validation, test or removed.
    """
    digest = find_dataset(store, dataset)
    loaded = load_dataset(store, digest)
    if split == "removed":
        rows: Sequence[Example | RemovedRow] = loaded.removed()
    else:
        rows = loaded.examples(split)
    shown = tuple(rows[:limit] if limit else rows)
    return ShownDataset(**dict(dataset_summary(store, digest)), split=split, examples=shown, total=len(rows))


def verify(store: Store, dataset: str | None = None) -> DatasetVerification:
    """Recompute the digests, counts and leakage of a dataset version, by default of the newest."""
    return verify_dataset(store, find_dataset(store, dataset))


def originals(project: Project, row: str | None = None) -> Originals:
    """What the pseudonyms of one row, or of all rows, stand for. Needs the key in $TUNESMITH_ORIGINALS_KEY."""
    place = project.settings.data.privacy.originals
    if place is None:
        raise UsageError("this project keeps no originals", where="data.privacy.originals")
    known = read_originals(project.root / place)
    if row is not None and row not in known:
        raise UsageError(f"nothing was replaced in a row {row!r}", fix=NextStep("see its rows", "data show"))
    return Originals(originals=known if row is None else {row: known[row]})


def new_originals_key() -> OriginalsKey:
    """Make a key for the map from pseudonyms to originals. It is kept nowhere."""
    return OriginalsKey(key=new_key())


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


@action(
    "data.sign", says="signed off a dataset version", permission="data.sign", tokens=("rows",),
    at="/datasets/{dataset}/sign-offs", whole=True, form=True, reads_files=True,
)  # fmt: skip
def sign(acting: Acting, asked: SignDataset) -> SignedDataset:
    """Verify a dataset version and sign it off as its steward."""
    acting.unchanged()
    digest, steward = find_dataset(acting.store, asked.dataset), acting.actor
    signoff = sign_off(acting.store, digest, steward=steward, reason=asked.reason)
    return SignedDataset(dataset=digest, steward=steward, signoff=signoff)


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
    from tunesmith.data.quality.flags import examine_quality, read_flags

    digest, embed = store.find_record(dataset), None
    if alike:
        from tunesmith.models.embedding import find_embedder

        embed = find_embedder(progress).embed
    options = {"label_noise": label_noise, "language": language, "names": names}
    record = store.record(examine_quality(store, load_dataset(store, digest), embed=embed, **options))
    body, flags = QualityBody.of(record), read_flags(store, record)
    flagged = {what: len({flag.id for flag in flags if flag.flag == what}) for what in body.looked_for}
    examples = tuple(flags[:limit] if limit else flags)
    return QualityReport(**dict(body), dataset=digest, quality=record.digest, examples=examples, flagged=flagged)


def list_datasets(store: Store, page: int = 1) -> DatasetPage:
    """Dataset versions, newest first. page: from 1; one beyond the last gives the last."""
    query = select(RecordRow.digest, RecordRow.created_at).where(RecordRow.kind == "dataset")
    with store.reading() as session:
        at, newest = paged(session, query.order_by(RecordRow.created_at.desc(), RecordRow.digest), page, EACH_PAGE)
        newest_first = list(session.execute(newest))
    signed = sign_offs_of(store, [digest for digest, _ in newest_first])
    lines = []
    for digest, sealed in newest_first:
        try:
            body = DatasetBody.read(store, digest)
            counts = {"read": body.rows.read, "kept": body.rows.kept, "removed": sum(body.rows.removed.values())}
            stated: dict[str, Any] = {**counts, "splits": {name: body.splits[name] for name in SPLITS}}
        except (Refused, UsageError) as error:  # it must not hide the others
            stated = {"unreadable": error.what}
        stewards = tuple(one.steward for one in signed[digest])
        lines.append(DatasetLine(dataset=digest, at=sealed, signed=stewards, **stated))
    return DatasetPage(**dict(at), datasets=tuple(lines))


def find_dataset(store: Store, given: str | None = None) -> str:
    """The digest of the dataset version that begins with `given`, by default of the newest. Raises NotThere."""
    if given is None:
        known = store.records_of("dataset")
        if not known:
            raise NotThere(
                "there is no dataset version yet", where=str(store.root), fix=NextStep("build one", "data build")
            )
        return known[-1]
    with contextlib.suppress(UsageError):
        digest = store.find_record(given)
        if store.record(digest).kind == "dataset":
            return digest
    raise NotThere("there is no such dataset version", where=given, fix=NextStep("list them", "data list"))


def list_sign_offs(store: Store, dataset: str) -> SignOffList:
    """The sign-offs of a dataset version that count."""
    return SignOffList(sign_offs=tuple(sign_offs(store, dataset)))


def list_rows(
    acting: Acting, dataset: str, *, split: str = "train", reason: str = "", search: str = "", page: int = 1
) -> RowPage:
    """Rows of a split, or with split "removed" those that were left out.

    reason: only rows left out for it. search: only rows with this text in a turn, whatever the case; for rows left out,
    in the source's name. Raises Forbidden for people who may not read rows, UsageError for an unknown split.
    """
    acting.user.require("row.read")
    acting.user.require_everything()
    loaded = load_dataset(acting.store, dataset)
    rows: Sequence[Example | RemovedRow]
    if split == "removed":
        wanted = search.casefold()
        left_out = [row for row in loaded.removed() if reason in ("", row.reason) and wanted in row.source.casefold()]
        at, rows = Page.cut(left_out, page, EACH_PAGE)
    elif split in SPLITS:
        at, lines = Page.cut(list(_matching(acting.store, loaded, split, search)), page, EACH_PAGE)
        rows = [Example.model_validate_json(line) for line in lines]
    else:
        raise UsageError(f"there is no split {split!r}", fix=f"one of {', '.join((*SPLITS, 'removed'))}")
    return RowPage(**dict(at), rows=tuple(FoundRow.of(row, split=split) for row in rows))


def rows_by_id(acting: Acting, dataset: str, ids: Collection[str]) -> dict[str, FoundRow]:
    """Id -> row, for those of the ids that a dataset version holds. Raises Forbidden as `list_rows` does."""
    acting.user.require("row.read")
    acting.user.require_everything()
    loaded, wanted = load_dataset(acting.store, dataset), {name.encode() for name in ids}
    rows: dict[str, FoundRow] = {}
    for split in SPLITS if wanted else ():
        for line in acting.store.read_blob(loaded.record.blobs[f"{split}.jsonl"]).splitlines():
            if _id_of(line) in wanted:
                example = Example.model_validate_json(line)
                rows[example.id] = FoundRow.of(example, split=split)
    return rows


def _matching(store: Store, dataset: Dataset, split: str, search: str) -> Iterator[bytes]:
    """The lines of a split whose turns hold a text. A line is parsed only if it holds the text somewhere."""
    wanted = search.casefold()
    coded = json.dumps(wanted, ensure_ascii=False)[1:-1]
    for line in store.read_blob(dataset.record.blobs[f"{split}.jsonl"]).splitlines():
        if not wanted:
            yield line
        elif coded in line.decode().casefold():
            turns = Example.model_validate_json(line).messages
            if any(wanted in text.casefold() for turn in turns for text in turn.texts()):
                yield line


def _id_of(line: bytes) -> bytes:
    """The id in an example's canonical line, in which the key comes before all texts but the group's."""
    return line.partition(b'"id":"')[2].partition(b'"')[0]
