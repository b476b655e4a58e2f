"""A server keeps the settings of its start: once the project file states others, it decides nothing by the old ones."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.attack_table import Happened
from tests.console.evidence_rows import put_evaluation
from tests.console.test_login import cookie_of, csrf, plain
from tests.fabricate import NAME, OWNER, STEWARD, Scene
from tests.rollout.conftest import logged
from tests.server.conftest import running
from tests.server.fake_engine import FakeEngine
from tests.server.fine_tuning_project import MODEL, fine_tuning_settings, write_fine_tuning_project
from tests.server.test_decisions import Approver
from tests.server.test_erasure import ASKED
from tunesmith.core.errors import Refused
from tunesmith.jobs import queue
from tunesmith.pipeline import run as pipeline_run
from tunesmith.project import Project
from tunesmith.registry.versions import Version, get_alias, list_versions
from tunesmith.store.people.identities import set_roles
from tunesmith.store.people.tokens import issue_token

SAID = "The project file changed since this server started. Then: restart it, or put the file back."
STRICTER = {"right": {"metric": "exact_match", "at_least": 0.99}}


def rewritten(file: Path, **changes: object) -> None:
    file.write_text(yaml.safe_dump({**yaml.safe_load(file.read_text()), **changes}))


@pytest.mark.attack("settings", "the project file changes while a server decides by the settings of its start")
def test_nothing_is_decided_by_settings_that_the_file_no_longer_states(
    scene: Scene, versions: dict[int, Version], tmp_path: Path, happened: Happened
) -> None:
    project = Project.load(write_fine_tuning_project(tmp_path / "p"))
    project.store = scene.store
    with running(scene, FakeEngine(scene.base), project=project) as served:
        verdict = put_evaluation(scene).verdict
        served.begin(versions[1])
        live = served.paused(versions[2], 50)
        owner, steward = (issue_token(scene.store, name, actor=OWNER) for name in (OWNER, STEWARD))
        ada, stella = Approver(served, "ada", tmp_path), Approver(served, "stella", tmp_path)
        set_roles(scene.store, "stella", ["steward"], actor=OWNER)
        assert served.send("/api/erasures", ASKED, steward).status_code == 200
        approval = ada.signed(ada.prepare(f"{NAME}@v4").json())
        refusal = {"version": f"{NAME}@v3", "decision": "refuse", "reason": "a customer's name"}
        upload = {"file": ("rows.jsonl", b"{}\n")}
        with served.http(owner) as http:
            uploaded = http.post("/v1/files", files=upload, data={"purpose": "fine-tune"}).json()["id"]
        signature = {"at": "2031-01-01T00:00:00.000000Z", "key": approval["key"], "signature": approval["signature"]}
        asked: list[tuple[str, dict[str, Any], str]] = [
            ("/api/versions", {"verdict": verdict, "name": "desk", "override": "why not"}, owner),
            ("/api/decisions/prepare", {"version": f"{NAME}@v4", "decision": "approve"}, ada.token),
            ("/api/decisions", approval, ada.token),
            ("/api/rollouts", {"version": f"{NAME}@v3"}, served.token),
            (f"/api/rollouts/{live.id}/resume", {"reason": "go on"}, served.token),
            (f"/api/rollouts/{live.id}/promote", {"reason": "good"}, served.token),
            ("/api/erasures/1/prepare", {}, stella.token),
            ("/api/erasures/1/confirm", signature, stella.token),
            (f"/api/datasets/{scene.dataset}/sign-offs", {"reason": "read"}, steward),
            ("/api/jobs", {}, owner),
            ("/v1/fine_tuning/jobs", {"model": MODEL, "training_file": uploaded}, owner),
        ]
        file = project.root / "tunesmith.yaml"
        before = file.read_text()
        for change in ("stricter gates", "not valid", "gone"):
            rewritten(file, gates=STRICTER)
            if change != "stricter gates":
                file.write_text("name: [") if change == "not valid" else file.unlink()
            for path, body, token in asked:
                answer = served.send(path, body, token)
                said = answer.json()["error"]
                assert (answer.status_code, said["code"], said["message"]) == (409, "project_changed", SAID), path
                happened("refused")
            file.write_text(before)
        rewritten(file, gates=STRICTER)
        with plain(served, cookie_of(served, OWNER)) as http:
            form = {"csrf": csrf(http.get("/console/jobs").text), **asked[0][1]}
            for answer in (http.post("/console/do/versions", data=form), http.get("/console/jobs/start")):
                assert (answer.status_code, "changed since this server started" in answer.text) == (409, True)
                happened("refused")
        assert len(list_versions(scene.store)) == 4
        assert queue.list_jobs(scene.store) == []
        assert not logged(scene, "erase.confirm")
        # What only takes away goes on.
        refused = ada.submit(ada.signed(ada.http.post("/api/decisions/prepare", json=refusal).json()))
        assert (refused.status_code, refused.json()["decision"]) == (200, "refuse")
        assert served.send(f"/api/rollouts/{live.id}/abort", {"reason": "complaints"}).status_code == 200
        file.write_text("# as it was\n" + before)
        for path, body, token in (asked[0], asked[2], asked[9]):
            answer = served.send(path, body, token)
            assert answer.status_code == 200, answer.text
        alias = get_alias(scene.store, NAME)
        assert alias is not None
        assert alias.version == versions[1].digest


def test_a_run_registers_nothing_by_settings_that_changed_meanwhile(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = fine_tuning_settings(candidates={"plain": {"max_tokens": 8}})
    del settings["fine_tuning"]
    folder, judged = write_fine_tuning_project(tmp_path / "p"), pipeline_run.verdict
    file = folder / "tunesmith.yaml"
    file.write_text(yaml.safe_dump(settings))

    def while_the_file_changes(context: Any) -> str:
        rewritten(file, gates=STRICTER)
        return judged(context)

    monkeypatch.setattr(pipeline_run, "verdict", while_the_file_changes)
    project = Project.load(folder)
    with pytest.raises(Refused, match="the project file changed since this run began"):
        pipeline_run.run(project)
    assert list_versions(project.store) == []
    file.write_text(yaml.safe_dump(settings))
    monkeypatch.undo()
    assert pipeline_run.run(project).registered is not None
