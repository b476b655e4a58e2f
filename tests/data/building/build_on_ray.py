"""Builds the same rows on a Ray cluster of two workers and without Ray.

test_ray_runner.py runs it by `python -m tests.data.building.build_on_ray FILE`, because a driver of Ray whose cluster
dies ends its whole process.
"""

from __future__ import annotations

import io
import json
import shutil
import sys
import tempfile
from contextlib import redirect_stdout
from functools import partial
from pathlib import Path
from unittest import mock

import ray

from tests.data.building.test_shards import CHOSEN, mixed
from tests.data.rows import write_jsonl
from tests.tiny import write_model
from tunesmith.cli.main import app
from tunesmith.core.errors import UsageError
from tunesmith.data.building import ray_runner, shards


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
