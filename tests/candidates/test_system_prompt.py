"""Which system prompt a request gets: the candidate's, the request's own system turn, or none."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.tiny_project import rows, settings, write_project
from tunesmith.api import Project
from tunesmith.candidates.candidate import Candidate
from tunesmith.candidates.composing import compose, prompt_used
from tunesmith.core.errors import UsageError
from tunesmith.core.messages import Message
from tunesmith.evaluation.report.data import report_data
from tunesmith.services.evaluations import evaluation

USER = Message(role="user", content="turn on the light")
SYSTEM = Message(role="system", content="You are a house.")


def candidate(prompt: str = "", **more: object) -> Candidate:
    return Candidate.model_validate({"name": "c", "base": "b", "max_tokens": 8, "prompt": prompt, **more})


@pytest.mark.parametrize(
    ("prompt", "request_turns", "system", "used"),
    [
        ("Answer.", (USER,), "Answer.", "candidate"),
        ("Answer.", (SYSTEM, USER), "Answer.", "replaced"),
        ("", (SYSTEM, USER), "You are a house.", "request"),
        ("", (USER,), None, "none"),
    ],
)
def test_system_prompt(prompt: str, request_turns: tuple[Message, ...], system: str | None, used: str) -> None:
    composed = compose(candidate(prompt), request_turns)
    assert [turn.content for turn in composed if turn.role == "system"] == ([system] if system else [])
    assert prompt_used(candidate(prompt), request_turns) == used
    assert prompt_used(candidate(method="nearest"), request_turns) == "none", "baselines use none"


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Project:
    """Two candidates on rows of which every second one has its own system turn."""
    candidates = {"own": {"max_tokens": 4}, "short": {"prompt": "prompt.txt", "max_tokens": 4}}
    folder = write_project(tmp_path_factory.mktemp("prompts") / "p", candidates=candidates)
    found = rows()
    for place, row in enumerate(found):
        if place % 2:
            row["messages"].insert(0, {"role": "system", "content": "You are a house."})
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in found))
    return Project.load(folder)


def test_pipeline_counts_system_prompts(project: Project) -> None:
    found = evaluation.evaluate(project)
    body = project.store.record(found.evaluation).body
    counts = {name: stated["system_prompts"] for name, stated in body["candidates"].items()}
    own = counts["own"]["request"]
    assert counts == {
        "own": {"none": body["n"] - own, "request": own},
        "short": {"candidate": body["n"] - own, "replaced": own},
    }
    assert own > 0
    assert found.system_prompts == counts
    records = {name: project.store.record(stated["candidate"]) for name, stated in body["candidates"].items()}
    assert {name: record.body["prompt_source"] for name, record in records.items()} == {
        "own": "request",
        "short": "candidate",
    }
    how = {row["name"]: row["how"] for row in report_data(project.store, found.evaluation)["candidates"]}
    part = f"the system turn of {own} of {body['n']} rows"
    assert how["short"].startswith(f"the candidate's prompt, which replaces {part}")
    assert how["own"].startswith(f"{part}, no system prompt for the others")


def test_empty_prompt_file_is_refused(tmp_path: Path) -> None:
    folder = write_project(tmp_path / "p", candidates={"plain": settings()["candidates"]["plain"]})  # type: ignore[index]
    (folder / "prompt.txt").write_text("\n")
    with pytest.raises(UsageError, match="is empty"):
        evaluation.evaluate(Project.load(folder))
