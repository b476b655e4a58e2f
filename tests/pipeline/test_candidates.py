"""Every kind of candidate through the chain on a tiny base: measured alike, and released where that makes sense."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.acting import do
from tests.chat_server import ChatServer, chat_server, completion
from tests.tiny_project import settings, write_project
from tunesmith.api import Project
from tunesmith.candidates.candidate import load_candidate
from tunesmith.core.access import ANYONE
from tunesmith.core.errors import Refused, UsageError
from tunesmith.core.messages import Message
from tunesmith.data.dataset import load_dataset
from tunesmith.data.documents import Documents
from tunesmith.pipeline.candidates import answerer
from tunesmith.pipeline.context import PipelineContext
from tunesmith.project import parse_settings
from tunesmith.records.candidate import Retrieve
from tunesmith.records.training import SearchBody
from tunesmith.registry.opening import verified_copy
from tunesmith.registry.verification import verify_version
from tunesmith.registry.versions import load_version
from tunesmith.server.answering.routing import ReadyVersions
from tunesmith.services import evaluations, versions

KEY = "sk-never-to-be-kept"
DOCUMENT = "# Rooms\n\nThe kitchen has a light and a heater.\n\n# Garage\n\nThe garage has a radio.\n"


@pytest.fixture(scope="module")
def server() -> Iterator[ChatServer]:
    with chat_server() as running:
        running.reply = lambda body: (200, {}, completion('{"on": true, "room": "attic", "thing": "fan"}'))
        yield running


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory, server: ChatServer) -> Project:
    """A project with every kind of candidate, evaluated."""
    folder = tmp_path_factory.mktemp("kinds") / "p"
    plain = {"prompt": "prompt.txt", "max_tokens": 4}
    rival = {"url": server.url, "model": "big", "key_env": "RIVAL_KEY", "retries": 0}
    candidates: dict[str, Any] = {
        "plain": plain,
        "nearest": {"method": "nearest"},
        "diverse": {**plain, "shots": {"count": 2, "choose": "diverse"}},
        "searched": {**plain, "retrieve": {"k": 1}, "optimise": {"prompts": ["other.txt"], "calls": 150, "rows": 32}},
        "docs": {**plain, "retrieve": {"from": "documents", "k": 1}},
        "tuned": {**plain, "retrieve": {"k": 1}, "train": {"epochs": 1, "rank": 2, "batch": 8, "rows": 16}},
        "held": {"prompt": "prompt.txt", "weights": "tuned", "constrain": True, "max_tokens": 40},
        "rival": {"prompt": "prompt.txt", "endpoint": rival},
    }
    folder.mkdir()
    (folder / "other.txt").write_text("Reply in JSON, nothing else.\n")
    (folder / "rooms.md").write_text(DOCUMENT)
    data = {**settings()["data"], "split": {"validation": 0.3, "test": 0.3, "group_by": "template"}}
    write_project(folder, candidates=candidates, documents={"paths": ["*.md"], "licence": "CC0-1.0"}, data=data)
    loaded = Project.load(folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RIVAL_KEY", KEY)
        evaluations.evaluate(loaded)
    return loaded


def _answers(project: Project, name: str) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    measured = project.store.record(evaluations.latest_evaluation(project))
    record = project.store.record(measured.parents[f"answers:{name}"])
    lines = project.store.read_blob(record.blobs["answers.jsonl"]).splitlines()
    return dict(record.body), [json.loads(line) for line in lines]


def _candidate(project: Project, name: str) -> Any:
    measured = project.store.record(evaluations.latest_evaluation(project))
    return load_candidate(project.store, measured.body["candidates"][name]["candidate"])


def test_all_are_measured_on_the_same_rows(project: Project) -> None:
    body = project.store.record(evaluations.latest_evaluation(project)).body
    assert set(body["candidates"]) == set(project.settings.candidates)
    assert body["candidates"]["nearest"]["prompt_tokens"] == 0
    assert body["candidates"]["rival"]["prompt_tokens"] == 11 * body["n"]
    assert body["candidates"]["held"]["metrics"]["json_valid"]["mean"] == 1.0
    assert body["candidates"]["plain"]["system_prompts"] == {"candidate": body["n"]}
    held, tuned, docs = (_candidate(project, name) for name in ("held", "tuned", "docs"))
    assert held.training == tuned.training, "borrowed weights are the other's"
    assert held.tuned
    known = {example.answer for example in load_dataset(project.store, tuned.dataset).examples("train")}
    assert {line["text"] for line in _answers(project, "nearest")[1]} <= known
    passages = {passage.id for passage in Documents(project.store, docs.documents).passages}
    assert all(line["retrieved"][0] in passages for line in _answers(project, "docs")[1])
    assert all("retrieved" not in line for line in _answers(project, "plain")[1])
    composer = answerer(PipelineContext(project), docs).composer
    asked = [Message(role="user", content="what is in the garage?")]
    assert "(rooms.md, Garage)\nThe garage has a radio." in composer.conversation(asked, ANYONE)[0].content
    assert composer.retrieved(asked, ANYONE).sources == ("rooms.md",)


def test_a_search_states_its_budget_and_stays_off_the_test_rows(project: Project) -> None:
    candidate = _candidate(project, "searched")
    record = project.store.record(candidate.search, kind="search")
    body = SearchBody.of(record)
    lines = [json.loads(line) for line in project.store.read_blob(record.blobs["answers.jsonl"]).splitlines()]
    too_long = [one for one in body.tries if one.why]
    assert 150 - 16 < body.budget == len(lines) + 16 * len(too_long) <= 150
    assert all("context" in one.why and one.rows == 0 for one in too_long if one.why)
    assert body.ended == "calls"
    dataset = load_dataset(project.store, record.parents["dataset"])
    train, validation = ({row.id for row in dataset.examples(split)} for split in ("train", "validation"))
    assert {line["id"] for line in lines} <= validation
    assert all(set(one.shots) <= train for one in body.tries)
    first, best = body.tries[0], body.tries[body.best]
    assert (first.prompt, first.shots, first.retrieve, first.rows) == ("Answer with JSON.", (), Retrieve(k=1), 32)
    whole = [one for one in body.tries if one.rows == 32]
    assert best.mean == max(one.mean for one in whole)
    assert len(whole) < len(body.tries), "most are given up early"
    assert len({(one.prompt, one.shots, one.retrieve) for one in body.tries}) == len(body.tries) > 3
    assert {one.retrieve.by for one in body.tries if one.retrieve} == {"bm25", "dense", "fused"}
    assert (candidate.prompt, len(candidate.shots), candidate.retrieve) == (best.prompt, len(best.shots), best.retrieve)
    assert (candidate.embedder is None) == (candidate.retrieve.by == "bm25")


def test_the_key_is_kept_nowhere(project: Project, server: ChatServer) -> None:
    assert server.headers[0]["authorization"] == f"Bearer {KEY}"
    for path in project.root.rglob("*"):
        if path.is_file():
            assert KEY.encode() not in path.read_bytes(), path
    assert _answers(project, "rival")[0]["served_by"] == ["m-2026"]
    assert _candidate(project, "rival").endpoint.model == "big"
    asked = len(server.asked)
    text = (project.root / "tunesmith.yaml").read_text().replace("key_env: RIVAL_KEY", "timeout: 5.0")
    evaluations.evaluate(Project(project.root, parse_settings(text, "x")))
    assert len(server.asked) == asked, "neither a time limit nor another key asks an endpoint again"


def test_an_endpoint_is_a_rival_and_never_a_release(project: Project) -> None:
    verdict = evaluations.gate(project, name="rival").digest
    with pytest.raises(Refused, match="rival is an endpoint"):
        do(project, versions.register, verdict=verdict)
    text = (project.root / "tunesmith.yaml").read_text() + "release: rival\n"
    with pytest.raises(UsageError, match="cannot be released"):
        parse_settings(text, "x")
    for candidate, said in (
        ({"prompt": "p", "weights": "b"}, "'b' is not trained here"),
        ({"prompt": "p", "retrieve": {"from": "documents"}}, "needs `documents:`"),
    ):
        with pytest.raises(UsageError, match=said):
            parse_settings(yaml.safe_dump({**settings(), "candidates": {"a": candidate}, "gates": {}}), "x")


@pytest.mark.parametrize("name", ["nearest", "docs", "searched", "held"])
def test_the_others_can_be_released_and_verified(project: Project, name: str) -> None:
    verdict = evaluations.gate(project, name=name).digest
    registered = do(project, versions.register, verdict=verdict)
    version = load_version(project.store, registered.digest)
    found = verify_version(project.store, version.label)
    assert found.ok, found.problems
    with verified_copy(project.store, version) as loaded:
        assert loaded.candidate.name == name
    # As the server answers it: what was measured is what serves.
    answerer = ReadyVersions(project.store, PipelineContext(project).of().engine).answerer(version)
    dataset = load_dataset(project.store, project.store.record(version.evaluation).parents["dataset"])
    asked = [answerer.generation(example.request, ANYONE) for example in dataset.examples("test")[:8]]
    served = [each.text for each in answerer.responder.generate(asked, answerer.candidate.training)]
    assert served == [line["text"] for line in _answers(project, name)[1]][:8]


def test_labels_are_calibrated_where_probabilities_are_there(tmp_path: Path) -> None:
    plain, remote = {"prompt": "prompt.txt", "max_tokens": 4}, {"url": "http://127.0.0.1:9/v1", "model": "m"}
    candidates = {"plain": plain, "classes": {"method": "classifier"}, "nearest": {"method": "nearest"}}
    task = {"scorers": [{"name": "label", "label": "", "calibrate": True}]}
    folder = write_project(tmp_path / "p", candidates=candidates, task=task, gates={})
    rows = [
        {"prompt": f"turn {verb} the {thing} in {place}", "completion": verb, "template": f"{verb}{thing}{place}"}
        for verb in ("on", "off")
        for thing in ("light", "fan", "radio")
        for place in ("hall", "attic", "den", "loft", "study")
    ]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    loaded = Project.load(folder)
    body = loaded.store.record(evaluations.evaluate(loaded).evaluation).body["candidates"]
    assert body["classes"]["metrics"]["label"]["mean"] == 1.0
    assert body["classes"]["calibration"]["label"]["n"] == body["plain"]["calibration"]["label"]["n"]
    assert body["plain"]["calibration"]["label"]["bins"], "the base is asked how likely each label is"
    assert "calibration" not in body["nearest"], "the nearest answer says nothing of how sure it is"
    assert body["classes"]["classes"]["label"]["macro_f1"]["mean"] == 1.0
    held = {"remote": {"endpoint": remote, "constrain": True, "max_tokens": 4}}
    task = {"pattern": "on|off", "scorers": ["exact_match"]}
    with pytest.raises(UsageError, match="JSON Schema only"):
        evaluations.evaluate(Project.load(write_project(folder, candidates=held, task=task, gates={})))
