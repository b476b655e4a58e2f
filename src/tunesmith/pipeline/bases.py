"""A base that a project's candidates answer with: its files, its weights and the engines that compute with them."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING

from tunesmith.core.errors import UsageError
from tunesmith.core.progress import Progress
from tunesmith.engines.factory import (
    LocalEngine,
    answering_engine,
    check_weight_settings,
    engine_kind,
    load_model,
    load_sharded,
    open_engine,
    training_engine,
)
from tunesmith.engines.settings import RaySettings, WeightSettings
from tunesmith.pipeline.stages import Stage, Stages
from tunesmith.project import Project

if TYPE_CHECKING:
    from tunesmith.engines.on_ray import RayEngine
    from tunesmith.engines.protocol import Engine
    from tunesmith.engines.ranks import Ranks
    from tunesmith.engines.training_protocol import LoadedModel, ShardedModel
    from tunesmith.models.base import Base
    from tunesmith.models.rendering import Renderer


@dataclass(eq=False)
class ProjectBase:
    """One of a project's bases; each part is loaded on first use. spec: as the project file names it."""

    project: Project
    spec: str
    stages: Stages
    progress: Progress
    together: Ranks | None  # as `PipelineContext` has it
    _models: dict[LocalEngine, LoadedModel] = field(default_factory=dict, init=False)  # by the engine that computes

    @cached_property
    def base(self) -> Base:
        """The base model, found and pinned."""
        from tunesmith.models.base import resolve_base

        began, settings = time.perf_counter(), self.project.settings
        base = resolve_base(self.project.store, self.spec, self.project.root, self.progress)
        name = "base" if self.spec == settings.base else f"base {self.spec}"
        self.stages.done.append(Stage(name, time.perf_counter() - began, skipped=False))
        for name, candidate in settings.candidates.items():
            # So that a wrong setting is reported before any slow stage.
            if candidate.train and settings.base_of(name) == self.spec:
                where = f"candidates.{name}.train"
                check_weight_settings(base.family, candidate.train, where, settings.engine, ranks=self._ranks)
        return base

    @property
    def digest(self) -> str:
        """The base record's."""
        return self.base.digest

    @cached_property
    def renderer(self) -> Renderer:
        """The base's tokenizer and chat template. Needs neither weights nor a running server."""
        from tunesmith.models.rendering import Renderer

        return Renderer(self.base.folder)

    @property
    def model(self) -> LoadedModel:
        """The base model's weights in this process that answer."""
        return self.sharded or self._loaded(answering_engine(self.base.family, self.project.settings.engine))

    def trained_model(self, settings: WeightSettings) -> LoadedModel:
        """The base model's weights in this process that candidates train on, one after another: those that answer,
        unless another engine trains."""
        return self.sharded or self._loaded(self.training_engine(settings))

    def training_engine(self, settings: WeightSettings) -> LocalEngine:
        """The name of the engine that trains with these settings."""
        return training_engine(self.base.family, settings, self.project.settings.engine, ranks=self._ranks)

    def _loaded(self, engine: LocalEngine) -> LoadedModel:
        if engine not in self._models:
            self._models[engine] = load_model(self.base, engine, self.progress)
        return self._models[engine]

    @property
    def _ranks(self) -> int:
        """How many processes train together."""
        if self.together is not None:
            return self.together.size
        return 1 if self.ray is None else self.ray.workers

    @property
    def ray(self) -> RaySettings | None:
        """The cluster that trains and answers evaluations; None where this process does.

        Raises UsageError where torchrun started this process too.
        """
        ray = self.project.settings.engine.ray
        if ray is not None and self.together is not None:
            raise UsageError(
                "torchrun and engine.ray would both start the processes of a training",
                where="engine.ray",
                fix="start the command without torchrun, or leave engine.ray out",
            )
        return ray

    @cached_property
    def sharded(self) -> ShardedModel | None:
        """The base model's weights where several processes train on them together; None where this one trains alone."""
        return None if self.together is None else load_sharded(self.base, self.together)

    @cached_property
    def engine(self) -> Engine:
        """The engine that answers, opened on first need. In this process it shares the weights of trainings."""
        server = self.project.settings.server
        if server is not None:
            return open_engine(self.base, server, self.progress)
        return self.on_ray or self.model.engine()

    @cached_property
    def on_ray(self) -> RayEngine | None:
        """The engine whose workers answer on a Ray cluster; None where a server or this process answers."""
        if self.ray is None or self.project.settings.server is not None:
            return None
        from tunesmith.engines.on_ray import RayEngine

        return RayEngine(self.base, self._kind_on_ray(self.ray), self.ray, self.progress)

    @property
    def engine_kind(self) -> str:
        """The engine's name in records and in the inputs of stages."""
        if self.ray is None or self.project.settings.server is not None:
            return engine_kind(self.base, self.project.settings.engine)
        return self._kind_on_ray(self.ray)

    def _kind_on_ray(self, ray: RaySettings) -> LocalEngine:
        return answering_engine(self.base.family, self.project.settings.engine, gpu="GPU" in ray.resources)

    def release(self) -> None:
        """Free the memory of the weights in this process until they are needed again, so that another base can be
        trained."""
        if self._models:
            self._models.clear()
            self.__dict__.pop("engine", None)
