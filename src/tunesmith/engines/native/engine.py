"""The native engine: answers from a base model and its adapters in this process, on the CPU."""

from __future__ import annotations

import contextlib
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from pathlib import Path

from torch import Tensor

from tunesmith.core.progress import Progress
from tunesmith.engines.batch import Batch, common_prefix
from tunesmith.engines.in_process import InProcessEngine
from tunesmith.engines.native import runtime
from tunesmith.engines.native.adapters.adapter import PackedAdapter, adapted_linear, read_adapter
from tunesmith.engines.native.adapters.full import FullModel
from tunesmith.engines.native.adapters.lora import LoraModel
from tunesmith.engines.native.adapters.trainable import label_losses
from tunesmith.engines.native.decoding.running_batch import Prefix, Row, RunningBatch
from tunesmith.engines.native.decoding.scheduler import Scheduler
from tunesmith.engines.native.network.network import Network, frozen_linear
from tunesmith.engines.native.network.weights import load_network
from tunesmith.engines.process import prepare_process
from tunesmith.engines.protocol import Completion, Generation, Streamed, loaded
from tunesmith.engines.settings import WeightSettings, lacks, refuse
from tunesmith.engines.training_protocol import TrainableModel
from tunesmith.engines.weights import read_model_file
from tunesmith.models.base import Base

_PREFIXES_KEPT = 8
_LEAST_PREFIX = 16  # tokens; computing a shorter prefix again costs less than keeping it


class NativeEngine(InProcessEngine[PackedAdapter]):
    """Implements engines.protocol.Engine."""

    choice_rows, choice_tokens, shares_prefix = 64, 1 << 15, True

    def __init__(self, base: Base, network: Network | None = None) -> None:
        """network: the one to answer with; the base's own is loaded where it is None."""
        prepare_process()
        self._network = load_network(base.folder) if network is None else network
        super().__init__(base)
        # self._lock guards these as well; only the scheduler's thread computes.
        self._prefixes: OrderedDict[tuple[PackedAdapter | None, tuple[int, ...]], Prefix] = OrderedDict()
        self._last: dict[PackedAdapter | None, Sequence[int]] = {}
        self._scheduler = Scheduler(RunningBatch(self._network, self._renderer.stop_ids))

    @property
    def _vocabulary(self) -> int:
        return self._network.shape.vocabulary

    def _open_whole(self, folder: Path) -> NativeEngine:
        weights = read_model_file(folder, self._base, self._network.repeated)
        return NativeEngine(self._base, load_network(self._base.folder, weights=weights))

    def _load_adapter(self, name: str, folder: Path) -> None:
        packed = read_adapter(folder, self._network, self._base)
        runtime.release_threads()
        with self._lock:
            before = self._adapters.get(name)
            self._adapters[name] = packed
            self._last.pop(before, None)
            for key in [key for key in self._prefixes if before is not None and key[0] is before]:
                del self._prefixes[key]

    def _generate(self, requests: Sequence[Generation], adapter: str | None, progress: Progress) -> list[Completion]:
        """Decodes them in one batch with the requests of other threads."""
        events, answers, rows = self._begin(Row, requests)
        with progress.task("answering", len(requests)) as task, self._decoding(rows, adapter):
            for _ in requests:
                events.get()
                for answer in answers:
                    answer.raise_error()
                task.advance()
        return [answer.completion() for answer in answers]

    def _stream(self, request: Generation, adapter: str | None) -> Iterator[Streamed]:
        events, (answer,), rows = self._begin(Row, [request], streams=True)
        with self._decoding(rows, adapter):
            while (piece := events.get()) is not None:
                yield piece
        yield answer.completion()

    def _label_losses(self, batch: Batch, adapter: str | None) -> Tensor:
        network, packed = self._network, loaded(self._adapters, adapter)
        linear = frozen_linear(network) if packed is None else adapted_linear(network, packed)
        return self._scheduler.run(lambda: label_losses(network, linear, batch))

    @contextlib.contextmanager
    def _decoding(self, rows: Sequence[Row], adapter: str | None) -> Iterator[None]:
        """Decode rows of whole prompts under an adapter within a with block."""
        with self._lock:
            packed = loaded(self._adapters, adapter)
            prefix = self._shared_prefix([row.ids for row in rows], packed)
        for row in rows:
            row.prefix, row.adapter = prefix, packed
            row.ids = row.ids[row.start :]
        self._scheduler.submit(rows)
        try:
            yield
        finally:
            self._scheduler.cancel(rows)

    def _shared_prefix(self, prompts: Sequence[Sequence[int]], adapter: PackedAdapter | None) -> Prefix | None:
        """The prefix that prompts share; None if it is too short to keep.

        Several prompts share their longest common prefix, whatever was asked before, so that they always get the same
        answers. A single prompt uses the longest prefix that is kept, or what it has in common with the prompt before.
        """
        if not prompts:
            return None
        compared = [*prompts, self._last[adapter]] if len(prompts) == 1 and adapter in self._last else prompts
        self._last[adapter] = prompts[-1]
        # Each prompt keeps at least one token after the prefix.
        most = min(map(len, prompts)) - 1
        length = min(common_prefix(compared), most) if len(compared) > 1 else 0
        if len(prompts) == 1:
            own = [ids for adapted, ids in self._prefixes if adapted is adapter and len(ids) <= most]
            longest = max((len(ids) for ids in own if ids == tuple(prompts[0][: len(ids)])), default=0)
            length = longest if length < longest + _LEAST_PREFIX else length
        if length < _LEAST_PREFIX:
            return None
        key = (adapter, tuple(prompts[0][:length]))
        if key not in self._prefixes:
            self._prefixes[key] = Prefix(key[1], adapter)
        self._prefixes.move_to_end(key)
        while len(self._prefixes) > _PREFIXES_KEPT:
            self._prefixes.popitem(last=False)
        return self._prefixes[key]


class NativeModel:
    """Implements engines.training_protocol.LoadedModel."""

    def __init__(self, base: Base) -> None:
        """Load the base's weights. Raises Refused for a variant of its family that the network does not compute."""
        prepare_process()
        self._base, self._network = base, load_network(base.folder)

    def engine(self) -> NativeEngine:
        """An engine that answers with these weights."""
        return NativeEngine(self._base, self._network)

    def trainable(self, settings: WeightSettings, *, seed: int, state_bytes: int) -> TrainableModel:
        """A new adapter on these weights, or a copy of them to be trained in full. Raises Refused for a base in 4
        bits."""
        if (reason := lacks(self._base.family, settings)) is not None:
            raise refuse(reason)
        if settings.method == "full":
            return FullModel(self._base, self._network, settings, state_bytes)
        return LoraModel(self._base, self._network, settings, seed)
