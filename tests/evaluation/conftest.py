"""Shared by this folder's tests: a fabricated store and its evaluation."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.evaluation.fabricated import SCHEMA, Fabricated, fabricate
from tunesmith.evaluation.evaluate import evaluate
from tunesmith.evaluation.settings import TaskSettings

TASK = TaskSettings(scorers=("json_valid", "exact_match", "field_f1"))


@pytest.fixture
def made(tmp_path: Path) -> Fabricated:
    """A fabricated store, fresh for each test."""
    return fabricate(tmp_path / "store")


@pytest.fixture
def evaluation(made: Fabricated) -> str:
    """The digest of an evaluation of all four candidates."""
    return evaluate(
        made.store, dataset=made.dataset, answers=made.answers, probes=made.probes, task=TASK, answer_schema=SCHEMA
    )
