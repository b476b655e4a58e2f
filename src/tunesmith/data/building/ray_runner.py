"""Examines shards on a Ray cluster with Ray Data. The dataset is the same as on one machine.

Every node must see the sources under the same paths. Ray is an optional extra. Ray sends Python objects between its
processes by pickle, and so do shards and results here. Nothing that comes from a source file is unpickled.
"""

from __future__ import annotations

import pickle
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from tunesmith.core.errors import TunesmithError
from tunesmith.core.system.ray_cluster import connected
from tunesmith.data.building.examine import ExaminedRows, Examiner, RowRules
from tunesmith.data.building.shards import Shard, examined_shard


class RayRunner(NamedTuple):
    """workers: the number of the cluster's processors to use."""

    workers: int = 2

    def run(self, rules: RowRules, shards: Sequence[Shard]) -> Iterator[tuple[Shard, Iterable[ExaminedRows]]]:
        """Every shard with its examined rows, as they come. Uses $RAY_ADDRESS's cluster, or starts a local one."""
        items = [{"place": place, "shard": pickle.dumps(shard)} for place, shard in enumerate(shards)]
        with connected("the builder on Ray") as ray:
            try:
                done = ray.data.from_items(items, override_num_blocks=len(items)).map(
                    _RayShardWorker, fn_constructor_args=(ray.put(rules),), concurrency=self.workers
                )
                for row in done.iter_rows():
                    pieces = pickle.loads(row["pieces"])  # noqa: S301  made by our own workers
                    if isinstance(pieces, TunesmithError):
                        raise pieces
                    yield shards[row["place"]], pieces
            except ray.exceptions.RayError as error:
                said = str(error).splitlines()[-1][:200]
                fix = "check Ray's logs"
                raise TunesmithError(f"a shard failed on Ray: {said}", where="the builder on Ray", fix=fix) from error


class _RayShardWorker:
    """Examines shards on a node of the cluster. It returns the errors of rows, to be raised on this machine."""

    def __init__(self, rules: Any) -> None:
        import ray

        self._examiner = Examiner(ray.get(rules) if isinstance(rules, ray.ObjectRef) else rules)

    def __call__(self, row: Mapping[str, Any]) -> dict[str, Any]:
        try:
            pieces: Any = list(examined_shard(self._examiner, pickle.loads(row["shard"])))  # noqa: S301  of our own
        except TunesmithError as error:
            pieces = error
        return {"place": row["place"], "pieces": pickle.dumps(pieces)}
