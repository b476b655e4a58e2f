"""Shards on a Ray cluster: the same ShardWorker over the same shards, by Ray Data, so that the dataset is the same.

Every node must see the sources under the same paths. Ray is an optional extra.
"""

from __future__ import annotations

import pickle
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tunesmith.core.errors import TunesmithError, UsageError
from tunesmith.data.building.shards import ExaminedRows, RowRules, Shard, ShardWorker


@dataclass(frozen=True, slots=True)
class RayRunner:
    """workers: how many of the cluster's processors take part."""

    workers: int = 2

    def run(self, job: RowRules, shards: Sequence[Shard]) -> Iterator[tuple[Shard, Iterable[ExaminedRows]]]:
        """Every shard with its pieces, as they come. The cluster is $RAY_ADDRESS's, else one started here."""
        try:
            import ray
        except ImportError as error:
            raise UsageError("Ray is not installed", where="--engine", fix='pip install "tunesmith[ray]"') from error
        if not ray.is_initialized():
            ray.init(log_to_driver=False, include_dashboard=False)
        items = [{"place": place, "shard": pickle.dumps(shard)} for place, shard in enumerate(shards)]
        done = ray.data.from_items(items, override_num_blocks=len(items)).map(
            _RayShardWorker, fn_constructor_args=(ray.put(job),), concurrency=self.workers
        )
        try:
            for row in done.iter_rows():
                found = pickle.loads(row["found"])  # noqa: S301  made by our own workers
                if isinstance(found, TunesmithError):
                    raise found
                yield shards[row["place"]], found
        except ray.exceptions.RayError as error:
            said = str(error).splitlines()[-1][:200]
            raise TunesmithError(
                f"a shard failed on Ray: {said}", where="--engine", fix="look at Ray's logs"
            ) from error


class _RayShardWorker:
    """A ShardWorker that lives on a node of the cluster. What is wrong with a row comes back as it is told here."""

    def __init__(self, job: Any) -> None:
        import ray

        self._worker = ShardWorker(ray.get(job) if isinstance(job, ray.ObjectRef) else job)

    def __call__(self, row: Mapping[str, Any]) -> dict[str, Any]:
        try:
            found: Any = self._worker(pickle.loads(row["shard"]))  # noqa: S301  made by our own process
        except TunesmithError as error:
            found = error
        return {"place": row["place"], "found": pickle.dumps(found)}
