"""The verbs `rollout`, `monitor` and `recall` from the outside: documents, exit codes, errors."""

import json
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

from tests.fabricate import NAME, OPERATOR, OWNER, STEWARD, Scene, put_requests
from tunesmith.cli import monitoring, rollout
from tunesmith.core.errors import TunesmithError
from tunesmith.data.dataset import load_dataset
from tunesmith.registry.versions import Version
from tunesmith.rollout.controller import advance
from tunesmith.store.store import Store

PROJECT = f"""
name: {NAME}
base: ./nowhere
data: {{sources: [{{path: rows.jsonl, licence: Apache-2.0}}]}}
task: {{scorers: [json_valid, exact_match]}}
candidates: {{plain: {{prompt: prompt.txt}}}}
rollout: {{steps: [{{setWeight: 10}}, {{analysis: {{metric: json_valid}}}}, {{pause: }}, {{setWeight: 100}}]}}
monitoring: {{min_requests: 20}}
"""


class Folder:
    """A project's folder, in which verbs are run."""

    def __init__(self, root: Path, scene: Scene) -> None:
        self.root, self.scene = root, scene
        self.app = typer.Typer()
        for noun in (rollout, monitoring):
            noun.register(self.app)
        (root / "tunesmith.yaml").write_text(PROJECT)
        scene.store.engine.dispose()
        scene.store.root.rename(root / ".tunesmith")
        scene.store = Store(root / ".tunesmith")

    def run(self, *words: str, user: str = OPERATOR) -> tuple[int, Any]:
        """(exit code, the --json document). An error gives its own."""
        who = [] if words[0] in ("monitor", "impact") or words[:2] == ("rollout", "status") else ["--as", user]
        result = CliRunner().invoke(self.app, [*words, "-C", str(self.root), "--json", *who])
        if isinstance(result.exception, TunesmithError):
            return result.exception.exit_code, str(result.exception)
        assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
        return result.exit_code, json.loads(result.stdout) if result.stdout else result.stderr

    def told(self, *words: str) -> str:
        """What a person sees."""
        return CliRunner().invoke(self.app, [*words, "-C", str(self.root)]).stdout


@pytest.fixture
def folder(scene: Scene, versions: dict[int, Version], tmp_path: Path) -> Folder:
    root = tmp_path / "project"
    root.mkdir()
    scene.store.engine.dispose()
    del scene.store.engine
    return Folder(root, scene)


def test_a_rollout_by_its_verbs(folder: Folder) -> None:
    code, first = folder.run("rollout", "start", f"{NAME}@v1")
    assert (code, first["status"], first["stable"]) == (0, "promoted", None)
    code, second = folder.run("rollout", "start", f"{NAME}@v2")
    assert (code, second["status"], second["stable"]["version"]) == (0, "running", f"{NAME}@v1")
    advance(folder.scene.store, 2)
    code, listed = folder.run("rollout", "status")
    assert [one["rollout"] for one in listed["rollouts"]] == [2, 1]
    assert listed["rollouts"][0]["analysis"]["outcome"] == "inconclusive"
    told = folder.told("rollout", "status", NAME)
    assert "rollout 2: home@v1 -> home@v2: running, canary weight 10%" in told
    assert "> analysis metric json_valid" in told
    assert folder.run("rollout", "promote", NAME)[0] == 3
    assert folder.run("rollout", "resume", NAME)[0] == 3
    code, ended = folder.run("rollout", "abort", "2", "--reason", "enough")
    assert (code, ended["status"], ended["reason"]) == (0, "aborted", "enough")
    assert folder.run("rollout", "abort", NAME)[0] == 2
    code, forced = folder.run("rollout", "start", f"{NAME}@v4", "--override", "a drill", user=OWNER)
    assert (code, forced["override"]) == (0, "a drill")
    assert folder.run("rollout", "promote", NAME, "--override", "a drill", user=OWNER)[1]["status"] == "promoted"
    code, undone = folder.run("rollout", "rollback", NAME)
    assert (code, undone["rollout"], undone["status"]) == (0, 3, "rolled_back")


def test_what_cannot_be_done_says_why_and_with_which_code(folder: Folder) -> None:
    for words, user, expected, says in (
        (["start", f"{NAME}@v4"], OPERATOR, 3, "is not approved"),
        (["start", f"{NAME}@v1"], "nobody", 2, "no user nobody"),
        (["resume", "7"], OPERATOR, 2, "no rollout 7"),
        (["rollback", NAME], OPERATOR, 3, "has no champion"),
    ):
        code, said = folder.run("rollout", *words, user=user)
        assert (code, says in said) == (expected, True), words


@pytest.mark.attack("terminal", "a rollout's number that no database holds", "wrong usage, or none")
@pytest.mark.parametrize("number", ["9" * 23, "9" * 5000, "\u0664\u0662"], ids=["23 nines", "5000 nines", "arabic"])
def test_a_number_that_is_none_is_wrong_usage(folder: Folder, number: str) -> None:
    for verb in ("resume", "promote", "abort"):
        code, said = folder.run("rollout", verb, number)
        assert (code, "has 0 live rollouts" in said or "at most 200" in said) == (2, True)
    code, said = folder.run("rollout", "status", number)
    assert code == 2 or said["rollouts"] == []


def test_monitor_ends_with_the_code_of_its_verdict(folder: Folder, versions: dict[int, Version]) -> None:
    def serve_rows(lengths: list[int]) -> None:
        rows = [{"features": {"characters": length, "nearest": 0.8}} for length in lengths]
        put_requests(folder.scene.store, versions[1].digest, rows)

    folder.run("rollout", "start", f"{NAME}@v1")
    code, empty = folder.run("monitor")
    assert (code, empty["verdict"], empty["requests"]) == (4, "inconclusive", 0)
    test_split = load_dataset(folder.scene.store, folder.scene.dataset).examples("test")
    lengths = [len(row.messages[0].content) for row in test_split]
    serve_rows([lengths[number % len(lengths)] for number in range(300)])
    code, like = folder.run("monitor", f"{NAME}@v1")
    assert {one["name"] for one in like["findings"]} == {"characters", "nearest", "unlike", "json_valid"}
    serve_rows([500] * 3000)
    code, drifted = folder.run("monitor", f"{NAME}@champion", "--hours", "1")
    assert (code, drifted["verdict"]) == (3, "drift")
    assert "retrain" in folder.told("monitor")
    assert folder.run("monitor", "--tenant", "nobody")[0] == 2


def test_recall_by_row_and_base(folder: Folder) -> None:
    def planned(option: str, value: str) -> dict[str, Any]:
        code, found = folder.run("recall", option, value, "--reason", "asked to", "--dry-run", user=STEWARD)
        assert (code, found["done"]) == (0, False)
        return dict(found)

    row = load_dataset(folder.scene.store, folder.scene.dataset).examples("train")[3]
    reached = planned("--row", row.id)["reached"]
    assert {one["label"] for one in reached if one["kind"] == "version"} == {f"{NAME}@v{n}" for n in (1, 2, 3, 4)}
    for option, value in (("--subject", str(row.subject)), ("--licence", row.licence), ("--source", row.source)):
        assert planned(option, value)["cause"] == f"{option[2:]} {value}"
    planned("--base", folder.scene.base.removeprefix("sha256:")[:12])
    why = ["--reason", "x"]
    two, none, unknown = ["--row", "a", "--source", "b", *why], ["--row", "a", *why], ["--version", f"{NAME}@v9", *why]
    for words in (why, two, none, unknown, ["--row", row.id], ["--row", row.id, "--check"]):  # nothing was done yet
        assert folder.run("recall", *words, user=STEWARD)[0] == 2, words
    assert folder.run("recall", "--row", row.id, *why, user=OPERATOR)[0] == 3


def test_impact_lists_what_depends_on_a_base(folder: Folder, versions: dict[int, Version]) -> None:
    folder.run("rollout", "start", f"{NAME}@v1")
    put_requests(folder.scene.store, versions[1].digest, [{}] * 3)
    base = folder.scene.base
    code, found = folder.run("impact", base.removeprefix("sha256:")[:12])
    assert (code, found["base"]) == (0, base)
    assert {one["version"]: (one["aliases"], one["requests"]) for one in found["versions"]} == {
        f"{NAME}@v1": (["champion"], 3), **{f"{NAME}@v{n}": ([], 0) for n in (2, 3, 4)}
    }  # fmt: skip
    assert folder.run("impact", found["spec"])[1] == found
    assert f"{NAME}@v1" in folder.told("impact", found["spec"])
    assert folder.run("impact", folder.scene.dataset.removeprefix("sha256:")[:12])[0] == 2
    assert folder.run("impact", "hf:nobody/nothing@main")[0] == 2


def test_a_recall_ends_rollouts_and_a_retrain_is_due_until_another_version_serves(folder: Folder) -> None:
    folder.run("rollout", "start", f"{NAME}@v1")
    folder.run("rollout", "start", f"{NAME}@v2")
    assert folder.run("recall", "--pending") == (0, {"pending_retrains": []})
    assert folder.told("recall", "--pending").strip() == "no retrain is pending"
    recall = ("recall", "--version", f"{NAME}@v1", "--reason", "wrong")
    assert folder.run(*recall, "--dry-run", user=STEWARD)[1]["aborted_rollouts"] == []
    code, done = folder.run(*recall, user=STEWARD)
    assert (code, done["done"], done["aborted_rollouts"]) == (0, True, [2])
    assert any(f"tunesmith rollout rollback {NAME}" in line for line in done["next"])
    assert folder.run("rollout", "status", "2")[1]["rollouts"][0]["reason"] == "recalled: wrong"
    assert folder.run("rollout", "start", f"{NAME}@v1")[0] == 3
    code, listed = folder.run("recall", "--pending")
    assert code == 3
    (one,) = listed["pending_retrains"]
    assert (one["version"], one["replacement"], one["answers"]) == (f"{NAME}@v1", f"{NAME}@v4", False)
    assert [each["version"] for each in folder.run("monitor")[1]["pending_retrains"]] == [f"{NAME}@v1"]
    assert f"{NAME}@v1 was recalled" in folder.told("monitor")
    said = folder.told("recall", "--pending")
    assert f"retrain pending: {NAME}: {NAME}@v1 was recalled" in said
    assert f"next: have {NAME}@v4 approved: `tunesmith approve {NAME}@v4" in said
    assert folder.run("recall", "--pending", "--row", "x")[0] == 2
    # v1 answers no more: what replaces it serves at once, and what was due is over.
    code, started = folder.run("rollout", "start", f"{NAME}@v2")
    assert (code, started["status"]) == (0, "promoted")
    assert "recalled: wrong" in started["reason"]
    assert folder.run("recall", "--pending") == (0, {"pending_retrains": []})
    assert folder.run("recall", "--version", f"{NAME}@v1", "--check", user=STEWARD)[1]["gone"] is True
