"""Risk probes and plans beside every kind of candidate and a scorer of the project's own."""

from __future__ import annotations

from typing import Any

import pytest

from tests.chain.scene import settings, write_project
from tunesmith import chain
from tunesmith.core.errors import UsageError
from tunesmith.data.dataset import load_dataset
from tunesmith.evaluation.probes.items import ITEMS, decode_items
from tunesmith.project import Project

LABEL = {"name": "thing", "label": "thing"}


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Project:
    folder = tmp_path_factory.mktemp("together") / "p"
    candidates: dict[str, Any] = {
        "plain": {"prompt": "prompt.txt", "max_tokens": 4},
        "floor": {"method": "nearest"},
        "tuned": {
            "prompt": "prompt.txt",
            "retrieve": {"k": 1},
            "train": {"rank": 2, "batch": 8, "rows": 16},
            "max_tokens": 4,
        },
        "again": {"prompt": "prompt.txt", "weights": "tuned", "max_tokens": 4},
    }
    gates = {
        "members": {"probe": "membership", "at_most": 1.0, "rows": 20},
        "noise": {"probe": "robustness", "at_most": 1.0, "rows": 20},
    }
    task = {**settings()["task"], "scorers": [LABEL], "primary": "thing"}  # type: ignore[dict-item]
    write_project(folder, candidates=candidates, gates=gates, task=task, release="tuned")
    return Project.load(folder)


@pytest.fixture(scope="module")
def evaluation(project: Project) -> dict[str, Any]:
    return project.store.record(chain.evaluate(project)).body


def test_each_probe_is_of_those_that_it_says_something_of(project: Project, evaluation: dict[str, Any]) -> None:
    assert set(evaluation["risks"]["membership/20"]) == {"tuned", "again"}
    assert set(evaluation["risks"]["robustness/20"]) == {"plain", "floor", "tuned", "again"}
    floor = evaluation["risks"]["robustness/20"]["floor"]
    assert floor["arms"]["typos"]["n"] == 20
    assert floor["arms"]["instruction inside"]["after"] > 0, "the floor's answers are scored by the project's scorer"


def test_rows_are_probed_as_training_put_them(project: Project, evaluation: dict[str, Any]) -> None:
    record = project.store.record(str(chain.latest_evaluation(project)))
    asked = project.store.record(record.parents["risk:membership/20:tuned"])
    items = {item.id: item for item in decode_items(project.store.read_blob(asked.blobs[ITEMS]))}
    dataset = load_dataset(project.store, record.parents["dataset"])
    rows = {row.id: row for row in dataset.examples("train")}
    for name, item in items.items():
        arm, _, identifier = name.partition(":")
        assert len(item.messages) == 4, "prompt, one retrieved example, request"
        if arm == "trained on":
            assert item.messages[1].content != rows[identifier].request[-1].content, "never the row itself"


def test_a_plan_is_measured_by_the_projects_scorer(project: Project) -> None:
    walk = chain.Chain(project)
    assert chain.plan(walk, between=("plain", "floor"))["measured"]
    judge = {"name": "better", "judge": {"url": "http://localhost:1/v1", "model": "m"}}
    changed = project.settings.model_copy(deep=True)
    task = type(changed.task).model_validate({"scorers": [judge]})
    project_with_judge = Project(project.root, changed.model_copy(update={"task": task}))
    with pytest.raises(UsageError, match="judge"):
        chain.plan(chain.Chain(project_with_judge), between=("plain", "floor"))
