"""A base's network in this process, shared by the engine that answers and by the trainings that start from it."""

from __future__ import annotations

from tunesmith.engines.native.adapters.full import FullModel
from tunesmith.engines.native.adapters.lora import LoraModel
from tunesmith.engines.native.engine import NativeEngine
from tunesmith.engines.native.network.weights import load_network
from tunesmith.engines.native.support import lacks, refuse
from tunesmith.engines.process import prepare_process
from tunesmith.engines.settings import WeightSettings
from tunesmith.engines.training_protocol import TrainableModel
from tunesmith.models.base import Base


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
