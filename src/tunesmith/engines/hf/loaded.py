"""A base that transformers runs, loaded once: into this process, or by several ranks that hold it together. It answers,
and candidates train on it."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property

import torch
from pydantic import TypeAdapter

from tunesmith.core.errors import TunesmithError
from tunesmith.engines.device import computing_device
from tunesmith.engines.hf.engine import HFEngine
from tunesmith.engines.hf.full import FullTrainable
from tunesmith.engines.hf.loading import model_settings
from tunesmith.engines.hf.lora import LoraTrainable
from tunesmith.engines.hf.model import HFModel
from tunesmith.engines.hf.support import check_supported
from tunesmith.engines.hf.trainable import HFTrainable
from tunesmith.engines.process import prepare_process
from tunesmith.engines.protocol import Completion, Generation
from tunesmith.engines.ranks import ALONE, Ranks
from tunesmith.engines.settings import WeightSettings
from tunesmith.engines.training_protocol import TrainableModel
from tunesmith.engines.weights.late_weights import check_room
from tunesmith.models.base import Base

_REQUESTS, _ANSWERS = TypeAdapter(list[Generation]), TypeAdapter(list[Completion])


class LoadedHFModel:
    """Implements engines.training_protocol.LoadedModel."""

    def __init__(self, base: Base, device: torch.device | None = None) -> None:
        """The weights are read when they are first needed; for trainings that keep them otherwise, once more. device:
        that computes, by default this process's."""
        prepare_process()
        self._base, self._device = base, device

    @cached_property
    def _model(self) -> HFModel:
        return HFModel(self._base, model_settings(WeightSettings()), device=self._device)

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
        model = self._model if shares else HFModel(self._base, wanted, device=self._device)
        return build_trainable(model, settings, seed)


class ShardedHFModel:
    """Implements engines.training_protocol.ShardedModel."""

    def __init__(self, base: Base, ranks: Ranks) -> None:
        """The weights are read when they are first needed, by every rank."""
        prepare_process()
        self._base, self._ranks = base, ranks
        self._model: HFModel | None = None
        self._trained: HFTrainable | None = None
        self._engine = HFEngine(base, self._sharded)

    def _sharded(self) -> HFModel:
        if self._model is None:
            raise TunesmithError("several ranks answer only while they train")
        return self._model

    def engine(self) -> HFEngine:
        """The engine that renders requests. Only answer_together answers them."""
        return self._engine

    def trainable(self, settings: WeightSettings, *, seed: int, state_bytes: int) -> HFTrainable:
        """A new adapter on these weights, at its start, or the weights themselves. Shards the base: there is one only.

        Raises Refused or UsageError for settings that this engine or base cannot honour on several ranks.
        """
        check_supported(settings, ranks=self._ranks.size)
        if self._trained is not None:
            raise TunesmithError("several ranks train one model at a time", fix="start them for each training")
        # PiSSA and DoRA start from what the weights are.
        what = "start: pissa" if settings.start == "pissa" else "dora: true" if settings.dora else None
        wanted = model_settings(settings)
        if what is not None:
            check_room(self._base, what, self._ranks, computing_device(), wanted.dtype)
        self._model = HFModel(self._base, wanted, late=what is None)
        self._trained = build_trainable(self._model, settings, seed, self._ranks)
        return self._trained

    def answer_together(self, requests: Sequence[Generation], model: TrainableModel | None) -> list[Completion]:
        """Rank 0's requests, answered by all ranks with the model in training as it is now; None: by the base.

        Every rank calls this and gets all answers. The requests of other ranks do not count.
        """
        if self._trained is None or (model is not None and model is not self._trained):
            raise TunesmithError("only the model in training answers on several ranks")
        stated = self._ranks.agree(lambda: _REQUESTS.dump_python(list(requests), mode="json"))
        asked = _REQUESTS.validate_python(stated)
        mine = range(self._ranks.rank, len(asked), self._ranks.size)
        adapter = self._trained.adapter if model is not None or self._trained.replaces_base else None
        given = self._engine.generate_together([asked[place] for place in mine], adapter)
        answers: dict[int, Completion] = {}
        for rank, stated in enumerate(self._ranks.gather(_ANSWERS.dump_python(given, mode="json"))):
            places = range(rank, len(asked), self._ranks.size)
            answers |= zip(places, _ANSWERS.validate_python(stated), strict=True)
        return [answers[place] for place in range(len(asked))]


def build_trainable(model: HFModel, settings: WeightSettings, seed: int, ranks: Ranks = ALONE) -> HFTrainable:
    """What settings train in a model, at its start. With several ranks, the model is sharded over them."""
    if settings.method == "full":
        return FullTrainable(model, settings, ranks=ranks)
    return LoraTrainable(model, settings, seed=seed, ranks=ranks)
