"""The same dataset by Ray, on a local cluster of two workers. Skipped where the extra `ray` is not installed.

The test runs this file as a program, because a driver of Ray whose cluster dies ends its whole process.
"""

import json
import os
import sys
import tempfile
from pathlib import Path
from unittest import mock

import pytest

from tests.data.building.test_shards import CHOSEN, mixed
from tests.data.rows import build, settings, write_jsonl
from tests.own_group import run_whole_group
from tunesmith.core.errors import UsageError
from tunesmith.data.building import shards
from tunesmith.data.building.ray_runner import RayRunner

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
    with tempfile.TemporaryDirectory() as name, mock.patch.object(shards, "SHARD_BYTES", 15_000):
        rows = write_jsonl(Path(name) / "rows.jsonl", mixed(400))
        runners = (RayRunner(), shards.LocalRunner())
        digests = [build(Path(name), settings(**CHOSEN), runner=runner).digest for runner in runners]
        with rows.open("a") as file:
            file.write("{\n")
        with pytest.raises(UsageError) as caught:
            build(Path(name), settings(**CHOSEN), runner=RayRunner(workers=1))
    ray.shutdown()
    Path(sys.argv[1]).write_text(json.dumps({"digests": digests, "error": caught.value.where}))


if __name__ == "__main__":
    main()
