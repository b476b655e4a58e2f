"""What all stages share: the project, its bases with their engines, the dataset version. Each is loaded on first use.

Every stage is a function that takes a `PipelineContext`. A stage calls the stages whose results it needs.
"""

from __future__ import annotations

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
from tunesmith.evaluation.metrics.declared import References
from tunesmith.evaluation.metrics.scorers import nearest
from tunesmith.pipeline.bases import ProjectBase
from tunesmith.pipeline.stages import Stages
from tunesmith.project import Project
from tunesmith.store.store import Store

if TYPE_CHECKING:
    from tunesmith.engines.ranks import Ranks
    from tunesmith.models.rendering import LossOn
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
    def bases(self) -> list[ProjectBase]:
        """The bases that candidates answer with, the project's own first."""
        shared = self.stages, self.progress, self.together
        return [ProjectBase(self.project, spec, *shared) for spec in self.project.settings.bases]

    def of(self, spec: str | None = None) -> ProjectBase:
        """The base that a candidate names; by default the project's own."""
        return next(each for each in self.bases if each.spec == (spec or self.project.settings.base))

    def on(self, digest: str) -> ProjectBase:
        """The base of this digest. Raises Refused where no candidate of the project names it."""
        for each in self.bases:
            if each.digest == digest:
                return each
        raise Refused(
            f"this was made on the base {short(digest)}, which is none of the project's: "
            f"{', '.join(self.project.settings.bases)}",
            where="base",
            fix="name that base in tunesmith.yaml",
        )

    def require_one_process(self) -> None:
        """Raise UsageError where settings say that a Ray cluster's workers train."""
        if self.of().ray is not None:
            raise UsageError(
                "this trains in one process, and engine.ray is for the training of a candidate and for runs",
                where="engine.ray",
                fix="leave engine.ray out for this command",
            )

    def engine_of(self, candidate: Candidate) -> str | None:
        """The name of the engine that answers for a candidate; None for baselines and endpoints."""
        return self.on(candidate.base).engine_kind if candidate.asks_base else None

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
        renderings = sorted({each.base.fingerprint for each in self.bases})
        inputs = {
            "withdrawn": withdrawn.as_json(),
            "settings": _without_paths_of_named(applied_settings(data, reviewed)),
            "files": {file.name: file.digest() for file in sources},
            "schema": schema,
            "references": references.as_json(),
            "rendering": renderings[0],
            "room": self._row_tokens,
            **({"renderings": renderings} if len(renderings) > 1 else {}),
            **({"review": reviewed.digest, "logged": reviewed.logged} if reviewed.rows else {}),
            **({"respell": True} if respell else {}),
        }

        def build(work: Path) -> str:
            from tunesmith.models.rendering import CountForAll, RowCounter

            # Where every training learns the last answer alone, no other has to be found in the template's text.
            learned = {train.loss_on for train in self._trainings}
            loss_on: LossOn = "last" if learned == {"last"} else "assistant"
            tokens = self._control_tokens
            built = build_dataset(
                project.store,
                RowRules(
                    data,
                    count_tokens=CountForAll(
                        {each.spec: RowCounter(each.base.folder, each.base.fingerprint, loss_on) for each in self.bases}
                    ),
                    max_tokens=self._row_tokens,
                    answer_schema=schema,
                    unscorable=references,
                    control_tokens=tokens if len(self.bases) > 1 else list(tokens),
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
        _ = self.bases  # before the copy, so that it has the same ones: their weights are loaded once
        dataset = self.dataset.without_test_rows()
        made = copy(self)
        made.dataset = dataset
        return made

    @property
    def _row_tokens(self) -> int:
        """The most tokens of a row: the smallest max_length of all trainings, at most the bases' context lengths."""
        from tunesmith.models.base import require_context_length

        lengths = [require_context_length(each.base) for each in self.bases]
        return min([*lengths, *(train.max_length for train in self._trainings)])

    @property
    def _control_tokens(self) -> dict[str, str]:
        """The tokens by which the bases' chat templates mark turns, each with the base."""
        written = {token: each.spec for each in reversed(self.bases) for token in each.renderer.control_tokens}
        return {token: written[token] for token in sorted(written)}

    @property
    def _trainings(self) -> list[TrainSettings]:
        return [each.train for each in self.project.settings.candidates.values() if each.train]

    @cached_property
    def documents(self) -> str:
        """Digest of the project's documents, cut into passages. Raises UsageError without `documents:`."""
        project, settings = self.project, self.project.settings.documents
        if settings is None:
            raise UsageError("the project has no documents to retrieve from", where="documents", fix="add documents:")
        privacy, tokens = project.settings.data.privacy, list(self._control_tokens)
        withdrawn = self._withdrawn
        recalled = {kind: sorted(withdrawn.values.get(kind, ())) for kind in ("source", "licence")}
        inputs = {
            "settings": settings.model_dump(mode="json"),
            "files": {file.name: file.digest() for file in document_files(settings, project.root)},
            "privacy": privacy.model_dump(mode="json"),
            "tokens": tokens,
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
