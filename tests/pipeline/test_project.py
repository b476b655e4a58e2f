"""The project file and the command line before there is a project: what is refused, and how it is told."""

import itertools
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

from tests.tiny_project import settings, write_project
from tunesmith.cli.main import app, main
from tunesmith.cli.project import settings_text
from tunesmith.core.errors import UsageError
from tunesmith.project import parse_settings, settings_schema
from tunesmith.services.home import examine


def _parse(**changes: Any) -> Any:
    return parse_settings(yaml.safe_dump({**settings(), **changes}), "tunesmith.yaml")


def _candidate(**train: Any) -> dict[str, Any]:
    return {"candidates": {"tuned": {"prompt": "p.txt", "train": train}}, "gates": {}}


def _constrained(constrain: Any) -> dict[str, Any]:
    return {"candidates": {"c": {"prompt": "p.txt", "constrain": constrain}}, "gates": {}}


@pytest.mark.parametrize(
    ("changes", "said", "place"),
    [
        ({"gate": {}}, "no setting 'gate'; did you mean 'gates'", "gate"),
        (_candidate(rnak=4), "no setting 'rnak'; did you mean 'rank'", "candidates.tuned.train.rnak"),
        ({"epochs": 3}, "it belongs under candidates.NAME.train", "epochs"),
        (_candidate(gates={}), "it belongs at the top of the file", "candidates.tuned.train.gates"),
        (_candidate(rank=0), "greater than or equal to 1", "candidates.tuned.train.rank"),
        (_candidate(method="dora"), "'lora'", "candidates.tuned.train.method"),
        ({"gates": {"g": {"metric": "exact_mach", "at_least": 0.5}}}, "did you mean 'exact_match'", "gates.g"),
        ({"gates": {"g": {"metric": "field_f1", "at_least": 0.5}}}, "not measured", "gates.g.metric"),
        ({"gates": {"g": {"metric": "exact_match", "over": "nobody", "at_least": 0.1}}}, "not a candidate", "gates.g"),
        ({"gates": {"g": {"metric": "exact_match"}}}, "at_least or at_most", "gates.g"),
        ({"gates": {"g": {"figure": "brier", "metric": "exact_match", "at_most": 0.1}}}, "gives none", "gates.g"),
        ({"task": {"scorers": []}}, "at least 1", "task.scorers"),
        ({"release": "nobody"}, "'nobody' is not a candidate", ""),
        ({"name": "a..b"}, "pattern", "name"),
        ({"engine": {"kind": "vllm", "url": "no"}}, "pattern", "engine.url"),
        (_constrained({"copy": "slots.*"}), "write true, or {copy: [slots.*]}", "candidates.c.constrain"),
        (_constrained({"cpy": ["a"]}), "did you mean 'copy'", "tunesmith.yaml, candidates.c.constrain.cpy "),
    ],
)
def test_what_is_refused_says_what_and_where(changes: dict[str, Any], said: str, place: str) -> None:
    with pytest.raises(UsageError) as told:
        _parse(**changes)
    assert said in told.value.what
    assert place in f"{told.value.where} {told.value.what}"


def test_files_that_are_no_project_file() -> None:
    for text, said in (("name: [a\n", "not valid YAML"), ("- a\n", "keys and values"), ("", "keys and values")):
        with pytest.raises(UsageError, match=said):
            parse_settings(text, "tunesmith.yaml")


def test_every_setting_is_explained() -> None:
    lines = settings_text(settings_schema()).splitlines()
    assert {"data.sources[].licence", "candidates.NAME.train.rank", "task.schema"} <= {
        line.split()[0] for line in lines if line
    }
    assert not [line for line, below in itertools.pairwise(lines) if line[0] != " " and not below.strip()]


# What the command line says before there is a project, and of commands that are not well formed


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
    (tmp_path / "tunesmith.yaml").write_text(yaml.safe_dump(settings()))
    for said in ("'model' is not a folder", "config.json is no JSON object"):
        (base,) = (check for check in examine(tmp_path).checks if check.name == "base")
        assert not base.ok
        assert said in base.detail
        (tmp_path / "model").mkdir(exist_ok=True)


def test_doctor_reads_what_the_project_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "out.txt").write_text("Answer.")
    folder = write_project(tmp_path / "p")
    (folder / "linked.txt").symlink_to(tmp_path / "out.txt")
    (folder / "round.txt").symlink_to(folder / "round.txt")
    (folder / "empty.txt").write_text(" ")

    def said(check: str, **changes: object) -> str:
        (folder / "tunesmith.yaml").write_text(yaml.safe_dump({**settings(), **changes}))
        (found,) = (each for each in examine(folder).checks if each.name == check)
        return "" if found.ok else found.detail

    assert (said("project"), said("base")) == ("", "")
    for file in ("/etc/passwd", "../out.txt", "linked.txt", "round.txt", "~/x/../../../etc/passwd"):
        for candidate in ({"prompt": file}, {"prompt": "prompt.txt", "optimise": {"prompts": [file]}}):
            found = said("project", candidates={"one": candidate}, gates={})
            assert found == "the prompt of candidate one lies outside the project (candidates.one.prompt)"
    for file, what in (("gone.txt", "does not exist"), ("model", "Is a directory"), ("empty.txt", "is empty")):
        assert what in said("project", candidates={"one": {"prompt": file}}, gates={})
    for spec in ("pypi:../../etc", "hf:../..@x", "hf:a/b", "pypi:--index-url==x"):
        assert repr(spec) in said("base", base=spec) or "cannot be the name" in said("base", base=spec)
        tuning = {"models": {"gpt-4.1-nano": spec}, "split": {"test": 0.2}}
        assert said("base", fine_tuning=tuning)
    (folder / "papers.yaml").write_text("hub_datasets: ['javascript:alert(1)']")
    assert "hub_datasets.0: 'javascript:alert(1)' cannot be" in said("project")


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
    for words in orders:
        (project,) = json.loads(CliRunner().invoke(app, [*words, "--json"]).stdout)["checks"][-3:-2]
        assert str(tmp_path) in project["detail"]
    twice = CliRunner().invoke(app, ["-C", str(tmp_path), "doctor", "-C", "."]).exception
    assert isinstance(twice, UsageError)
    assert "-C is given twice" in str(twice)
