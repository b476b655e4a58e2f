"""A base that transformers runs, loaded once into this process, to answer with it and to train adapters on it."""

from __future__ import annotations

from functools import cached_property

from tunesmith.engines.hf.engine import HFEngine
from tunesmith.engines.hf.loading import model_settings
from tunesmith.engines.hf.model import HFModel
from tunesmith.engines.hf.support import check_supported
from tunesmith.engines.hf.trainable import HFTrainable
from tunesmith.engines.process import prepare_process
from tunesmith.engines.settings import WeightSettings
from tunesmith.models.base import Base


class LoadedHFModel:
    """Implements engines.training_protocol.LoadedModel."""

    def __init__(self, base: Base) -> None:
        """The weights are read when they are first needed; for trainings that keep them otherwise, once more."""
        prepare_process()
        self._base = base

    @cached_property
    def _model(self) -> HFModel:
        return HFModel(self._base, model_settings(WeightSettings()))

    def engine(self) -> HFEngine:
        """The engine that answers with these weights."""
        model = self._model
        return HFEngine(self._base, lambda: model)

    def trainable(self, settings: WeightSettings, *, seed: int, state_bytes: int) -> HFTrainable:
        """A new adapter on these weights, at its start.

        Raises Refused or UsageError for settings that this engine or base cannot honour.
        """
        check_supported(settings)
        wanted = model_settings(settings)
        # PiSSA takes its start out of the base's weights, so they are of no use to anything else.
        shares = wanted == model_settings(WeightSettings()) and settings.start != "pissa"
        return HFTrainable(self._model if shares else HFModel(self._base, wanted), settings, seed=seed)
