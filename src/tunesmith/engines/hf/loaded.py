"""A base that transformers runs, loaded once into this process, to answer with it and to train on it."""

from __future__ import annotations

from functools import cached_property

from tunesmith.engines.hf.engine import HFEngine
from tunesmith.engines.hf.full import FullTrainable
from tunesmith.engines.hf.loading import model_settings
from tunesmith.engines.hf.lora import LoraTrainable
from tunesmith.engines.hf.model import HFModel
from tunesmith.engines.hf.support import check_supported
from tunesmith.engines.hf.trainable import HFTrainable
from tunesmith.engines.process import prepare_process
from tunesmith.engines.ranks import ALONE, Ranks
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
        """A new adapter on these weights, at its start, or a copy of them to be trained in full.

        Raises Refused or UsageError for settings that this engine or base cannot honour.
        """
        check_supported(settings)
        wanted = model_settings(settings)
        # Neither PiSSA, which takes its start out of the base's weights, nor full training leaves the base as it is.
        keeps = settings.start != "pissa" and settings.method != "full"
        shares = wanted == model_settings(WeightSettings()) and keeps
        return build_trainable(self._model if shares else HFModel(self._base, wanted), settings, seed)


def build_trainable(model: HFModel, settings: WeightSettings, seed: int, ranks: Ranks = ALONE) -> HFTrainable:
    """What settings train in a model, at its start. With several ranks, the model is sharded over them."""
    if settings.method == "full":
        return FullTrainable(model, settings, ranks=ranks)
    return LoraTrainable(model, settings, seed=seed, ranks=ranks)
