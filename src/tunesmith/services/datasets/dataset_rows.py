"""Lists of dataset versions, and their rows page by page: what the console shows of them."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator
from typing import Any

from sqlalchemy import func, select

from tunesmith.core.errors import UsageError
from tunesmith.core.messages import Message
from tunesmith.core.view import View
from tunesmith.data.dataset import SPLITS, Dataset, Example, load_dataset
from tunesmith.data.governance.signoff import sign_offs, sign_offs_of
from tunesmith.store import database
from tunesmith.store.people.identities import require
from tunesmith.store.store import Store
from tunesmith.store.tables import RecordRow

EACH_PAGE = 25


class DatasetLine(View):
    """A dataset version in a list. at: when it was sealed; signed: the stewards who signed it off."""

    dataset: str
    at: str
    read: int
    kept: int
    removed: int
    splits: dict[str, int]
    signed: tuple[str, ...]


class DatasetPage(View):
    """Some dataset versions, newest first. page: from 1."""

    datasets: tuple[DatasetLine, ...]
    total: int
    page: int
    pages: int


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


class RowPage(View):
    """Some rows of a dataset version that match. page: from 1. reasons: why rows were left out -> how many."""

    rows: tuple[FoundRow, ...]
    total: int
    page: int
    pages: int


class SignOff(View):
    """A steward's sign-off that counts. signoff: its record's digest."""

    steward: str
    reason: str
    at: str
    signoff: str


def list_datasets(store: Store, page: int = 1) -> DatasetPage:
    """Dataset versions, newest first. page: from 1; one beyond the last gives the last."""
    of_kind = RecordRow.kind == "dataset"
    with database.reading(store.engine) as session:
        total = session.scalar(select(func.count()).select_from(RecordRow).where(of_kind)) or 0
        page, pages = _within(page, total)
        query = select(RecordRow.digest, RecordRow.created_at).where(of_kind)
        newest = query.order_by(RecordRow.created_at.desc(), RecordRow.digest).offset((page - 1) * EACH_PAGE)
        found = list(session.execute(newest.limit(EACH_PAGE)))
    signed = sign_offs_of(store, [digest for digest, _ in found])
    lines = []
    for digest, at in found:
        body = store.record(digest, kind="dataset").body
        lines.append(
            DatasetLine(
                dataset=digest,
                at=at,
                read=body["rows"]["read"],
                kept=body["rows"]["kept"],
                removed=sum(body["rows"]["removed"].values()),
                splits={name: body["splits"][name] for name in SPLITS},
                signed=tuple(one["steward"] for one in signed[digest]),
            )
        )
    return DatasetPage(datasets=tuple(lines), total=total, page=page, pages=pages)


def is_dataset(store: Store, digest: str) -> bool:
    """Whether a digest is a dataset version's."""
    with database.reading(store.engine) as session:
        row = session.get(RecordRow, digest)
        return row is not None and row.kind == "dataset"


def list_sign_offs(store: Store, dataset: str) -> tuple[SignOff, ...]:
    """The sign-offs of a dataset version that count, oldest first."""
    return tuple(SignOff(**one) for one in sign_offs(store, dataset))


def list_rows(
    store: Store, dataset: str, *, actor: str, split: str = "train", reason: str = "", search: str = "", page: int = 1
) -> RowPage:
    """Rows of a split, or with split "removed" those that were left out.

    reason: only rows left out for it. search: only rows with this text in a turn, whatever the case; for rows left out,
    in the source's name. Raises Refused if actor may not read rows, UsageError for an unknown split.
    """
    require(store, actor, "row.read")
    loaded = load_dataset(store, dataset)
    if split == "removed":
        matching = [row for row in loaded.removed() if reason in ("", row["reason"])]
        wanted = search.casefold()
        matching = [row for row in matching if wanted in str(row["source"]).casefold()]
        page, pages = _within(page, len(matching))
        shown = [FoundRow(split=split, **row) for row in _cut(matching, page)]
        return RowPage(rows=tuple(shown), total=len(matching), page=page, pages=pages)
    if split not in SPLITS:
        raise UsageError(f"there is no split {split!r}", fix=f"one of {', '.join((*SPLITS, 'removed'))}")
    lines = list(_matching(store, loaded, split, search))
    page, pages = _within(page, len(lines))
    examples = [Example.model_validate_json(line) for line in _cut(lines, page)]
    return RowPage(rows=tuple(_found(split, one) for one in examples), total=len(lines), page=page, pages=pages)


def rows_by_id(store: Store, dataset: str, ids: Collection[str], *, actor: str) -> dict[str, FoundRow]:
    """Id -> row, for those of the ids that a dataset version holds. Raises Refused if actor may not read rows."""
    require(store, actor, "row.read")
    loaded, wanted = load_dataset(store, dataset), {name.encode() for name in ids}
    found: dict[str, FoundRow] = {}
    for split in SPLITS if wanted else ():
        for line in store.read_blob(loaded.record.blobs[f"{split}.jsonl"]).splitlines():
            if _id_of(line) in wanted:
                example = Example.model_validate_json(line)
                found[example.id] = _found(split, example)
    return found


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


def _found(split: str, one: Example) -> FoundRow:
    facts = one.model_dump(include={"id", "source", "licence", "group", "subject", "tenant", "region"})
    return FoundRow(split=split, messages=one.messages, **facts)


def _within(page: int, total: int) -> tuple[int, int]:
    """The page that there is, and how many there are."""
    pages = max(1, -(-total // EACH_PAGE))
    return min(max(1, page), pages), pages


def _cut(items: list[Any], page: int) -> list[Any]:
    return items[(page - 1) * EACH_PAGE : page * EACH_PAGE]
