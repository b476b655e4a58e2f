"""The verbs: their documents, tables and exit codes. The stages themselves are given, so that nothing needs a model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

from tests.evaluation.conftest import STANDARD, verdict_of
from tests.fabricate import Fabricated
from tunesmith.cli import evaluation as verbs
from tunesmith.core.errors import Inconclusive, TunesmithError, UsageError
from tunesmith.store.store import Store

PROJECT = """
name: home
base: base
data: {sources: [{path: data.jsonl, licence: Apache-2.0}]}
task: {scorers: [json_valid, exact_match, field_f1]}
candidates:
  zero-shot: {prompt: prompt.txt}
  few-shot: {prompt: prompt.txt, shots: 4}
  rag: {prompt: prompt.txt, retrieve: {k: 6}}
  tuned: {prompt: prompt.txt, train: {}}
"""

SERVICE = "tunesmith.services.evaluations"
app = typer.Typer()
verbs.register(app)


@pytest.fixture
def project(made: Fabricated, tmp_path: Path) -> Path:
    """A project whose store is the fabricated one."""
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "tunesmith.yaml").write_text(PROJECT)
    made.store.root.rename(tmp_path / "home" / ".tunesmith")
    made.store = Store(tmp_path / "home" / ".tunesmith")
    return tmp_path / "home"


def call(*arguments: str) -> tuple[int, str]:
    found = CliRunner().invoke(app, list(arguments))
    if isinstance(found.exception, TunesmithError):
        raise found.exception
    assert found.exception is None or isinstance(found.exception, SystemExit), found.exception
    return found.exit_code, found.stdout


def document(*arguments: str) -> tuple[int, dict[str, Any]]:
    code, output = call(*arguments, "--json")
    return code, json.loads(output)


def test_evaluate(project: Path, evaluation: str, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []
    monkeypatch.setattr(f"{SERVICE}.evaluation", lambda _context, names: asked.append(names) or evaluation)
    code, found = document("evaluate", "-C", str(project))
    assert (code, found["evaluation"], found["n"]) == (0, evaluation, 120)
    assert set(found["candidates"]["tuned"]["exact_match"]) == {"mean", "low", "high"}
    monkeypatch.setenv("COLUMNS", "60")
    code, table = call("evaluate", "tuned", "rag", "-C", str(project))
    assert code == 0
    assert "120 held-out requests in 60 groups" in table
    assert "\u2026" not in table, "no figure is cut off"
    assert asked == [None, ["tuned", "rag"]]
    assert document("leaderboard", "-C", str(project)) == (0, {"boards": []})
    assert "no version is registered" in call("leaderboard", "-C", str(project))[1]
    code, found = document("compare", "rag", "tuned", "-C", str(project))
    assert (code, found["metrics"]["exact_match"]["difference"]["low"] > 0) == (0, True)
    assert "tuned against rag, 120 requests" in call("compare", "rag", "tuned", "-C", str(project))[1]
    with pytest.raises(UsageError, match="is not a version"):
        call("compare", "rag", "toned", "-C", str(project))


def test_gate(project: Path, made: Fabricated, evaluation: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, gates, verdict, code in (
        ("tuned", STANDARD, "pass", 0),
        ("zero-shot", STANDARD, "fail", 3),
        ("tuned", {}, "inconclusive", 4),
    ):
        digest = verdict_of(made, evaluation, gates, name)
        monkeypatch.setattr(f"{SERVICE}.verdict", lambda _context, _who, digest=digest: digest)
        exit_code, found = document("gate", name, "-C", str(project))
        assert (exit_code, found["verdict"]) == (code, verdict)
        exit_code, table = call("gate", name, "-C", str(project))
        assert exit_code == code
        assert f"verdict: {verdict}" in table


def test_report(project: Path, made: Fabricated, evaluation: str, tmp_path: Path) -> None:
    code, said = call("report", "-C", str(project))
    assert code == 0
    assert "no gates have judged it" in said
    assert "no gates have judged it" in (project / "report.html").read_text()
    (project / "report.html").unlink()
    verdict_of(made, evaluation)
    code, data = document("report", "-C", str(project), "--output", str(tmp_path / "page.html"))
    assert (code, data["advice"]["release"]) == (0, "tuned")
    assert "Release tuned." in (tmp_path / "page.html").read_text()
    document("report", "-C", str(project))
    code, text = call("report", "--markdown", "-C", str(project))
    assert (code, text[:8], "| candidate |" in text) == (0, "## tuned", True)
    assert not (project / "report.html").exists(), "--json or --markdown alone writes no file"
    call("report", "--markdown", "-o", str(project / "r.md"), "-C", str(project))
    assert (project / "r.md").read_text() == text
    for words, refused in ((["--markdown", "--json"], "both write to stdout"), (["home@v9"], "no version")):
        with pytest.raises(UsageError, match=refused):
            call("report", *words, "-C", str(project))
    record = made.store.record(evaluation)
    made.store.put_record(record.model_copy(update={"blobs": {"scores.jsonl": made.store.put_bytes(b"")}}))
    with pytest.raises(Inconclusive) as caught:
        call("report", "-C", str(project))
    assert caught.value.exit_code == 4
    (tmp_path / "tunesmith.yaml").write_text(PROJECT)
    with pytest.raises(UsageError, match="nothing has been evaluated"):
        call("report", "-C", str(tmp_path))
