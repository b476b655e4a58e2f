"""Opens engines and loads models. This is the only module that knows which engine runs which base."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

from tunesmith.core.progress import SILENT, Progress
from tunesmith.engines.device import gpu_present
from tunesmith.engines.settings import (
    HF,
    NATIVE,
    TARGETS,
    EngineSettings,
    VllmSettings,
    WeightSettings,
    is_native,
    lacks,
    match_layers,
    refuse,
)

if TYPE_CHECKING:
    from tunesmith.engines.protocol import Engine
    from tunesmith.engines.ranks import Ranks
    from tunesmith.engines.training_protocol import LoadedModel, ShardedModel
    from tunesmith.models.base import Base

LocalEngine = Literal["native", "hf"]


def answering_engine(
    family: str, settings: EngineSettings = EngineSettings(), *, gpu: bool | None = None
) -> LocalEngine:
    """The engine that answers in this process for a base of a family: on a GPU hf, unless settings say that the native
    engine trains; on the CPU native, where it computes the family.

    gpu: whether there is one where it answers; by default, whether this process sees one.
    """
    if not is_native(family):
        return HF
    return HF if settings.train != NATIVE and (gpu_present() if gpu is None else gpu) else NATIVE


def training_engine(
    family: str,
    weights: WeightSettings,
    settings: EngineSettings = EngineSettings(),
    *,
    ranks: int = 1,
    where: str = "train",
) -> LocalEngine:
    """The engine that trains a base of a family, as settings say; auto is decided here.

    ranks: how many processes train together. where: the weights' place in the project file. Raises Refused where
    settings name the native engine for what it does not train.
    """
    reason = lacks(family, weights, ranks=ranks, where=where)
    if settings.train == NATIVE and reason is not None:
        raise refuse(reason)
    if reason is not None or settings.train == HF:
        return HF
    return HF if settings.train == "auto" and _trains_on_gpu(settings) else NATIVE


def _trains_on_gpu(settings: EngineSettings) -> bool:
    return gpu_present() if settings.ray is None else "GPU" in settings.ray.resources


def load_model(base: Base, engine: LocalEngine | None = None, progress: Progress = SILENT) -> LoadedModel:
    """Load a base's weights into this process, to answer with them and to train on them.

    engine: which computes with them; by default the one that answers for the family. progress: told where the native
    engine has no compiled kernels. Raises Refused for a base that the engine cannot run.
    """
    if (engine or answering_engine(base.family)) == NATIVE:
        from tunesmith.engines.native.engine import NativeModel
        from tunesmith.engines.native.kernels import slowness

        if (slow := slowness()) is not None:
            progress.say(slow)
        return NativeModel(base)
    from tunesmith.engines.hf.engine import LoadedHFModel

    return LoadedHFModel(base)


def describe_processor() -> str:
    """The processor, its threads and what the native engine uses of it."""
    from tunesmith.engines.native.runtime import describe

    return describe()


def export_check() -> Any:
    """The module that compares an export with what was measured (native/export_check.py)."""
    from tunesmith.engines.native import export_check

    return export_check


def load_sharded(base: Base, ranks: Ranks) -> ShardedModel:
    """A base's weights, sharded over several ranks as soon as one trains on it. Always with transformers: the native
    network computes in one process."""
    from tunesmith.engines.hf.engine import ShardedHFModel

    return ShardedHFModel(base, ranks)


def open_engine(base: Base, settings: EngineSettings = EngineSettings(), progress: Progress = SILENT) -> Engine:
    """The engine that answers for a base: the servers that settings name, else one in this process.

    Raises Refused where the server runs another model, and for a base that nothing here can run.
    """
    if not isinstance(settings, VllmSettings):
        return load_model(base, answering_engine(base.family, settings), progress).engine()
    from tunesmith.engines.vllm.engine import VllmEngine

    return VllmEngine(base, settings, progress)


def engine_kind(base: Base, settings: EngineSettings = EngineSettings()) -> str:
    """The name, in records, of the engine that answers for a base."""
    return settings.kind if isinstance(settings, VllmSettings) else answering_engine(base.family, settings)


def check_weight_settings(
    family: str, weights: WeightSettings, where: str, settings: EngineSettings = EngineSettings(), *, ranks: int = 1
) -> None:
    """Check, before anything is loaded, that the engine that trains a base of this family has these weight settings.

    where: the weights' place in the project file. ranks: how many processes train together. Raises UsageError or
    Refused.
    """
    if is_native(family):
        match_layers(weights.targets, TARGETS, f"{where}.targets")
    if training_engine(family, weights, settings, ranks=ranks, where=where) == HF:
        from tunesmith.engines.hf.support import check_supported

        check_supported(weights, where, ranks=ranks, gpu=_trains_on_gpu(settings))
