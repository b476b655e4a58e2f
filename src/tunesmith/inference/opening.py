"""The one place that makes an engine: in this process, or the server that the project file names."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tunesmith.inference.settings import EMBEDDED, EngineSettings

if TYPE_CHECKING:
    from tunesmith.inference.engine import Engine
    from tunesmith.models.base import BaseModel


def open_engine(base: BaseModel, settings: EngineSettings | None) -> Engine:
    """An engine for a base. Raises Refused where the server that settings name runs another model."""
    if settings is None:
        from tunesmith.inference.embedded import EmbeddedEngine

        return EmbeddedEngine(base)
    from tunesmith.inference.vllm import VllmEngine

    return VllmEngine(base, settings)


def engine_kind(settings: EngineSettings | None) -> str:
    """The engine's name in records."""
    return EMBEDDED if settings is None else settings.kind
