"""What the command line says before there is a project, and of commands that are not well formed."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from tunesmith.cli.main import app, main
from tunesmith.core.errors import UsageError
from tunesmith.services.doctor import examine


def test_doctor_says_how_to_fix_what_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TUNESMITH_THREADS", "1")
    checks = {check.name: check for check in examine(tmp_path).checks}
    assert checks["python"].ok
    assert checks["processor"].ok
    assert checks["processor"].detail.endswith("; TUNESMITH_THREADS: 1")
    assert not checks["project"].ok
    assert checks["project"].fix
    monkeypatch.setenv("TUNESMITH_THREADS", "two")
    (processor,) = (check for check in examine(tmp_path).checks if check.name == "processor")
    assert not processor.ok
    assert processor.fix


def test_errors_on_the_command_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def said(*words: str) -> tuple[str, str]:
        monkeypatch.setattr(sys, "argv", ["tunesmith", *words])
        with pytest.raises(SystemExit) as ended:
            main()
        assert ended.value.code == 2
        return capsys.readouterr()

    for words in (["nosuch"], ["run", "--nope"], ["run", "-C", str(tmp_path)]):
        out, error = said(*words)
        assert error.startswith("error: ")
        assert "Traceback" not in error
        assert out == ""
    assert json.loads(said("run", "-C", str(tmp_path), "--json")[0])["error"]["exit"] == 2


@pytest.mark.slow
def test_the_folder_may_be_named_before_the_command(tmp_path: Path) -> None:
    orders = (["-C", str(tmp_path), "doctor"], ["doctor", "-C", str(tmp_path)])
    found = [CliRunner().invoke(app, [*words, "--json"]) for words in orders]
    first, second = (json.loads(done.stdout)["checks"] for done in found)
    assert first[-3:] == second[-3:]
    assert str(tmp_path) in first[-3]["detail"]
    twice = CliRunner().invoke(app, ["-C", str(tmp_path), "doctor", "-C", "."]).exception
    assert isinstance(twice, UsageError)
    assert "-C is given twice" in str(twice)


def test_help_imports_nothing_heavy() -> None:
    script = (
        "import sys, tunesmith.cli.main; print([m for m in ('torch','transformers','scipy','pyarrow','sqlalchemy',"
        "'fastapi','pydantic','presidio_analyzer') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
