"""Builds the same rows on a Ray cluster of two workers and without Ray.

test_ray_runner.py runs it by `python -m tests.data.building.build_on_ray FILE`, because a driver of Ray whose cluster
dies ends its whole process.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from unittest import mock

import ray

from tests.data.building.test_shards import CHOSEN, mixed
from tests.data.rows import build, many_rows, settings, write_jsonl
from tests.tiny import write_model
from tunesmith.core.errors import UsageError
from tunesmith.data.building import shards
from tunesmith.data.building.ray_runner import RayRunner


def main() -> None:
    """Write {"by_command": digests, "in_process": digests, "error": where the broken row is} into the file. Not to
    stdout, on which Ray prints too."""
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
    with tempfile.TemporaryDirectory() as folder:
        first, second = Path(folder) / "first", Path(folder) / "second"
        first.mkdir()
        second.mkdir()
        found = {"by_command": by_command(first, ray.get_runtime_context().gcs_address), **in_process(second)}
    ray.shutdown()
    Path(sys.argv[1]).write_text(json.dumps(found))


def by_command(folder: Path, address: str) -> list[str]:
    """The digests that `data build` prints on this cluster, from another process, and without it."""
    write_model(folder / "base")
    write_jsonl(folder / "rows.jsonl", many_rows(300))
    (folder / "p.txt").write_text("answer")
    project = {
        "name": "demo",
        "base": "./base",
        "data": {"sources": [{"path": "*.jsonl", "licence": "MIT"}], "privacy": {"entities": ["EMAIL_ADDRESS"]}},
        "candidates": {"zero-shot": {"prompt": "p.txt"}},
    }
    (folder / "tunesmith.yaml").write_text(json.dumps(project))
    digests = []
    for engine in ("ray", "local"):
        shutil.rmtree(folder / ".tunesmith", ignore_errors=True)
        command = [sys.executable, "-m", "tunesmith", "data", "build", "--engine", engine, "--json", "-C", str(folder)]
        environment = os.environ | {"RAY_ADDRESS": address}
        done = subprocess.run(command, env=environment, check=True, stdout=subprocess.PIPE, text=True)
        digests.append(str(json.loads(done.stdout)["dataset"]))
    return digests


def in_process(folder: Path) -> dict[str, object]:
    """The digests of a build on the cluster, whose rows are many shards, and without it; where a broken row is."""
    path = write_jsonl(folder / "rows.jsonl", mixed(400))
    whole = build(folder, settings(**CHOSEN))
    with mock.patch.object(shards, "SHARD_BYTES", 15_000):
        sharded = build(folder, settings(**CHOSEN), runner=RayRunner(2))
        with path.open("a") as file:
            file.write("{\n")
        try:
            build(folder, settings(**CHOSEN), runner=RayRunner(2))
            where = ""
        except UsageError as error:
            where = error.where or ""
    return {"in_process": [sharded.digest, whole.digest], "error": where}


if __name__ == "__main__":
    main()
