"""Opens engines and loads models. This is the only module that knows which engine runs which base."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tunesmith.engines.settings import HF, NATIVE, TARGETS, EngineSettings, WeightSettings
from tunesmith.models.families import is_native, match_layers

if TYPE_CHECKING:
    from tunesmith.engines.protocol import Engine
    from tunesmith.engines.ranks import Ranks
    from tunesmith.engines.training_protocol import LoadedModel, ShardedModel
    from tunesmith.models.base import Base


def load_model(base: Base) -> LoadedModel:
    """Load a base's weights into this process, to answer with them and to train on them.

    Native where the native network computes the base's family, otherwise with transformers. Raises Refused for a base
    that neither can run.
    """
    if is_native(base.family):
        from tunesmith.engines.native.model import NativeModel

        return NativeModel(base)
    from tunesmith.engines.hf.loaded import LoadedHFModel

    return LoadedHFModel(base)


def load_sharded(base: Base, ranks: Ranks) -> ShardedModel:
    """A base's weights, sharded over several ranks as soon as one trains on it. Always with transformers: the native
    network computes in one process."""
    from tunesmith.engines.hf.together import ShardedHFModel

    return ShardedHFModel(base, ranks)


def open_engine(base: Base, settings: EngineSettings | None) -> Engine:
    """The engine that answers for a base: the server that settings name, or one in this process where they are None.

    Raises Refused where the server runs another model, and for a base that nothing here can run.
    """
    if settings is None:
        return load_model(base).engine()
    from tunesmith.engines.vllm.engine import VllmEngine

    return VllmEngine(base, settings)


def engine_kind(base: Base, settings: EngineSettings | None) -> str:
    """The engine's name in records."""
    if settings is not None:
        return settings.kind
    return NATIVE if is_native(base.family) else HF


def check_weight_settings(family: str, settings: WeightSettings, where: str, *, ranks: int = 1) -> None:
    """Check, before anything is loaded, that the engine that trains a base of this family has these settings.

    where: the settings' place in the project file. ranks: how many processes train together. Raises UsageError or
    Refused.
    """
    if is_native(family):
        match_layers(settings.targets, TARGETS, f"{where}.targets")
    if not is_native(family) or settings.quantize is not None or ranks > 1:
        from tunesmith.engines.hf.support import check_supported

        check_supported(settings, where, ranks=ranks)
