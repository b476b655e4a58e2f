"""The leaks known to be in published corpora are all found."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path
from types import ModuleType

import pytest

from tunesmith.data.splitting.duplicates import normalise
from tunesmith.data.splitting.groups import wording_group

ROOT = Path(__file__).parents[3]
DATA = Path(os.environ.get("TUNESMITH_TEST_DATA", ROOT.parent / "shared" / "data"))


@pytest.fixture(scope="module")
def bench() -> ModuleType:
    spec = importlib.util.spec_from_file_location("leakage_benchmark", ROOT / "benchmarks" / "leakage.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.slow
@pytest.mark.skipif(not (DATA / "snips").is_dir(), reason="the snips requests are not here ($TUNESMITH_TEST_DATA)")
def test_templates_of_snips_that_stand_in_training(bench: ModuleType) -> None:
    (train, train_marked), (held, held_marked) = (bench.snips(DATA / "snips", part) for part in ("train", "validate"))
    true = bench.shared(str, train_marked, held_marked)
    assert len(true) == 304
    assert true <= bench.shared(lambda row: wording_group(normalise(row[0]), row[1]), train, held)
    found = bench.report("snips", train, held)
    assert len(found["13 words in a row"]) == 0
    assert len(found["near: 0.8 of trigrams"]) == 62


@pytest.mark.skipif(not (DATA / "banking77").is_dir(), reason="banking77 is not here ($TUNESMITH_TEST_DATA)")
def test_twins_of_banking77_that_stand_in_training(bench: ModuleType) -> None:
    found = bench.report("banking77", *(bench.banking(DATA / "banking77", part) for part in ("train", "test")))
    assert len(found["the same text"]) == 6
    assert found["the same text"] <= found["the same after normalisation"] <= found["near: 0.8 of trigrams"]
    assert len(found["near: 0.8 of trigrams"]) == 339
    assert len(found["label"]) == 13
