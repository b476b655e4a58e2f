"""Shared by this folder's tests: a fabricated store and its evaluation, made once and copied for each test."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path

import pytest

from tests.fabricate import SCHEMA, Fabricated, fabricate
from tunesmith.evaluation.evaluate import evaluate
from tunesmith.evaluation.settings import TaskSettings
from tunesmith.store.store import Store

TASK = TaskSettings(scorers=("json_valid", "exact_match", "field_f1"))


@pytest.fixture(scope="session")
def original(tmp_path_factory: pytest.TempPathFactory) -> tuple[Fabricated, str]:
    """The store that is copied, with the digest of an evaluation of all four candidates."""
    made = fabricate(tmp_path_factory.mktemp("fabricated") / "store")
    arguments = {"answers": made.answers, "probes": made.probes}
    digest = evaluate(made.store, dataset=made.dataset, task=TASK, answer_schema=SCHEMA, **arguments)
    made.store.engine.dispose()
    return made, digest


@pytest.fixture
def made(original: tuple[Fabricated, str], tmp_path: Path) -> Fabricated:
    """A fabricated store of the test's own."""
    source, _ = original
    shutil.copytree(source.store.root, tmp_path / "store")
    own = {"candidates": dict(source.candidates), "answers": dict(source.answers), "probes": dict(source.probes)}
    return dataclasses.replace(source, store=Store(tmp_path / "store"), **own)


@pytest.fixture
def evaluation(original: tuple[Fabricated, str]) -> str:
    """The digest of the evaluation that every copy holds."""
    return original[1]
