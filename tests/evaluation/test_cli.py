"""The verbs: their documents, tables and exit codes. The stages themselves are given, so that nothing needs a model."""

from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from tests.commands import call, printed
from tests.evaluation.conftest import STANDARD, verdict_of
from tests.fabricate import Fabricated
from tunesmith.cli.main import app
from tunesmith.core.errors import Inconclusive, UsageError
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


@pytest.fixture
def project(made: Fabricated, tmp_path: Path) -> Path:
    """A project whose store is the fabricated one."""
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "tunesmith.yaml").write_text(PROJECT)
    made.store.root.rename(tmp_path / "home" / ".tunesmith")
    made.store = Store(tmp_path / "home" / ".tunesmith")
    return tmp_path / "home"


def test_evaluate(project: Path, evaluation: str, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []
    monkeypatch.setattr(f"{SERVICE}.evaluation", lambda _context, names: asked.append(names) or evaluation)
    found = call(project, "evaluate")
    assert (found["evaluation"], found["n"]) == (evaluation, 120)
    assert set(found["candidates"]["tuned"]["exact_match"]) == {"mean", "low", "high"}
    monkeypatch.setenv("COLUMNS", "60")
    table = printed(project, "evaluate", "tuned", "rag")
    assert "120 held-out requests in 60 groups" in table
    assert "\u2026" not in table, "no figure is cut off"
    assert asked == [None, ["tuned", "rag"]]
    assert call(project, "leaderboard") == {"boards": []}
    assert "no version is registered" in printed(project, "leaderboard")
    assert call(project, "compare", "rag", "tuned")["metrics"]["exact_match"]["difference"]["low"] > 0
    assert "tuned against rag, 120 requests" in printed(project, "compare", "rag", "tuned")
    with pytest.raises(UsageError, match="is not a version"):
        call(project, "compare", "rag", "toned")


def test_gate(project: Path, made: Fabricated, evaluation: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, gates, verdict, code in (
        ("tuned", STANDARD, "pass", 0),
        ("zero-shot", STANDARD, "fail", 3),
        ("tuned", {}, "inconclusive", 4),
    ):
        digest = verdict_of(made, evaluation, gates, name)
        monkeypatch.setattr(f"{SERVICE}.verdict", lambda _context, _who, digest=digest: digest)
        for as_json, said in (([], f"verdict: {verdict}"), (["--json"], f'"verdict":"{verdict}"')):
            found = CliRunner().invoke(app, ["gate", name, "-C", str(project), *as_json])
            assert (found.exit_code, said in found.stdout.replace('": "', '":"')) == (code, True)


def test_report(project: Path, made: Fabricated, evaluation: str, tmp_path: Path) -> None:
    for text in (printed(project, "report"), (project / "report.html").read_text()):
        assert "no gates have judged it" in text
    (project / "report.html").unlink()
    verdict_of(made, evaluation)
    data = call(project, "report", "--output", str(tmp_path / "page.html"))
    assert data["advice"]["release"] == "tuned"
    assert "Release tuned." in (tmp_path / "page.html").read_text()
    call(project, "report")
    text = printed(project, "report", "--markdown")
    assert (text[:8], "| candidate |" in text) == ("## tuned", True)
    assert not (project / "report.html").exists(), "--json or --markdown alone writes no file"
    printed(project, "report", "--markdown", "-o", str(project / "r.md"))
    assert (project / "r.md").read_text() == text
    for words, refused in ((["--markdown"], "both write to stdout"), (["home@v9"], "no version")):
        with pytest.raises(UsageError, match=refused):
            call(project, "report", *words)
    record = made.store.record(evaluation)
    made.store.put_record(record.model_copy(update={"blobs": {"scores.jsonl": made.store.put_bytes(b"")}}))
    with pytest.raises(Inconclusive):
        call(project, "report")
    (tmp_path / "tunesmith.yaml").write_text(PROJECT)
    with pytest.raises(UsageError, match="nothing has been evaluated"):
        call(tmp_path, "report")
