"""A base of another family in this process: transformers' module, to answer with and to train LoRA adapters in."""

from __future__ import annotations

from tunesmith.engines.hf.engine import HFEngine
from tunesmith.engines.hf.lora import HFLora
from tunesmith.engines.hf.model import HFModel
from tunesmith.engines.settings import WeightSettings
from tunesmith.engines.training_protocol import TrainableModel
from tunesmith.models.base import Base


class LoadedHFModel:
    """Implements engines.training_protocol.LoadedModel. Engine and trainings each load the module for themselves."""

    def __init__(self, base: Base) -> None:
        self._base = base

    def engine(self) -> HFEngine:
        """An engine that answers with the base's module."""
        return HFEngine(self._base)

    def trainable(self, settings: WeightSettings, *, seed: int, state_bytes: int) -> TrainableModel:
        """A new adapter in a module of its own. Raises Refused for settings that need the native network."""
        return HFLora(HFModel(self._base), self._base, settings, seed)
