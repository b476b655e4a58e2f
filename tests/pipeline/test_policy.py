"""Policy checks and style through the chain: asked once, judged from the record, and asked again only where needed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.chat_server import chat_server, completion
from tests.tiny_project import settings, write_project
from tunesmith.candidates.candidate import load_candidate
from tunesmith.core.errors import UsageError
from tunesmith.project import Project
from tunesmith.services.evaluations.evaluation import evaluate, report
from tunesmith.services.runs.training import run

pytestmark = pytest.mark.slow

POLICY: dict[str, Any] = {
    "doors": {"requests": ["open the door of Anna", "open the vault"], "variants": True, "lacks": "zebra"},
    "form": {"requests": "policy.jsonl", "pattern": r"^\{.*\}$"},
}
GATES: dict[str, Any] = {
    "form": {"policy": "form"},
    "doors": {"policy": "doors", "at_most": 1.0},
    "tone": {"style": "references", "at_least": 0.1},
}


@pytest.fixture(scope="module")
def judged(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("policy") / "p"
    candidates = settings()["candidates"]
    assert isinstance(candidates, dict)
    chosen = {name: candidates[name] for name in ("plain", "held", "tuned")}
    write_project(folder, candidates={**chosen, "near": {"method": "nearest"}}, policy=POLICY, gates=GATES)
    lines = [{"prompt": f"sing about lamp {k}"} for k in range(20)] + [{"prompt": "turn on kitchen light"}]
    (folder / "policy.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder, run(Project.load(folder)).document()


def test_every_candidate_is_asked_as_it_serves(judged: tuple[Path, dict[str, Any]]) -> None:
    stated = judged[1]["evaluate"]["policy"]
    assert set(stated["candidates"]) == {"plain", "held", "tuned", "near"}
    held = stated["candidates"]["held"]["checks"]["form"]
    assert (held["broke"], held["n"] + held["leaked"]) == (0, 21), "its answers are constrained to JSON"
    assert stated["candidates"]["plain"]["checks"]["form"]["broke"] > 15, "random weights do not write JSON"
    assert stated["candidates"]["near"]["checks"]["form"]["leaked"] >= 1, "the request of a training row"
    gates = {gate["name"]: gate for gate in judged[1]["gate"]["gates"]}
    assert gates["form"]["outcome"] == "fail"
    assert gates["doors"]["outcome"] == "pass"
    assert gates["tone"]["value"] is None or 0.0 <= gates["tone"]["value"] <= 1.0
    assert set(judged[1]["evaluate"]["style"]["candidates"]) == {"plain", "held", "tuned", "near"}


def test_asked_once(judged: tuple[Path, dict[str, Any]]) -> None:
    project = Project.load(judged[0])
    again = run(project).document()
    assert {stage["name"] for stage in again["stages"] if not stage["skipped"]} <= {"base"}
    found = report(project)
    assert found.policy is not None
    assert {check["name"] for check in found.policy["checks"]} == {"doors", "form"}
    answers = [project.store.record(digest) for digest in project.store.records_of("answers")]
    (bare,) = (each for each in answers if each.body["suite"] == "style")
    assert load_candidate(project.store, bare.parents["candidate"]).max_tokens == 40, "as much room as `held` has"


def _changed(folder: Path, **policy: Any) -> set[str]:
    path = folder / "tunesmith.yaml"
    before = path.read_text()
    path.write_text(yaml.safe_dump({**yaml.safe_load(before), "policy": {**POLICY, **policy}}, sort_keys=False))
    try:
        return {each["name"] for each in run(Project.load(folder)).document()["stages"] if not each["skipped"]}
    finally:
        path.write_text(before)


def test_a_changed_rule_asks_nobody_again_and_a_changed_request_everybody(judged: tuple[Path, dict[str, Any]]) -> None:
    assert _changed(judged[0], doors={**POLICY["doors"], "lacks": "lion"}) - {"base"} == {"evaluate", "gate tuned"}
    changed = _changed(judged[0], doors={**POLICY["doors"], "requests": ["open the safe"]})
    asked = {f"policy {name}" for name in ("plain", "held", "tuned", "near")}
    assert changed - {"base"} == {*asked, "evaluate", "gate tuned"}


def test_a_file_that_cannot_be_read_is_said_before_anything_is_trained(tmp_path: Path) -> None:
    write_project(tmp_path / "p", policy={"c": {"requests": "nowhere.jsonl", "lacks": "x"}}, gates=GATES | {
        "form": {"policy": "c"}, "doors": {"policy": "c"}})  # fmt: skip
    project = Project.load(tmp_path / "p")
    with pytest.raises(UsageError, match="does not exist"):
        run(project)
    assert not project.store.records_of("training")
    assert not project.store.records_of("answers")


def test_endpoints_are_asked_and_judges_judge(tmp_path: Path) -> None:
    def reply(body: dict[str, Any]) -> Any:
        system, said = body["messages"][0]["content"], body["messages"][-1]["content"]
        if not system.startswith("You check whether"):
            return 200, {}, completion("Go away." if "Anna" in said else "Certainly, kind sir.")
        return 200, {}, completion("It is rude.\nBREAKS" if "Go away" in said else "It is kind.\nKEEPS")

    with chat_server() as server:
        server.reply = reply
        there = {"url": server.url, "model": "m"}
        policy = {"kind": {"requests": POLICY["doors"]["requests"], "judge": there, "rubric": "It is polite."}}
        far = {"far": {"endpoint": there, "max_tokens": 20}}
        write_project(tmp_path / "p", candidates=far, policy=policy, gates={"g": {"policy": "kind"}})
        found = evaluate(Project.load(tmp_path / "p")).policy
        asked = len(server.asked)
        assert evaluate(Project.load(tmp_path / "p")).policy == found
        assert len(server.asked) == asked, "the same questions are not asked twice"
    assert found is not None
    told = found["candidates"]["far"]["checks"]["kind"]
    assert (told["held"], told["broke"], told["undecided"]) == (1, 1, 0)
    judged = [body for body in server.asked if body["messages"][0]["content"].startswith("You check whether")]
    assert [body["messages"][0]["content"].rpartition(": ")[2] for body in judged].count("BREAKS or KEEPS.") == 2
