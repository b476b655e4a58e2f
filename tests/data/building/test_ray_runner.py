"""The same dataset by Ray, on a local cluster of two workers. Skipped where the extra `ray` is not installed."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.data.building.test_shards import CHOSEN, mixed
from tests.data.rows import build, many_rows, settings, write_jsonl
from tests.tiny import write_model
from tunesmith.core.errors import UsageError
from tunesmith.data.building import shards
from tunesmith.data.building.ray_runner import RayRunner

pytestmark = pytest.mark.slow

ray = pytest.importorskip("ray", reason="the extra `ray` is not installed")


@pytest.fixture(scope="module", autouse=True)
def cluster() -> Iterator[None]:
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
    yield
    ray.shutdown()


def test_the_command_line_gives_the_same_digest(tmp_path: Path) -> None:
    """Another process, on this cluster of two workers."""
    write_model(tmp_path / "base")
    write_jsonl(tmp_path / "rows.jsonl", many_rows(300))
    (tmp_path / "p.txt").write_text("answer")
    project = {
        "name": "demo",
        "base": "./base",
        "data": {"sources": [{"path": "*.jsonl", "licence": "MIT"}], "privacy": {"entities": ["EMAIL_ADDRESS"]}},
        "candidates": {"zero-shot": {"prompt": "p.txt"}},
    }
    (tmp_path / "tunesmith.yaml").write_text(json.dumps(project))
    address = ray.get_runtime_context().gcs_address

    def built(engine: str) -> str:
        shutil.rmtree(tmp_path / ".tunesmith", ignore_errors=True)
        command = [
            sys.executable,
            "-m",
            "tunesmith",
            "data",
            "build",
            "--engine",
            engine,
            "--json",
            "-C",
            str(tmp_path),
        ]
        done = subprocess.run(
            command, env=os.environ | {"RAY_ADDRESS": address}, capture_output=True, text=True, timeout=300
        )
        assert done.returncode == 0, done.stderr
        return str(json.loads(done.stdout)["dataset"])

    assert built("ray") == built("local")


def test_the_same_digest_and_the_same_errors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_jsonl(tmp_path / "rows.jsonl", mixed(400))
    whole = build(tmp_path, settings(**CHOSEN))
    monkeypatch.setattr(shards, "SHARD_BYTES", 15_000)
    assert build(tmp_path, settings(**CHOSEN), runner=RayRunner(2)).digest == whole.digest
    path.open("a").write("{\n")
    with pytest.raises(UsageError) as caught:
        build(tmp_path, settings(**CHOSEN), runner=RayRunner(2))
    assert caught.value.where.startswith("rows.jsonl, line")
