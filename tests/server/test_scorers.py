"""Service scores answers with the scorers that the task declares, or says why it cannot."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.server.conftest import StartServer
from tests.tiny_project import settings, write_project
from tunesmith.core.errors import UsageError
from tunesmith.evaluation.settings import TaskSettings
from tunesmith.project import Project
from tunesmith.services.releases import rollouts

JUDGE = {"url": "http://127.0.0.1:9/v1", "model": "m"}


def test_declared_scorers_score_served_answers(start_server: StartServer, tmp_path: Path) -> None:
    (tmp_path / "polite.py").write_text(
        "def score(answer, reference, request):\n    return 0.5 if 'lamp' in request else 0\n"
    )
    declared = [
        "exact_match",
        "groundedness",
        {"name": "says_on", "pattern": "on"},
        {"name": "intent", "label": "intent"},
        {"name": "polite", "function": "polite.py:score"},
        {"name": "better", "judge": JUDGE},
    ]
    scorers = TaskSettings.model_validate({"scorers": declared}).scorers
    served = start_server(scorers=scorers, root=tmp_path)
    answer = served.ask()
    assert served.rows()[0].scores == {"says_on": 1.0}
    with served.http() as http:
        expected = {"request_id": answer.id, "expected": '{"intent": "on", "room": "hall"}'}
        found = http.post("/api/feedback", json=expected).json()
        bad = http.post("/api/feedback", json={"request_id": served.ask().id, "expected": "no JSON"})
    assert found["scores"] == {"exact_match": 0.0, "intent": 1.0, "polite": 0.5}
    assert "asks a judge" in found["not_scored"]["better"]
    assert "retrieved texts" in found["not_scored"]["groundedness"]
    assert bad.status_code == 400
    assert "has no 'intent'" in bad.json()["error"]["message"]


def test_rollout_refuses_a_metric_that_service_does_not_measure(tmp_path: Path) -> None:
    """The second step analyses what needs retrieved texts, or json_valid, as by default."""
    steps = [{"setWeight": 10}, {"analysis": {"metric": "groundedness"}}, {"setWeight": 100}]
    task: Any = {**settings()["task"], "scorers": ["exact_match", "groundedness"]}  # type: ignore[dict-item]
    project = Project.load(write_project(tmp_path / "a", task=task, gates={}, rollout={"steps": steps}))
    with pytest.raises(UsageError, match="step 2 analyses groundedness, which service does not measure"):
        rollouts.start(project, "tiny@v1")
    project = Project.load(write_project(tmp_path / "b", task={**task, "scorers": ["exact_match"]}, gates={}))
    with pytest.raises(UsageError, match=r"step 2 analyses json_valid.*task\.scorers does not list it") as caught:
        rollouts.start(project, "tiny@v1")
    assert "rollout.steps" in str(caught.value.where)
    assert "success_rate" in str(caught.value.fix)
