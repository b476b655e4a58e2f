"""Connects to a Ray cluster. Ray is an optional extra, which only this module imports by name."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, redirect_stdout
from typing import Any

from tunesmith.core.errors import Refused, UsageError


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


def check_room(ray: Any, workers: int, resources: Mapping[str, float], where: str) -> None:
    """Raise Refused where a cluster of this machine alone can never hold so many workers. Others may grow."""
    there = ray.cluster_resources()
    if len(ray.nodes()) > 1 or os.environ.get("RAY_ADDRESS"):
        return
    for name, each in resources.items():
        if there.get(name, 0.0) < workers * each:
            raise Refused(
                f"{workers} workers with {each:g} {name} each do not fit this machine, whose Ray cluster has "
                f"{there.get(name, 0.0):g} {name}",
                where=where,
                fix="lower workers or resources, or name a larger cluster by address",
            )
