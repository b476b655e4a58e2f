"""What all stages share: the project, its base model, the engine, the dataset version. Each is loaded on first use.

Every stage is a function that takes a `PipelineContext`. A stage calls the stages whose results it needs.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from copy import copy
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tunesmith.candidates.candidate import Candidate
from tunesmith.candidates.settings import CandidateSettings
from tunesmith.core.digests import short
from tunesmith.core.errors import Refused, UsageError
from tunesmith.core.progress import SILENT, Progress
from tunesmith.core.text.names import Scope
from tunesmith.data.building.build import build_dataset
from tunesmith.data.building.examine import RowRules
from tunesmith.data.building.outside_sets import outside_sources
from tunesmith.data.building.shards import LocalRunner, ShardRunner
from tunesmith.data.dataset import Dataset, Example, load_dataset
from tunesmith.data.documents import build_documents, document_files
from tunesmith.data.governance.withdrawn import Withdrawn, load_withdrawn
from tunesmith.data.review.decisions import applied_settings, read_reviewed
from tunesmith.data.settings import DataSettings
from tunesmith.data.sources.files import find_files
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
from tunesmith.evaluation.metrics.declared import References
from tunesmith.evaluation.metrics.scorers import nearest
from tunesmith.pipeline.stages import Stage, Stages
from tunesmith.project import Project
from tunesmith.store.store import Store

if TYPE_CHECKING:
    from tunesmith.engines.on_ray import RayEngine
    from tunesmith.engines.protocol import Engine
    from tunesmith.engines.ranks import Ranks
    from tunesmith.engines.training_protocol import LoadedModel, ShardedModel
    from tunesmith.models.base import Base
    from tunesmith.models.rendering import LossOn, Renderer
    from tunesmith.training.beside import Rival
    from tunesmith.training.settings import TrainSettings

# Takes the validation rows that a training scores, a list that always has the scores of its last answers to them, and
# the training's work folder.
Beside = Callable[[Sequence[Example], Sequence[float], Path], "Rival | None"]


@dataclass
class PipelineContext:
    """What one pass through the pipeline shares between its stages."""

    project: Project
    progress: Progress = SILENT
    actor: str | None = None  # who runs the stages; None: as `Project.actor` decides
    scope: Scope = field(default_factory=Scope)  # whom they are run for
    shards: ShardRunner = field(default_factory=LocalRunner)  # runs the data build; does not change its result
    together: Ranks | None = None  # the processes that train together, of which this is rank 0; None: this one alone
    # Shows the best untuned candidate beside a training that scores answers; None: no training is compared.
    beside: Callable[[PipelineContext, str, TrainSettings], Beside | None] | None = None
    answered: dict[str, str] = field(default_factory=dict, init=False)  # answers to the test rows by candidate, so far
    _models: dict[LocalEngine, LoadedModel] = field(default_factory=dict, init=False)  # by the engine that computes
    plan_shown: bool = field(default=False, init=False)  # whether the power of the gates was shown already

    @property
    def store(self) -> Store:
        """The project's store."""
        return self.project.store

    @cached_property
    def stages(self) -> Stages:
        """Runs the stages and remembers how long each took."""
        return Stages(self.project, self.progress, self.actor, self.scope)

    @cached_property
    def base(self) -> Base:
        """The base model, found and pinned."""
        from tunesmith.models.base import resolve_base

        began = time.perf_counter()
        base = resolve_base(self.store, self.project.settings.base, self.project.root, self.progress)
        self.stages.done.append(Stage("base", time.perf_counter() - began, skipped=False))
        engine = self.project.settings.engine
        for name, settings in self.project.settings.candidates.items():
            if settings.train:  # so that a wrong setting is reported before any slow stage
                where = f"candidates.{name}.train"
                check_weight_settings(base.family, settings.train, where, engine, ranks=self._ranks)
        return base

    @cached_property
    def renderer(self) -> Renderer:
        """The base's tokenizer and chat template. Needs neither weights nor a running server."""
        from tunesmith.models.rendering import Renderer

        return Renderer(self.base.folder)

    @cached_property
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

    def require_one_process(self) -> None:
        """Raise UsageError where settings say that a Ray cluster's workers train."""
        if self.ray is not None:
            raise UsageError(
                "this trains in one process, and engine.ray is for the training of a candidate and for runs",
                where="engine.ray",
                fix="leave engine.ray out for this command",
            )

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

    def engine_of(self, candidate: Candidate) -> str | None:
        """The name of the engine that answers for a candidate; None for baselines and endpoints."""
        return self.engine_kind if candidate.asks_base else None

    @cached_property
    def dataset(self) -> Dataset:
        """The sealed dataset version of the project's sources."""
        project = self.project
        data = project.settings.data
        sources = [
            *find_files(data.sources, project.root),
            *find_files(outside_sources(data.decontaminate), project.root),
        ]
        schema = project.schema
        references = References.of(project.settings.task.scorers)
        withdrawn = self._withdrawn
        reviewed = read_reviewed(data.review, project.root, project.store)
        held = [each for each in project.settings.candidates.values() if each.constrain and each.endpoint is None]
        respell = schema is not None and bool(held)
        inputs = {
            "withdrawn": withdrawn.as_json(),
            "settings": _without_paths_of_named(applied_settings(data, reviewed)),
            "files": {file.name: file.digest() for file in sources},
            "schema": schema,
            "references": references.as_json(),
            "rendering": self.base.fingerprint,
            "room": self._row_tokens,
            **({"review": reviewed.digest, "logged": reviewed.logged} if reviewed.rows else {}),
            **({"respell": True} if respell else {}),
        }

        def build(work: Path) -> str:
            from tunesmith.models.rendering import RowCounter

            # Where every training learns the last answer alone, no other has to be found in the template's text.
            learned = {train.loss_on for train in self._trainings}
            loss_on: LossOn = "last" if learned == {"last"} else "assistant"
            built = build_dataset(
                project.store,
                RowRules(
                    data,
                    count_tokens=RowCounter(self.base.folder, self.base.fingerprint, loss_on),
                    max_tokens=self._row_tokens,
                    answer_schema=schema,
                    unscorable=references,
                    control_tokens=self.renderer.control_tokens,
                    withdrawn=withdrawn,
                    respell=respell,
                ),
                project.root,
                scope=self.scope,
                work=work,
                runner=self.shards,
                progress=self.progress,
            )
            return self._unless_recalled(built)

        return load_dataset(project.store, self.stages.run("data", "data", inputs, build))

    @cached_property
    def _withdrawn(self) -> Withdrawn:
        """What was recalled when it was first needed."""
        return load_withdrawn(self.store)

    def _unless_recalled(self, built: str) -> str:
        """The digest of rows or documents. Raises Refused where something was recalled while they were built."""
        if load_withdrawn(self.store).values != self._withdrawn.values:
            raise Refused(
                "something was recalled while this was built, which may still hold it",
                where=f"record {short(built)}",
                fix="run again; the status of the recall shows what is left",
            )
        return built

    def without_test_rows(self) -> PipelineContext:
        """This context, with a dataset whose test rows cannot be read. Both share the models."""
        _ = self.sharded  # before the copy, so that it has the same one: several ranks train one model only
        dataset = self.dataset.without_test_rows()
        made = copy(self)
        made.dataset = dataset
        return made

    @property
    def _row_tokens(self) -> int:
        """The most tokens of a row: the smallest max_length of all trainings, at most the base's context length."""
        from tunesmith.models.base import require_context_length

        return min([require_context_length(self.base), *(train.max_length for train in self._trainings)])

    @property
    def _trainings(self) -> list[TrainSettings]:
        return [each.train for each in self.project.settings.candidates.values() if each.train]

    @cached_property
    def documents(self) -> str:
        """Digest of the project's documents, cut into passages. Raises UsageError without `documents:`."""
        project, settings = self.project, self.project.settings.documents
        if settings is None:
            raise UsageError("the project has no documents to retrieve from", where="documents", fix="add documents:")
        privacy, tokens = project.settings.data.privacy, self.renderer.control_tokens
        withdrawn = self._withdrawn
        recalled = {kind: sorted(withdrawn.values.get(kind, ())) for kind in ("source", "licence")}
        inputs = {
            "settings": settings.model_dump(mode="json"),
            "files": {file.name: file.digest() for file in document_files(settings, project.root)},
            "privacy": privacy.model_dump(mode="json"),
            "tokens": list(tokens),
            **({"withdrawn": recalled} if any(recalled.values()) else {}),
        }

        def build(_work: Path) -> str:
            built = build_documents(project.store, settings, project.root, privacy, tokens, withdrawn)
            return self._unless_recalled(built)

        return self.stages.run("documents", "documents", inputs, build, for_all=True)

    @cached_property
    def embedder(self) -> str:
        """Digest of the embedding model."""
        from tunesmith.models.embedding import find_embedder

        return find_embedder(self.progress).digest

    def settings_of(self, name: str) -> CandidateSettings:
        """The settings of a candidate. Raises UsageError for an unknown name."""
        known = self.project.settings.candidates
        if name not in known:
            what = f"there is no candidate {name!r}{nearest(name, known)}"
            raise UsageError(what, where="candidates", fix=f"name one of {', '.join(known)}")
        return known[name]


def _without_paths_of_named(settings: DataSettings) -> dict[str, Any]:
    """The settings as a dataset depends on them: of a source that has a name of its own, the path does not count.

    An upload has another path each time and on each machine. Its name and its bytes are in the stage's key.
    """
    stated = settings.model_dump(mode="json", exclude={"sign_off"})
    for source in stated["sources"]:
        if source["name"] is not None:
            del source["path"]
    return stated
