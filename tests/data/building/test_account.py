"""Whole corpora through the build: every row is where it should be, and the counts add up."""

from __future__ import annotations

import csv
import importlib.util
import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.data.rows import build, settings, write_jsonl
from tunesmith.data.building.verify import verify_dataset
from tunesmith.data.dataset import SPLITS
from tunesmith.data.settings import Source
from tunesmith.store.store import Store

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[3]
DATA = Path(os.environ.get("TUNESMITH_TEST_DATA", ROOT.parent / "shared" / "data"))


def _module(path: Path) -> Any:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module
    spec.loader.exec_module(module)
    return module


def _snips() -> Iterator[dict[str, Any]]:
    bench = _module(ROOT / "benchmarks" / "leakage.py")
    for part in ("train", "validate"):
        for request, answer in bench.snips(DATA / "snips", part)[0]:
            yield {"prompt": request, "completion": answer}


def _clinc() -> Iterator[dict[str, Any]]:
    for rows in json.loads((DATA / "clinc150" / "data_data_full.json").read_text()).values():
        yield from ({"prompt": request, "completion": intent} for request, intent in rows)


def _banking() -> Iterator[dict[str, Any]]:
    for part in ("train", "test"):
        with (DATA / "banking77" / f"banking_data_{part}.csv").open(newline="", encoding="utf-8") as lines:
            for row in csv.DictReader(lines):
                yield {"prompt": row["text"], "completion": row["category"]}


def _demo() -> Iterator[dict[str, Any]]:
    pytest.importorskip("hassil", reason="the example's package hassil is not installed (extra: demo)")
    yield from _module(ROOT / "examples" / "home_intents" / "make_rows.py").sample_rows()[0]


CORPORA = {"snips": _snips, "clinc150": _clinc, "banking77": _banking, "demo": _demo}


@pytest.mark.parametrize("name", CORPORA)
def test_every_row_is_where_it_should_be(name: str, tmp_path: Path) -> None:
    if name != "demo" and not (DATA / name).is_dir():
        pytest.skip(f"{name} is not here ($TUNESMITH_TEST_DATA)")
    rows = list(CORPORA[name]())
    write_jsonl(tmp_path / "rows.jsonl", rows)
    split = {"group_by": "template"} if name == "demo" else {}
    dataset = build(tmp_path, settings(split=split))
    body = dataset.record.body
    assert body["rows"]["read"] == len(rows) == body["rows"]["kept"] + sum(body["rows"]["removed"].values())
    assert body["rows"]["kept"] == sum(body["splits"].values())
    assert len(dataset.removed()) == sum(body["rows"]["removed"].values())
    kept = [example for split_name in SPLITS for example in dataset.examples(split_name)]
    gone = dataset.removed()
    # Every row of the file is one of the kept or one of the removed, and none is both.
    assert len({example.id for example in kept}) == len(kept)
    assert len({row["row"] for row in gone}) == len(gone)
    left = {row["row"] for row in gone}
    said = {json.dumps([turn.content for turn in example.messages]) for example in kept}
    for number, row in enumerate(rows, start=1):
        turns = row.get("messages") or [{"content": row["prompt"]}, {"content": row["completion"]}]
        here = json.dumps([turn["content"] for turn in turns]) in said
        assert here or number in left
    assert (body["leakage"]["shared_groups"], body["leakage"]["near_pairs"]) == (0, 0)
    assert verify_dataset(Store(tmp_path / "store"), dataset.digest).ok


@pytest.mark.parametrize("name", ["snips", "banking77"])
def test_nothing_of_a_published_test_set_is_left_in_training(name: str, tmp_path: Path) -> None:
    """Rows that stand in both parts, exactly, nearly or by their template, are held out."""
    if not (DATA / name).is_dir():
        pytest.skip(f"{name} is not here ($TUNESMITH_TEST_DATA)")
    bench = _module(ROOT / "benchmarks" / "leakage.py")
    if name == "snips":
        train, held = (bench.snips(DATA / name, part)[0] for part in ("train", "validate"))
    else:
        train, held = (bench.banking(DATA / name, part) for part in ("train", "test"))
    sources = []
    for part, rows in (("train", train), ("held", held)):
        write_jsonl(tmp_path / f"{part}.jsonl", [{"prompt": said, "completion": answer} for said, answer in rows])
        sources.append({"path": f"{part}.jsonl", "licence": "MIT", "split": "test" if part == "held" else None})
    dataset = build(tmp_path, settings().model_copy(update={"sources": tuple(map(Source.model_validate, sources))}))
    assert bench.twins(train, held)
    left, out = (
        [(example.request[-1].text, example.answer) for example in dataset.examples(split)]
        for split in ("train", "test")
    )
    assert not set(left) & set(held)  # a copy in training does not take the place of a row that is held out
    assert not bench.twins(left, out)
    assert not bench.shared(lambda row: bench.normalise(row[0]), left, out)
    assert not bench.shared(lambda row: bench.wording_group(bench.normalise(row[0]), row[1]), left, out)
    assert dataset.record.body["leakage"]["shared_groups"] == 0
