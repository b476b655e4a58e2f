"""Connects to a Ray cluster. Ray is an optional extra, which only this module imports by name."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, redirect_stdout
from typing import Any

from tunesmith.core.errors import Refused, UsageError
from tunesmith.core.progress import Progress


@contextmanager
def connected(where: str, address: str | None = None) -> Iterator[Any]:
    """The module ray, connected to a cluster. What Ray prints goes to stderr meanwhile.

    address: the cluster's; by default $RAY_ADDRESS's, or one that is started on this machine and ends with this
    process. where: the setting that asks for Ray. Raises UsageError where Ray is not installed or no cluster answers.
    """
    try:
        import ray
    except ImportError as error:
        raise UsageError("Ray is not installed", where=where, fix='pip install "tunesmith[ray]"') from error
    with redirect_stdout(sys.stderr):
        if not ray.is_initialized():
            try:
                ray.init(address=address, include_dashboard=False, log_to_driver=False)
            except (ConnectionError, ValueError) as error:
                raise UsageError(
                    f"no Ray cluster can be reached: {str(error).splitlines()[0][:200]}",
                    where=where,
                    fix="start one with `ray start --head`, or leave the address out",
                ) from error
        yield ray


def check_room(
    ray: Any, workers: int, resources: Mapping[str, float], where: str, address: str | None, progress: Progress
) -> None:
    """Compare what workers take with what the cluster has. A named cluster may grow: progress says what is missing.

    Raises Refused where a cluster of this machine alone can never hold them.
    """
    there = ray.cluster_resources()
    for name, each in resources.items():
        if there.get(name, 0.0) >= workers * each:
            continue
        short = f"{workers} workers with {each:g} {name} each, and the Ray cluster has {there.get(name, 0.0):g} {name}"
        if not address and not os.environ.get("RAY_ADDRESS") and len(ray.nodes()) == 1:
            fix = "lower workers or resources, or name a larger cluster by address"
            raise Refused(f"this machine does not hold {short}", where=where, fix=fix)
        progress.say(f"waiting for {short}")


def room(ray: Any, resources: Mapping[str, float]) -> int:
    """For how many actors that each take resources the cluster's nodes have room now, if nothing else runs."""
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    return sum(int(min(node.get(name, 0.0) // each for name, each in resources.items())) for node in nodes)


def actor_options(resources: Mapping[str, float]) -> dict[str, Any]:
    """What each actor takes of the cluster, as Ray's options name it."""
    others = {name: each for name, each in resources.items() if name not in ("CPU", "GPU")}
    return {"num_cpus": resources.get("CPU", 0), "num_gpus": resources.get("GPU", 0), "resources": others}


def limit_to(resources: Mapping[str, float]) -> None:
    """Have this worker of Ray use no more threads than its CPUs, and no GPU unless it has one. Call it first of all."""
    os.environ.setdefault("TUNESMITH_THREADS", str(max(1, int(resources.get("CPU", 1)))))
    if "GPU" not in resources:
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
