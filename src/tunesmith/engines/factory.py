"""Creates the engine that runs a base: in this process, or on the server that the project file names."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tunesmith.engines.settings import HF, NATIVE, EngineSettings
from tunesmith.models.families import ours

if TYPE_CHECKING:
    from tunesmith.engines.protocol import Engine
    from tunesmith.models.base import Base


def open_engine(base: Base, settings: EngineSettings | None) -> Engine:
    """An engine for a base. settings: None for one in this process.

    Raises Refused if the server runs another model, or if no engine can run the base.
    """
    if settings is None and not ours(base.family):
        from tunesmith.engines.hf.engine import HFEngine

        return HFEngine(base)
    if settings is None:
        from tunesmith.engines.native.engine import NativeEngine

        return NativeEngine(base)
    from tunesmith.engines.vllm.engine import VllmEngine

    return VllmEngine(base, settings)


def engine_kind(base: Base, settings: EngineSettings | None) -> str:
    """The engine's name in records."""
    if settings is not None:
        return settings.kind
    return NATIVE if ours(base.family) else HF
