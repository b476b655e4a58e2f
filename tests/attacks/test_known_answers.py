"""Whoever knows the test rows, or what a candidate answered to them, gets no better score unnoticed."""

from pathlib import Path
from typing import Any

import pytest

from tests.acting import do
from tests.attack_table import Happened
from tests.own_cache import own_cache
from tests.tiny_project import settings, write_project
from tunesmith.candidates.candidate import Candidate
from tunesmith.core.errors import Refused
from tunesmith.core.messages import Message
from tunesmith.core.reading.strict_json import parse_json
from tunesmith.data.dataset import Dataset, Example, load_dataset
from tunesmith.data.governance.withdrawn import content_key
from tunesmith.data.review import queue
from tunesmith.data.review.decisions import ReviewedRow, encode_reviewed
from tunesmith.evaluation.answers import check_held_out
from tunesmith.project import Project
from tunesmith.services import evaluations, review
from tunesmith.services.evaluations import VerdictSummary
from tunesmith.store.people.identities import ensure_owner

OWNER = "olive"


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Project:
    monkeypatch.setenv("TUNESMITH_USER", OWNER)
    monkeypatch.setenv("TUNESMITH_CACHE", own_cache(tmp_path / "cache"))
    stock: Any = settings()["data"]
    folder = write_project(
        tmp_path / "project",
        data={**stock, "review": "review.jsonl"},
        task={"scorers": ["exact_match"]},
        candidates={"plain": {"prompt": "prompt.txt", "max_tokens": 8}},
        gates={"right": {"metric": "exact_match", "at_least": 0.0}},
    )
    made = Project.load(folder)
    ensure_owner(made.store)
    return made


def dataset_of(project: Project, verdict: VerdictSummary) -> Dataset:
    return load_dataset(project.store, project.store.record(verdict.evaluation).parents["dataset"])


def answered(project: Project, verdict: VerdictSummary) -> dict[str, str]:
    """Row -> what `plain` said."""
    store = project.store
    parents = store.record(verdict.evaluation).parents
    (record,) = (store.record(each) for role, each in parents.items() if role.startswith("answers"))
    return {
        line["id"]: line["text"]
        for line in map(parse_json, store.read_blob(record.blobs["answers.jsonl"]).splitlines())
    }


def as_said(example: Example, text: str) -> tuple[Message, ...]:
    return (*example.messages[:-1], Message(role="assistant", content=text))


@pytest.mark.attack("leakage", "references changed to what a candidate answered")
def test_changed_references_are_counted_and_named(project: Project, happened: Happened) -> None:
    first = evaluations.gate(project, name="plain")
    assert first.cautions == ()
    dataset, said = dataset_of(project, first), answered(project, first)
    chosen = [example for example in dataset.examples("test") if said[example.id].strip()][:10]
    forged = [
        ReviewedRow(
            row=example.id, content=content_key(example), decision="edit", messages=as_said(example, said[example.id]),
            by=("nobody-here",),
        )
        for example in chosen
    ]  # fmt: skip
    (project.root / "review.jsonl").write_bytes(encode_reviewed(forged))
    second = evaluations.gate(project, name="plain")
    edited = project.store.record(second.digest).body["edited"]
    assert (edited["rows"], edited["by"], edited["unnamed"], edited["without"]) == (10, [], 10, 0.0)
    assert edited["mean"] > 0
    assert "10 of" in second.cautions[0]
    assert "nobody whom the log names" in second.cautions[0]
    assert "nobody-here" not in str(dataset_of(project, second).record.body)
    happened("counted, without the reviewer's name", 10)
    items = [
        queue.NewItem("row", example.id, {}, dataset=dataset.digest, split="test", messages=example.messages)
        for example in chosen
    ]
    queue.add_items(project.store, items, wanted=1, actor=OWNER)
    for number, example in enumerate(chosen, start=1):
        decision = queue.Decision("edit", messages=as_said(example, said[example.id]))
        queue.decide(project.store, number, decision, revision=0, actor=OWNER)
    do(project, review.export, actor=OWNER)
    third = evaluations.gate(project, name="plain")
    edited = project.store.record(third.digest).body["edited"]
    assert (edited["rows"], edited["by"], edited["unnamed"]) == (10, [OWNER], 0)
    assert f"by {OWNER}." in third.cautions[0]


@pytest.mark.attack("leakage", "test rows in a prompt, a shot or a schema")
def test_test_rows_in_what_a_candidate_reads_are_refused(project: Project, happened: Happened) -> None:
    first = evaluations.gate(project, name="plain")
    dataset = dataset_of(project, first)
    test, train = dataset.examples("test"), dataset.examples("train")
    asked, answer = test[0].request[-1].content, test[0].answer
    line = f"Request: {asked.upper()}\u200b\nAnswer: {answer}\n"
    shot = (Message(role="user", content=f"As before: {line}"), Message(role="assistant", content="{}"))
    known: dict[str, Any] = {"name": "plain", "base": "b", "max_tokens": 8}
    for more in (
        {"prompt": f"Rules.\n{line}"},
        {"shots": (shot,)},
        {"answer_schema": f'{{"description": "{asked}: {answer}"}}'},
    ):
        with pytest.raises(Refused, match="contains the test row"):
            check_held_out(project.store, dataset, test, "plain", Candidate.model_validate({**known, **more}))
    plain = {"prompt": f"Rules. {train[0].request[-1].content}: {train[0].answer}", "shots": (train[1].messages,)}
    check_held_out(project.store, dataset, test, "plain", Candidate.model_validate({**known, **plain}))
    (project.root / "prompt.txt").write_text(
        "".join(f"{one.request[-1].content} -> {one.answer}\n" for one in test[:9])
    )
    with pytest.raises(Refused, match="contains the test row"):
        evaluations.evaluate(project)
    happened("refused", 4)
