"""What the stages share: the project, its base, the engine, the dataset version. Each is found once, when first needed.

The stages are functions of a `Chain` in the modules beside this one; each asks for what comes before it by name.
"""

from __future__ import annotations

import difflib
import time
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from tunesmith.candidates.candidate import load_candidate
from tunesmith.candidates.settings import CandidateSettings
from tunesmith.core.errors import UsageError
from tunesmith.core.progress import SILENT, Progress
from tunesmith.data.building.build import build_dataset
from tunesmith.data.building.shards import Engine as ShardEngine
from tunesmith.data.building.shards import Local
from tunesmith.data.dataset import Dataset, load_dataset
from tunesmith.data.documents import build_documents, document_files
from tunesmith.data.governance.withdrawn import load_withdrawn
from tunesmith.data.sources.sources import find_files
from tunesmith.data.splitting.decontaminate import outside_sources
from tunesmith.engines.factory import engine_kind, open_engine
from tunesmith.engines.settings import NATIVE
from tunesmith.models.families import meant, ours
from tunesmith.pipeline.stages import Stage, Stages
from tunesmith.project import Project
from tunesmith.store.store import Store
from tunesmith.training.settings import TARGETS

if TYPE_CHECKING:
    from tunesmith.engines.protocol import Engine
    from tunesmith.models.base import Base


@dataclass
class Chain:
    """One walk along the chain for a project."""

    project: Project
    progress: Progress = SILENT
    actor: str | None = None  # whose work it is; the project's own way to find out where None
    shards: ShardEngine = field(default_factory=Local)  # who reads the source files' shards; the dataset is the same
    foretold: bool = field(default=False, init=False)  # whether it was said what the gates will be able to see

    @property
    def store(self) -> Store:
        """Where the project's records lie."""
        return self.project.store

    @cached_property
    def stages(self) -> Stages:
        """What runs the stages, and how each went."""
        return Stages(self.project, self.progress, self.actor)

    @cached_property
    def base(self) -> Base:
        """The base model, found and pinned."""
        from tunesmith.models.base import resolve_base

        began = time.perf_counter()
        found = resolve_base(self.store, self.project.settings.base, self.project.root, self.progress)
        self.stages.done.append(Stage("base", time.perf_counter() - began, skipped=False))
        if ours(found.family):
            self._check_targets()
        return found

    def _check_targets(self) -> None:
        """Raises UsageError for a name that no linear layer has, before anything slow; other families have others."""
        for name, settings in self.project.settings.candidates.items():
            if settings.train:
                meant(settings.train.targets, TARGETS, f"candidates.{name}.train.targets")

    @cached_property
    def engine(self) -> Engine:
        """The engine that answers, opened on first need."""
        return open_engine(self.base, self.project.settings.engine)

    @property
    def engine_kind(self) -> dict[str, str]:
        """Part of what answers depend on. The embedded engine, the first there was, is not named."""
        kind = engine_kind(self.base, self.project.settings.engine)
        return {} if kind == NATIVE else {"engine": kind}

    def engine_of(self, candidate: str) -> dict[str, str]:
        """The same for one candidate, by digest: what floors and endpoints answer depends on no engine."""
        return self.engine_kind if load_candidate(self.store, candidate).asks_base else {}

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
        withdrawn = load_withdrawn(project.store)
        inputs = {
            "withdrawn": withdrawn.as_json(),
            "settings": data.model_dump(mode="json", exclude={"sign_off"}),
            "files": {file.name: file.digest() for file in sources},
            "schema": schema,
            "rendering": self.base.fingerprint,
            "room": self._row_tokens,
        }

        def build(work: Path) -> str:
            from tunesmith.models.rendering import RowCounter

            return build_dataset(
                project.store,
                data,
                project.root,
                count_tokens=RowCounter(self.base.folder, self.base.fingerprint),
                max_tokens=self._row_tokens,
                answer_schema=schema,
                special_tokens=self.engine.special_tokens,
                withdrawn=withdrawn,
                work=work,
                engine=self.shards,
                progress=self.progress,
            )

        return load_dataset(project.store, self.stages.run("data", "data", inputs, build))

    @property
    def _row_tokens(self) -> int:
        """Most tokens of a row: the shortest max_length of any training, within the base's context."""
        trained = [each.train.max_length for each in self.project.settings.candidates.values() if each.train]
        return min([self.base.context_length, *trained])

    @cached_property
    def documents(self) -> str:
        """Digest of the project's documents, read and cut into passages. Raises UsageError where it names none."""
        project, settings = self.project, self.project.settings.documents
        if settings is None:
            raise UsageError("no documents are named to look things up in", where="documents", fix="add documents:")
        privacy, tokens = project.settings.data.privacy, self.engine.special_tokens
        inputs = {
            "settings": settings.model_dump(mode="json"),
            "files": {file.name: file.digest() for file in document_files(settings, project.root)},
            "privacy": privacy.model_dump(mode="json"),
            "tokens": list(tokens),
        }

        def build(_work: Path) -> str:
            return build_documents(project.store, settings, project.root, privacy, tokens)

        return self.stages.run("documents", "documents", inputs, build)

    @cached_property
    def embedder(self) -> str:
        """Digest of the model that turns texts into vectors."""
        from tunesmith.models.embedding import find_embedder

        return find_embedder(self.progress).digest

    def settings_of(self, name: str) -> CandidateSettings:
        """What the project file says of a candidate. Raises UsageError for a name it does not know."""
        known = self.project.settings.candidates
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise UsageError(
                f"there is no candidate {name!r}{hint}", where="candidates", fix=f"name one of {', '.join(known)}"
            )
        return known[name]
