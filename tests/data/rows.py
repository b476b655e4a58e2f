"""Rows, settings and builds for the tests of data."""

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from tunesmith.core.errors import UsageError
from tunesmith.data.building.build import build_dataset
from tunesmith.data.building.examine import RowRules
from tunesmith.data.dataset import SPLITS, Dataset, Example, load_dataset
from tunesmith.data.formats.row_readers import SourceRow
from tunesmith.data.settings import DataSettings, Source
from tunesmith.data.sources.files import find_files, open_source
from tunesmith.store.store import Store

NO_SCAN = {"entities": []}


def turns(*contents: str, system: str | None = None) -> list[dict[str, str]]:
    """user, assistant, user, assistant ... with an optional system turn before them."""
    spoken = [{"role": ("user", "assistant")[place % 2], "content": text} for place, text in enumerate(contents)]
    return ([{"role": "system", "content": system}] if system is not None else []) + spoken


def row(request: str, answer: str, **more: Any) -> dict[str, Any]:
    """A row of the shape "messages"."""
    return {"messages": turns(request, answer), **more}


_EIGHT = "amber basket cobalt dragon ember falcon garnet harbour"
WORDS = f"{_EIGHT} island jungle kettle lantern meadow nectar orchid pebble".split()


def many_rows(count: int, **more: Any) -> list[dict[str, Any]]:
    """Rows with nothing in common."""
    sizes = len(WORDS)
    return [
        row(
            f"{WORDS[n % sizes]} {WORDS[n // sizes % sizes]} {WORDS[(7 * n + 3) % sizes]} {n * 7919 % 10007:04d}x{n}",
            f"answer {n}",
            **more,
        )
        for n in range(count)
    ]


def jsonl(rows: Iterable[Mapping[str, Any]]) -> bytes:
    return "".join(json.dumps(one) + "\n" for one in rows).encode()


def write_jsonl(path: Path, rows: Sequence[Mapping[str, Any]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(jsonl(rows))
    return path


def read(root: Path, path: str) -> list[SourceRow]:
    """The rows of the files that a source names."""
    rows: list[SourceRow] = []
    for file in find_files([Source(path=path, licence="MIT")], root):
        with open_source(file) as opened:
            rows.extend(opened.rows())
    return rows


def failure(root: Path, path: str, data: bytes | None = None) -> UsageError:
    """Why a source is refused. data: of the file, which is written first."""
    if data is not None:
        (root / path).write_bytes(data)
    with pytest.raises(UsageError) as caught:
        read(root, path)
    assert caught.value.where
    return caught.value


def settings(path: str = "rows.jsonl", **more: Any) -> DataSettings:
    """Settings for one MIT source, or for sources; nothing scanned unless asked for."""
    source = {"path": path, "licence": "MIT", **more.pop("source", {})}
    return DataSettings.model_validate({"sources": [source], "privacy": NO_SCAN, **more})


def build(
    root: Path, chosen: DataSettings | None = None, *, rows: Sequence[Mapping[str, Any]] | None = None, **more: Any
) -> Dataset:
    """Build from root into root/store. rows: of rows.jsonl, which is written first."""
    if rows is not None:
        write_jsonl(root / "rows.jsonl", rows)
    store = Store(root / "store")
    return build_with(store, chosen or settings(), root, **more)


def build_with(store: Store, chosen: DataSettings, root: Path, **more: Any) -> Dataset:
    """Build into a store."""
    rules = {key: more.pop(key) for key in tuple(more) if key in RowRules._fields}
    return load_dataset(store, build_dataset(store, RowRules(chosen, **rules), root, **more))


def held(dataset: Dataset) -> list[Example]:
    """The rows of all splits."""
    return [one for name in SPLITS for one in dataset.examples(name)]
