"""From files of rows to a sealed dataset version."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from tunesmith.core.digests import digest_of
from tunesmith.core.errors import Refused, UsageError
from tunesmith.core.progress import SILENT, Progress
from tunesmith.data.account import EXACT, Account, Kept
from tunesmith.data.dataset import REMOVED, SPLITS, Example, encode_examples, encode_removed
from tunesmith.data.duplicates import answer_key, normalise
from tunesmith.data.examine import CountTokens, Examiner, renamed
from tunesmith.data.formats import Shape, shape_of
from tunesmith.data.settings import DataSettings
from tunesmith.data.sources import OpenSource, Row, find_files, open_source
from tunesmith.data.splits import NEAR_HELD_OUT, leakage, leaving, split_of
from tunesmith.store.records import Record
from tunesmith.store.store import Store

# Losing more of the training rows than this to the held-out ones means that the measure, not the data, is at fault.
_MOST_MOVED_OUT = 0.5
_SHOWN_CONFLICTS = 20
_TELL_EVERY = 256


def build_dataset(
    store: Store,
    settings: DataSettings,
    root: Path,
    *,
    count_tokens: CountTokens | None = None,
    max_tokens: int | None = None,
    answer_schema: Mapping[str, Any] | None = None,
    special_tokens: Sequence[str] = (),
    progress: Progress = SILENT,
) -> str:
    """Read, check, clean, split and seal; returns the dataset record's digest. The same input gives the same digest.

    root: where the sources' paths start. count_tokens and max_tokens: a conversation of more is overlong; where either
    is None no length is checked, and the record says so. answer_schema: JSON Schema that every answer must fit.
    special_tokens: the base's control tokens; a row whose text imitates one is refused.

    Raises UsageError for input that is not well formed, Refused where a policy says no.
    """
    account = Account()
    checked = count_tokens is not None and max_tokens is not None
    examiner = Examiner(settings, account, count_tokens, max_tokens, answer_schema, tuple(filter(None, special_tokens)))
    kept: list[Kept] = []
    described: list[dict[str, Any]] = []
    shapes: dict[str, Shape] = {}  # source path -> what its first row told
    for file in find_files(settings.sources, root):
        with open_source(file) as opened:
            before = account.read
            kept.extend(_examined(opened, examiner, shapes, progress))
            described.append(
                {
                    "path": file.name,
                    "digest": opened.digest,
                    "bytes": opened.bytes,
                    "rows": account.read - before,
                    "format": shapes[file.source.path].name,
                    "format_told": file.source.format != "auto",
                }
                | ({"split": file.source.split} if file.source.split else {})
            )
    kept = list(_without_repeats(kept, account))
    conflicts = _conflicts(one.example for one in kept)
    threshold = near_threshold(settings)
    progress.say(f"{len(kept)} rows read; looking for near ones across the splits")
    held = _held_groups(kept, {entry["path"] for entry in described if "split" in entry})
    splits = _split(kept, settings, threshold, account, held)
    examples = {name: [one.example for one in splits[name]] for name in SPLITS}
    body = {
        "settings": settings.model_dump(mode="json"),
        "sources": described,
        "rows": {
            "read": account.read,
            "kept": sum(map(len, splits.values())),
            "changed": sum(one.changed for some in splits.values() for one in some),
            "removed": account.reasons(),
        },
        **counts(examples),
        "leakage": leakage(examples, threshold).as_json(threshold),
        "privacy": dict(sorted(account.privacy.items())),
        "ignored_keys": dict(sorted(account.ignored.items())),
        "conflicts": conflicts,
        "tokens": {"limit": max_tokens, "longest": account.longest} if checked else None,
        "answer_schema": None if answer_schema is None else digest_of(answer_schema),
    } | ({"held_groups": sorted(held)} if held else {})
    blobs = {f"{name}.jsonl": store.put_bytes(encode_examples(examples[name])) for name in SPLITS}
    blobs[REMOVED] = store.put_bytes(encode_removed(account.removed))
    return store.put_record(Record(kind="dataset", blobs=blobs, body=body))


def dataset_document(store: Store, digest: str) -> dict[str, Any]:
    """What `data build --json` prints of a dataset record. Raises Refused where the record is missing or damaged."""
    body = store.record(digest, kind="dataset").body
    shown = ("rows", "splits", "groups", "leakage", "licences", "privacy", "ignored_keys", "conflicts", "tokens")
    return {"dataset": digest, **{key: body[key] for key in (*shown, "sources")}}


def near_threshold(settings: DataSettings) -> float:
    """The similarity at which two requests are near; without one only the same request is."""
    return 1.0 if settings.duplicates.near is None else settings.duplicates.near


def counts(splits: Mapping[str, Sequence[Example]]) -> dict[str, dict[str, int]]:
    """What can be counted again from the examples alone: rows and groups of each split, rows of each licence."""
    licences = Counter(example.licence for examples in splits.values() for example in examples)
    return {
        "splits": {name: len(splits[name]) for name in SPLITS},
        "groups": {name: len({example.group for example in splits[name]}) for name in SPLITS},
        "licences": dict(sorted(licences.items())),
    }


def _examined(opened: OpenSource, examiner: Examiner, shapes: dict[str, Shape], progress: Progress) -> Iterator[Kept]:
    source, account = opened.file.source, examiner.account
    with progress.task(f"reading {opened.file.name}", opened.bytes) as task:
        told = 0
        for row in opened.rows():
            account.read += 1
            if source.path not in shapes:
                shapes[source.path] = shape_of(source.format, Row(row.source, row.number, renamed(row, source.rename)))
            one = examiner.examine(row, source, shapes[source.path])
            if one is not None:
                yield one
            if account.read % _TELL_EVERY == 0:
                position = opened.position()
                task.advance(max(0, position - told))
                told = max(told, position)
        task.advance(opened.bytes - told)


def _without_repeats(kept: Iterable[Kept], account: Account) -> Iterator[Kept]:
    """One row of each request and answer. Which one does not depend on the order of the rows."""
    seen: set[tuple[Any, ...]] = set()
    for one in sorted(kept, key=lambda one: (one.example.id, one.example.model_dump_json(), one.row)):
        key = (_request_key(one.example), answer_key(one.example.answer))
        if key in seen:
            account.remove_kept(one, EXACT)
        else:
            seen.add(key)
            yield one


def _request_key(example: Example) -> tuple[tuple[str, str], ...]:
    return tuple((turn.role, normalise(turn.content)) for turn in example.request)


def _conflicts(examples: Iterable[Example]) -> dict[str, Any]:
    """Requests with more than one answer: how many, their rows, and the ids of the first few."""
    same: defaultdict[tuple[tuple[str, str], ...], list[str]] = defaultdict(list)
    for example in examples:
        same[_request_key(example)].append(example.id)
    found = sorted(sorted(ids) for ids in same.values() if len(ids) > 1)
    return {"requests": len(found), "rows": sum(map(len, found)), "examples": found[:_SHOWN_CONFLICTS]}


def _held_groups(kept: Sequence[Kept], sources: Container[str]) -> set[str]:
    """The groups of rows whose source says split: test. Rows of those groups in other sources are held out too."""
    return {one.example.group for one in kept if one.example.source in sources}


def _split(
    kept: Sequence[Kept], settings: DataSettings, threshold: float, account: Account, held: Container[str]
) -> dict[str, list[Kept]]:
    """The splits, without the rows that nearness makes leave. Raises where that leaves too little."""
    splits: dict[str, list[Kept]] = {name: [] for name in SPLITS}
    for one in kept:
        splits[split_of(one.example.group, settings.split, held)].append(one)
    _require_rows(splits, account)
    gone = leaving({name: [one.example for one in some] for name, some in splits.items()}, threshold)
    moved_out = sum(gone.get(one.example.id) == NEAR_HELD_OUT for one in splits["train"])
    if moved_out > _MOST_MOVED_OUT * len(splits["train"]):
        raise Refused(
            f"{moved_out} of {len(splits['train'])} training rows are near a held-out row (similarity {threshold})",
            where="data.duplicates.near",
            fix="move the text that all requests share into a system turn, group the rows by what makes them alike "
            "(data.split.group_by), or raise near",
        )
    for name, some in splits.items():
        for one in some:
            if one.example.id in gone:
                account.remove_kept(one, gone[one.example.id])
        splits[name] = [one for one in some if one.example.id not in gone]
    _require_rows(splits, account)
    return splits


def _require_rows(splits: Mapping[str, Sequence[Kept]], account: Account) -> None:
    for name in ("train", "test"):
        if not splits[name]:
            sizes = ", ".join(f"{split}: {len(rows)}" for split, rows in splits.items())
            removed = "; ".join(f"{reason}: {n}" for reason, n in account.reasons().items())
            raise UsageError(
                f"no rows are left for {name} ({sizes}; read: {account.read}; removed: {removed or 'none'})",
                where="data",
                fix="give more rows or groups, raise data.split.test, or choose another data.split.seed",
            )
