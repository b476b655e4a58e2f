"""The one place that makes an engine: in this process, or the server that the project file names."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tunesmith.inference.settings import EMBEDDED, FOREIGN, EngineSettings
from tunesmith.models.families import ours

if TYPE_CHECKING:
    from tunesmith.inference.engine import Engine
    from tunesmith.models.base import BaseModel


def open_engine(base: BaseModel, settings: EngineSettings | None) -> Engine:
    """An engine for a base. Raises Refused where the server that settings name runs another model, and for a base that
    nothing here can run."""
    if settings is None and not ours(base.family):
        from tunesmith.inference.foreign import ForeignEngine

        return ForeignEngine(base)
    if settings is None:
        from tunesmith.inference.embedded import EmbeddedEngine

        return EmbeddedEngine(base)
    from tunesmith.inference.vllm import VllmEngine

    return VllmEngine(base, settings)


def engine_kind(base: BaseModel, settings: EngineSettings | None) -> str:
    """The engine's name in records."""
    if settings is not None:
        return settings.kind
    return EMBEDDED if ours(base.family) else FOREIGN
