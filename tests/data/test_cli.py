"""`tunesmith data`: its documents, its exit codes, and the same digest from another process."""

import json
import os
import subprocess
import sys
from pathlib import Path
from unittest import mock

from typer.testing import CliRunner

from tests.commands import call, printed
from tests.data.rows import build, many_rows, row, write_jsonl
from tests.tiny import TEMPLATE, write_model
from tunesmith.cli.main import app
from tunesmith.data.building import ray_runner, shards
from tunesmith.store.store import Store

DOCUMENT = {"dataset", "rows", "splits", "leakage", "licences", "privacy"}


def test_build_makes_a_project_s_dataset_and_a_changed_template_another(tmp_path: Path) -> None:
    write_model(tmp_path / "base")
    talk = row("turn on the lamp", "said at length " * 60)
    talk["messages"] += row("and the fan", "on")["messages"]
    rows = [*many_rows(80), *(row(f"say {n}", "x" * 2000) for n in range(2)), talk]
    write_jsonl(tmp_path / "rows.jsonl", [{**one, "note": 1} for one in rows])
    (tmp_path / "tunesmith.yaml").write_text(
        "name: demo\nbase: ./base\ndata: {sources: [{path: '*.jsonl', licence: MIT}], overlong: truncate, "
        "privacy: {entities: []}}\ncandidates: {tuned: {prompt: p.txt, train: {max_length: 200}}}\n"
    )
    (tmp_path / "p.txt").write_text("answer")
    built, on_ray = [], mock.Mock(side_effect=shards.LocalRunner)
    changed = TEMPLATE.replace("<|im_end|>\n", "<|im_end|>")
    for template, engine in ((TEMPLATE, "local"), (TEMPLATE, "ray"), (changed, "local")):
        (tmp_path / "base" / "chat_template.jinja").write_text(template)
        with mock.patch.object(ray_runner, "RayRunner", on_ray):
            built.append(call(tmp_path, "data", "build", "--engine", engine))
    first, again, other = built
    assert on_ray.call_count == 1
    assert first.keys() >= DOCUMENT
    assert first["rows"] == {"read": 83, "kept": 81, "changed": 1, "removed": {"overlong": 2}}
    assert first["ignored_keys"] == {"note": 83}
    assert first["tokens"]["longest"] > 0
    assert again["dataset"] == first["dataset"]
    assert other["dataset"] != first["dataset"], "rows are counted as the template renders them"


def test_show_gives_the_account_and_rows_and_verify_the_problems(tmp_path: Path) -> None:
    folder, dataset = tmp_path / "store", build(tmp_path, rows=[*many_rows(80), row("empty", "")])
    document = call(folder, "data", "show", "--split", "test", "--limit", "2")
    assert document.keys() >= DOCUMENT
    assert document["dataset"] == dataset.digest
    assert document["leakage"].keys() >= {"shared_groups", "near_pairs"}
    assert [one["id"] for one in document["examples"]] == [one.id for one in dataset.examples("test")[:2]]
    document = call(folder, "data", "show", dataset.digest[7:15], "--split", "removed")
    assert [one["reason"] for one in document["examples"]] == ["empty assistant turn"]
    assert "empty assistant turn" in printed(folder, "data", "show")
    assert call(folder, "data", "verify")["ok"]
    blob = Store(folder).blob_path(dataset.record.blobs["train.jsonl"])
    blob.chmod(0o644)
    blob.write_bytes(blob.read_bytes()[:-1] + b" ")
    for as_json in ([], ["--json"]):
        found = CliRunner().invoke(app, ["data", "verify", "-C", str(folder), *as_json])
        assert (found.exit_code, str(blob) in found.stdout.replace("\n", "")) == (3, True)


def test_the_digest_is_the_same_in_every_process(tmp_path: Path) -> None:
    """Sets and dictionaries are ordered by a seed of the process: no digest may depend on it."""
    rows = [row(f"play {n} by the band", json.dumps({"song": str(n), "by": "the band"})) for n in range(40)]
    write_jsonl(tmp_path / "rows.jsonl", [*many_rows(120), *rows])
    code = "import pathlib, sys; from tests.data.rows import build; print(build(pathlib.Path(sys.argv[1])).digest)"
    command = [sys.executable, "-c", code, str(tmp_path)]
    environment = {**os.environ, "PYTHONHASHSEED": "1", "PYTHONPATH": str(Path(__file__).parents[2])}
    told = subprocess.run(command, env=environment, check=True, capture_output=True, text=True).stdout
    assert told.strip() == build(tmp_path).digest
