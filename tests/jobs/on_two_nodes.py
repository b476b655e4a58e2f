"""Performs a queued job on a Ray cluster of two nodes, of which the one that performs it is killed in the middle.

    python -m tests.jobs.on_two_nodes FOLDER

FOLDER: a project with `jobs: {runner: ray}` and a queued job.
"""

import contextlib
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import psutil

from tests.waiting import until


def performing() -> list[psutil.Process]:
    """The ancestors of the process that trains, with it; [] where none does."""
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if "_Performer" in process.name() + " ".join(process.cmdline()):
                children = process.children()
                return [*children, process, *process.parents()]
    return []


def main() -> None:
    folder, temporary = Path(sys.argv[1]), tempfile.mkdtemp(prefix="ray-")
    os.environ["RAY_TMPDIR"] = temporary  # where Ray notes its newest cluster for others to find
    from ray.cluster_utils import Cluster

    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
    nodes = [cluster.add_node(num_cpus=1) for _ in range(2)]
    command = [sys.executable, "-m", "tunesmith", "worker", "-C", str(folder), "--lease", "10", "--until-empty"]
    worker = subprocess.Popen(command, env={**os.environ, "RAY_ADDRESS": cluster.address})
    try:
        until(lambda: any(folder.glob(".tunesmith/work/train-*/checkpoints/step-*")))
        job, *above = until(performing)
        lost = next(node for node in nodes if node.all_processes["raylet"][0].process.pid in [one.pid for one in above])
        lost.kill_all_processes(check_alive=False, allow_graceful=False, wait=True)
        until(lambda: not job.is_running() or job.status() == psutil.STATUS_ZOMBIE)
        assert worker.wait(400) == 0
    finally:
        worker.kill()
        cluster.shutdown()
        shutil.rmtree(temporary, ignore_errors=True)


if __name__ == "__main__":
    main()
