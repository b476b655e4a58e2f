"""The tasks of the benchmarks: what is held out shares nothing with what is trained on."""

from __future__ import annotations

import json
import random
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from tunesmith.project import Project

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
from task_projects import write_project
from tasks import Grouped, Task, _task


def _rows(seed: int, groups: int = 60) -> list[Grouped]:
    draw = random.Random(seed)
    return [
        Grouped(f"call {draw.randrange(10**9)} at {group}", json.dumps({"at": f"{group}"}), f"g{group}")
        for group in range(groups)
        for _ in range(draw.randint(1, 12))
    ]


def _made(seed: int = 0) -> Task:
    return _task("calls", "slots", "JSON.", _rows(seed), test=40, metric="exact_match", licence="MIT")


@pytest.mark.parametrize("seed", range(5))
def test_held_out_rows_share_no_group_with_training_rows(seed: int) -> None:
    task = _made(seed)
    group = dict(zip(task.rows, task.groups, strict=True))
    at = {request: request.split()[-1] for request, _ in (*task.rows, *task.test)}
    assert not {at[request] for request, _ in task.test} & {at[request] for request, _ in task.rows}
    split = task.split(50, seed, held=30)
    assert not {group[row] for row in split.train} & {group[row] for row in split.held}
    assert len(split.train) == 50
    assert 20 <= len(split.held) <= 36


def test_smaller_sets_are_nested_and_judged_by_the_same_rows() -> None:
    small, large = _made().split(20), _made().split(80)
    assert set(small.train) < set(large.train)
    assert small.held == large.held
    assert small.train != _made().split(20, seed=1).train


def test_published_test_requests_are_taken_out_of_the_rows() -> None:
    rows = [Grouped("Play Yes!", "a", "1"), Grouped("play  yes!", "a", "2"), Grouped("stop", "b", "3")]
    disputed = [Grouped("which?", "a", "4"), Grouped("which?", "b", "5")]
    test = [Grouped("play yes!", "a", "test"), Grouped("go on", "c", "3")]
    task = _task("t", "labels", "p", [*rows, *disputed, Grouped("end", "d", "6")], test=test, metric="exact_match",
                 licence="MIT")  # fmt: skip
    assert task.rows == (("end", "d"),)


def test_a_digest_changes_with_the_rows_and_only_with_them() -> None:
    assert _made().digest == _made().digest != _made(1).digest
    shorter = replace(_made(), max_tokens=3)
    assert shorter.asked_digest == _made().asked_digest != _made(1).asked_digest
    assert shorter.digest != _made().digest


def test_a_project_holds_the_rows_and_keeps_test_requests_apart(tmp_path: Path) -> None:
    task = _made()
    folder = write_project(tmp_path / "p", task, 30, {"epochs": 1})
    settings = Project.load(folder).settings
    assert settings.candidates["tuned"].train is not None
    lines = [json.loads(line) for line in (folder / "rows.jsonl").read_text().splitlines()]
    assert len(lines) == 30 + len(task.split(30).held)
    assert len((folder / "test.jsonl").read_text().splitlines()) == len(task.test)
