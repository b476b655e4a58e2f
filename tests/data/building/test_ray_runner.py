"""The same dataset by Ray, on a local cluster of two workers. Skipped where the extra `ray` is not installed.

The test runs this file as a program, because a driver of Ray whose cluster dies ends its whole process.
"""

from __future__ import annotations

import io
import json
import os
import shutil
import sys
import tempfile
from contextlib import redirect_stdout
from functools import partial
from pathlib import Path
from unittest import mock

import pytest

from tests.data.building.test_shards import CHOSEN, mixed
from tests.data.rows import write_jsonl
from tests.own_group import run_whole_group
from tests.tiny import write_model
from tunesmith.cli.main import app
from tunesmith.core.errors import UsageError
from tunesmith.data.building import ray_runner, shards

pytestmark = [pytest.mark.slow, pytest.mark.long]

ray = pytest.importorskip("ray", reason="the extra `ray` is not installed")
# A crowded machine starts a cluster slowly. Ray's own limits are made for machines that do nothing else, and its
# workers leave the cores to all other processes.
PATIENT = {
    "RAY_raylet_start_wait_time_s": "180",
    "RAY_gcs_server_request_timeout_seconds": "180",
    "RAY_health_check_timeout_ms": "60000",
    "RAY_memory_monitor_refresh_ms": "0",
    "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "300",
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",
    "RAY_worker_niceness": "0",
}


def test_the_same_digests_and_the_same_errors(tmp_path: Path) -> None:
    """By a process of its own, which may end with its cluster. tests/jobs/test_on_ray.py joins a cluster that runs."""
    root = Path(__file__).parents[3]
    environment = {**os.environ, **PATIENT, "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-m", "tests.data.building.test_ray_runner", str(tmp_path / "found.json")]
    done = run_whole_group(command, cwd=root, env=environment, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads((tmp_path / "found.json").read_text())
    assert found["digests"][0] == found["digests"][1]
    assert found["error"].startswith("rows.jsonl, line")


def main() -> None:
    """Write {"digests": on the cluster and without it, "error": where the broken row is} into the file. Not to stdout,
    on which Ray prints too."""
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
    with tempfile.TemporaryDirectory() as folder:
        found = built(Path(folder))
    ray.shutdown()
    Path(sys.argv[1]).write_text(json.dumps(found))


def built(folder: Path) -> dict[str, object]:
    """The digests of a build on the cluster, whose rows are many shards, and without it; where a broken row is."""
    write_model(folder / "base")
    (folder / "p.txt").write_text("answer")
    rows = write_jsonl(folder / "rows.jsonl", mixed(400))
    project = {
        "name": "demo",
        "base": "./base",
        "data": {"sources": [{"path": "rows.jsonl", "licence": "MIT"}], **CHOSEN},
        "candidates": {"zero-shot": {"prompt": "p.txt"}},
    }
    (folder / "tunesmith.yaml").write_text(json.dumps(project))
    whole = digest_by("local", folder)
    with mock.patch.object(shards, "SHARD_BYTES", 15_000):
        sharded = digest_by("ray", folder)
        with rows.open("a") as file:
            file.write("{\n")
        try:
            with mock.patch.object(ray_runner, "RayRunner", partial(ray_runner.RayRunner, workers=1)):
                digest_by("ray", folder)
            where = ""
        except UsageError as error:
            where = error.where or ""
    return {"digests": [sharded, whole], "error": where}


def digest_by(engine: str, folder: Path) -> str:
    """The digest that `data build` prints, in a copy of the project."""
    printed = io.StringIO()
    with tempfile.TemporaryDirectory() as other, redirect_stdout(printed):
        copy = shutil.copytree(folder, Path(other) / "copy")
        app(["data", "build", "--engine", engine, "--json", "-C", str(copy)], standalone_mode=False)
    return str(json.loads(printed.getvalue())["dataset"])


if __name__ == "__main__":
    main()
