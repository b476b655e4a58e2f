"""The chain: what is skipped, what is stale, what a kill leaves, what the verbs print."""

import json
import os
import re
import shutil
from pathlib import Path
from typing import Any

import pytest

from tests.acting import looking
from tests.commands import printed
from tests.said import Said
from tests.tiny_project import SCHEMA, rows, settings, write_project
from tunesmith.api import Project
from tunesmith.core.errors import Refused, UsageError
from tunesmith.core.reading.answer_grammar import matches
from tunesmith.data.building.signoff import sign_off
from tunesmith.services import evaluations, jobs, training
from tunesmith.store.people import identities
from tunesmith.training.beside import standing


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """A project that went the whole way, and what the run printed."""
    folder = write_project(tmp_path_factory.mktemp("chain") / "p")
    return folder, Project.load(folder).run().document()


@pytest.fixture
def project(finished: tuple[Path, dict[str, Any]], tmp_path: Path) -> Path:
    """A copy of it to change."""
    shutil.copytree(finished[0], tmp_path / "p")
    return tmp_path / "p"


def _done(document: dict[str, Any]) -> set[str]:
    return {stage["name"] for stage in document["stages"] if not stage["skipped"]} - {"base", "register"}


def _again(folder: Path, **changes: Any) -> dict[str, Any]:
    if changes:
        write_project(folder, **changes)
    return Project.load(folder).run().document()


def test_the_document_has_every_stage(finished: tuple[Path, dict[str, Any]]) -> None:
    document, store = finished[1], Project.load(finished[0]).store
    assert document["register"]["version"] == "tiny@v1"
    assert document["gate"]["verdict"] == "pass"
    assert document["data"]["rows"]["kept"] == 120
    valid = {name: each["json_valid"]["mean"] for name, each in document["evaluate"]["candidates"].items()}
    assert set(valid) == {"plain", "held", "rag", "tuned"}
    assert (valid["held"], valid["plain"]) == (1.0, 0.0), "held to the schema"
    training = document["train"]["tuned"]
    assert {"training", "examples_per_second", "peak_memory_bytes", "estimate", "final_loss"} <= set(training)
    assert Path(training["adapter"]).is_file()
    json.dumps(document, allow_nan=False)
    seen: set[str] = set()

    def walk(digest: str) -> None:
        record = store.record(digest)
        seen.add(record.kind)
        for parent in record.parents.values():
            walk(parent)

    walk(document["register"]["digest"])
    assert seen == {"base", "dataset", "candidate", "training", "answers", "evaluation", "verdict", "version"}


def test_a_second_run_does_nothing_and_ends_the_same(project: Path, finished: tuple[Path, dict[str, Any]]) -> None:
    os.utime(project / "rows.jsonl")
    os.utime(project / "model" / "model.safetensors")
    loaded = Project.load(project)
    whole = evaluations.latest_evaluation(loaded)
    evaluations.evaluate(loaded, ["plain"])
    assert evaluations.report(loaded).evaluation != whole
    again = _again(project)
    assert _done(again) == set()
    assert {key: again[key] for key in ("gate", "evaluate", "register")} == {
        key: finished[1][key] for key in ("gate", "evaluate", "register")
    }
    found = evaluations.report(Project.load(project))
    assert (found.evaluation, found.verdict and found.verdict.verdict) == (whole, "pass"), "the last run's result"
    evaluations.compare_candidates(loaded, "plain", "tuned")


def _candidates(**changes: Any) -> dict[str, Any]:
    return {"candidates": {**settings()["candidates"], **changes}}


PLAIN = {"prompt": "prompt.txt", "max_tokens": 4}
TUNED = {"prompt": "prompt.txt", "train": {"rank": 3, "epochs": 1}}


@pytest.mark.parametrize(
    ("change", "stale"),
    [
        ({"rollout": {"steps": [{"setWeight": 100}]}}, ""),
        ({"gates": {"valid": {"metric": "json_valid", "at_most": 1.0}}}, "gate tuned"),
        ({"task": {"schema": "schema.json", "scorers": ["json_valid"]}}, "evaluate, gate tuned"),
        (_candidates(plain=PLAIN), "answer plain, evaluate, gate tuned"),
        (_candidates(tuned=TUNED), "train tuned, answer tuned, evaluate, gate tuned"),
    ],
)
def test_only_what_depends_on_a_change_is_done_again(project: Path, change: dict[str, Any], stale: str) -> None:
    assert _done(_again(project, **change)) == set(filter(None, stale.split(", ")))
    with (project / "rows.jsonl").open("a") as file:
        turns = [{"role": "user", "content": "a wholly other wish"}, rows()[0]["messages"][1]]
        file.write(json.dumps({"messages": turns, "template": "new"}) + "\n")
    if not stale:
        document = Project.load(project).run().document()
        assert {"data", "train tuned", "answer plain", "answer tuned", "evaluate"} <= _done(document)
        assert document["data"]["rows"]["kept"] == 121


def test_gates_that_do_not_pass_register_nothing(project: Path) -> None:
    document = _again(project, gates={"valid": {"metric": "json_valid", "at_least": 1.0}})
    assert (document["gate"]["verdict"], document["gate"]["candidate"]) == ("fail", "tuned")
    assert "register" not in document
    assert _again(project, gates={})["gate"]["verdict"] == "inconclusive", "no gates is not a pass"
    assert _again(project, release="held")["gate"]["candidate"] == "held"
    without = {name: each for name, each in settings()["candidates"].items() if name != "tuned"}
    document = _again(project, candidates=without, task={"schema": "schema.json", "scorers": ["json_valid"]})
    assert document["gate"]["candidate"] == "held", "if prompting wins, prompting is what gets released"


def test_names_that_do_not_exist(project: Path) -> None:
    loaded = Project.load(project)
    shown = " ".join(printed(project, "train", "tuned").split())
    assert "validating by the probability" in shown, "notices are shown after a training"
    with pytest.raises(UsageError, match="no candidate 'tuend'"):
        evaluations.evaluate(loaded, names=["tuend"])
    without = Project.load(write_project(project, task={"scorers": ["exact_match"]}, gates={}))
    with pytest.raises(UsageError, match="constrain needs a schema"):
        evaluations.evaluate(without, names=["held"])


def test_a_schema_that_decoding_cannot_follow_is_refused_before_the_training(tmp_path: Path) -> None:
    tuned = {"prompt": "prompt.txt", "train": {"epochs": 1, "rank": 2}, "max_tokens": 8, "constrain": True}
    folder = write_project(tmp_path, candidates={"tuned": tuned}, gates={})
    properties = {**SCHEMA["properties"], "room": {"type": "string"}, "tags": {"type": "array", "uniqueItems": True}}
    (folder / "schema.json").write_text(json.dumps({**SCHEMA, "properties": properties}))
    project = Project.load(folder)
    with pytest.raises(UsageError, match="uniqueItems") as caught:
        training.train(project, name="tuned")
    assert caught.value.where == "task.schema"
    assert not project.store.records_of("training")


@pytest.mark.parametrize("form", ["pattern", "grammar"])
def test_answers_of_a_pattern_or_a_grammar(tmp_path: Path, form: str) -> None:
    """One file gives the scorer, the gate, the constraint and the check of the rows."""
    lark = 'start: ("on" | "off") " " ROOM " " THING\nROOM: /[a-z]{1,8}/\nTHING: /[a-z]{1,8}/\n'
    task = {"pattern": "(on|off) [a-z]{1,8} [a-z]{1,8}"} if form == "pattern" else {"grammar": "answers.lark"}
    held = {"prompt": "prompt.txt", "max_tokens": 60, "constrain": True}
    gates = {"valid": {"metric": "valid", "at_least": 0.5}}
    folder = write_project(tmp_path, task=task, candidates={"held": held}, gates=gates)
    (folder / "answers.lark").write_text(lark)
    found = rows()
    for row in found:
        row["messages"][1]["content"] = row["messages"][0]["content"].removeprefix("turn ")
    found[0]["messages"][1]["content"] = "ON kitchen light"
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in found))
    project = Project.load(folder)
    assert project.settings.task.metrics == ("exact_match", "valid")
    evaluations.evaluate(project, names=["held"])
    store = project.store
    (digest,) = store.records_of("answers")
    record = store.record(digest, kind="answers")
    texts = [json.loads(line)["text"] for line in store.read_blob(record.blobs["answers.jsonl"]).splitlines()]
    assert texts
    assert all(matches(project.settings.task.lark or "", text) for text in texts)
    removed = store.record(record.parents["dataset"], kind="dataset").body["rows"]["removed"]
    assert removed == {"answer that valid cannot score": 1}
    evaluated = store.record(store.records_of("evaluation")[0], kind="evaluation")
    assert evaluated.body["metrics"] == ["exact_match", "valid"]


@pytest.mark.parametrize(
    ("task", "candidate", "said"),
    [
        ({"pattern": "a", "schema": "schema.json"}, {}, "one of schema, pattern and grammar"),
        ({"scorers": ["valid"]}, {}, "valid needs pattern or grammar"),
        ({"pattern": "a", "scorers": [{"name": "valid", "pattern": "b"}]}, {}, "give your own another name"),
        ({"pattern": "("}, {}, "not a grammar of answers"),
        ({"grammar": "nowhere.lark"}, {}, "does not exist"),
        ({"pattern": "a"}, {"constrain": {"copy": ["a"]}}, "copy needs task.schema"),
        ({"pattern": "a"}, {"constrain": True}, "a server takes a JSON Schema only"),
        ({"schema": "schema.json"}, {"constrain": {"copy": ["room"]}}, "a vLLM server cannot do that"),
    ],
)
def test_forms_of_answers_that_do_not_fit_are_refused(
    tmp_path: Path, task: dict[str, Any], candidate: dict[str, Any], said: str
) -> None:
    engine = {"engine": {"kind": "vllm", "url": "http://127.0.0.1:1"}} if "server" in said else {}
    with pytest.raises(UsageError, match=said):
        Project.load(write_project(tmp_path, task=task, candidates={"c": candidate}, gates={}, **engine))


class Ended(BaseException):
    """The process ends."""


class SaidUpTo(Said):
    """Keeps what a run says, and ends the process where that begins like this."""

    end = "nowhere"

    def say(self, text: str) -> None:
        super().say(text)
        if text.startswith(self.end):
            raise Ended


def test_a_training_is_shown_beside_the_best_untuned_candidate(tmp_path: Path) -> None:
    """Each validation names the score of the best one, also after a kill; its weights are the same without."""
    data = {**settings()["data"], "split": {"validation": 0.3, "test": 0.3, "group_by": "template"}}
    train = {"epochs": 2, "rank": 2, "batch": 8, "checkpoint_seconds": 1e-9}
    some = {name: settings()["candidates"][name] for name in ("plain", "held", "tuned")}
    tuned = {**some["tuned"], "train": train}
    task = {"schema": "schema.json", "scorers": ["json_valid"]}
    folder = write_project(tmp_path / "p", data=data, task=task, candidates={**some, "tuned": tuned})
    shutil.copytree(folder, tmp_path / "alone")
    alone = Said()
    without = training.train(Project.load(tmp_path / "alone"), progress=alone)
    assert any("none has been evaluated on this dataset version" in line for line in alone.lines)

    said, project = SaidUpTo(), Project.load(folder)
    said.end = "step 9:"
    with pytest.raises(Ended):
        training.run_here(project, progress=said)
    (answers,) = [line for line in said.lines if line.startswith("beside tuned: held, the best untuned candidate")]
    assert "the 38 validation rows that are scored" in answers
    killed, said.end, said.lines = said.lines, "nowhere", []
    summary = training.run_here(project, progress=said)
    gap = "; held has 100% on the same 38 rows: −100.0 points [−100.0, −81.5]"
    told = [line for line in [*killed, *said.lines] if re.match(r"(from )?step \d", line)]
    turned = "from step 3 on the tuned model is worse than held: the interval of the difference is below zero"
    steps = [f"step {step}: validation score 0.0%" for step in (3, 6, 9, 9, 12)]
    assert [line.split(", loss")[0] for line in told] == [steps[0], turned, *steps[1:]]
    assert all(line.endswith(gap) for line in told if line != turned)
    assert "answer held validation: unchanged, skipped" in said.lines
    assert summary.train["tuned"].weights == without.weights
    (curve,) = jobs.curves(looking(project), 2).trainings
    assert (curve.rival, curve.rival_score, curve.standing) == ("held", 1.0, turned)

    # Without a run, the last evaluation says which one is best.
    nothing = "no untuned candidate is shown beside the training of tuned: validate_by: loss scores no answers"
    for change, said.end in ({"validate_by": "loss"}, nothing), ({"rank": 3}, turned):
        changed = {**some, "tuned": {**tuned, "train": {**train, **change}}}
        with pytest.raises(Ended):
            training.train(Project.load(write_project(folder, data=data, task=task, candidates=changed)), progress=said)


def test_it_is_said_since_when_the_interval_has_been_off_zero() -> None:
    gaps = {1: (0.0, -0.1, 0.1), 2: (0.2, 0.1, 0.3), 3: (0.3, 0.2, 0.4)}
    assert standing("rag", {1: gaps[1]}) == (0, "")
    above = "from step 2 on the tuned model is better than rag: the interval of the difference is above zero"
    assert standing("rag", gaps) == (2, above)
    gaps |= {4: gaps[1], 5: gaps[1]}
    assert standing("rag", gaps)[1].startswith("from step 4 on the tuned model is no longer better or worse than rag")


def test_nothing_is_trained_before_a_steward_signed(tmp_path: Path) -> None:
    folder = write_project(tmp_path / "p", data={**settings()["data"], "sign_off": True})
    with pytest.raises(Refused, match="no steward"):
        Project.load(folder).run()
    project = Project.load(folder)
    digest = project.store.records_of("dataset")[-1]
    identities.add_user(project.store, "sten", ["steward"], actor=identities.ensure_owner(project.store).name)
    sign_off(project.store, digest, steward="sten", reason="looked at all rows")
    assert Project.load(folder).run().document()["data"]["dataset"] == digest
