"""Candidates that differ in their training alone are trained in one pass when several are due."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tests.chain.scene import write_project
from tunesmith import chain
from tunesmith.project import Project
from tunesmith.store.records import Record

SWEEP: dict[str, dict[str, Any]] = {
    "small": {"rank": 2},
    "fast": {"rank": 4, "learning_rate": 0.02, "epochs": 2},
    "dora": {"rank": 2, "dora": True},
}


def _project(folder: Path) -> Project:
    common = {"batch": 8, "rows": 24}
    candidates: dict[str, Any] = {
        name: {"prompt": "prompt.txt", "train": {**common, **each}, "max_tokens": 4} for name, each in SWEEP.items()
    }
    candidates["plain"] = {"prompt": "prompt.txt", "max_tokens": 4}
    write_project(folder, candidates=candidates, release="small", gates={})
    return Project.load(folder)


def _trained(project: Project) -> dict[str, Record]:
    found = [project.store.record(digest) for digest in project.store.records_of("training")]
    assert len(found) == len(SWEEP)
    ranks = {(each["rank"], each.get("dora", False)): name for name, each in SWEEP.items()}
    return {ranks[each.body["settings"]["rank"], each.body["settings"]["dora"]]: each for each in found}


def test_a_sweep_is_trained_together_to_the_bytes_of_each_alone(tmp_path: Path) -> None:
    alone, together = _project(tmp_path / "alone"), _project(tmp_path / "together")
    for name in SWEEP:
        chain.train(alone, name=name)
    chain.evaluate(together)
    singles, joint = _trained(alone), _trained(together)
    assert {name: each.body.get("together") for name, each in joint.items()} == {
        "small": ["fast"],
        "fast": ["small"],
        "dora": None,
    }
    for name in SWEEP:
        assert "together" not in singles[name].body
        weights = "adapter_model.safetensors"
        assert joint[name].blobs[weights] == singles[name].blobs[weights]


def test_what_is_there_is_not_trained_again(tmp_path: Path) -> None:
    project = _project(tmp_path / "p")
    first = chain.train(project, name="fast")
    chain.evaluate(project)
    trained = _trained(project)
    assert chain.train(project, name="fast") == first
    assert all("together" not in each.body for each in trained.values()), "one alone was due"
