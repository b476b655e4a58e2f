"""Which system prompt a request gets: the candidate's, the request's own system turn, or none."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.tiny_project import rows, settings, write_project
from tunesmith.api import Project
from tunesmith.candidates.candidate import Candidate, load_candidate
from tunesmith.candidates.composing import compose, count_prompts, describe_prompts, prompt_used
from tunesmith.core.errors import UsageError
from tunesmith.core.messages import Message
from tunesmith.evaluation.report.data import report_data
from tunesmith.services.evaluations import evaluation
from tunesmith.store.records import Record

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


def test_counts_in_words() -> None:
    requests = [(SYSTEM, USER), (USER,), (USER,)]
    assert count_prompts(candidate("Answer."), requests) == {"candidate": 2, "replaced": 1}
    said = [describe_prompts(count_prompts(candidate(prompt), requests)) for prompt in ("Answer.", "")]
    assert said == [
        "the candidate's prompt, which replaces the system turn of 1 of 3 rows",
        "the system turn of 1 of 3 rows, no system prompt for the others",
    ]


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
    sources = {name: _record(project, stated).body["prompt_source"] for name, stated in body["candidates"].items()}
    assert sources == {"own": "request", "short": "candidate"}
    how = {row["name"]: row["how"] for row in report_data(project.store, found.evaluation)["candidates"]}
    assert how["short"].startswith(f"the candidate's prompt, which replaces the system turn of {own} of ")
    assert how["own"].startswith(f"the system turn of {own} of ")


def _record(project: Project, stated: dict[str, Any]) -> Record:
    assert load_candidate(project.store, stated["candidate"]).name in ("own", "short")
    return project.store.record(stated["candidate"])


def test_empty_prompt_file_is_refused(tmp_path: Path) -> None:
    folder = write_project(tmp_path / "p", candidates={"plain": settings()["candidates"]["plain"]})  # type: ignore[index]
    (folder / "prompt.txt").write_text("\n")
    with pytest.raises(UsageError, match="is empty"):
        evaluation.evaluate(Project.load(folder))
