"""The whole pipeline in one call."""

from __future__ import annotations

import time
from typing import Annotated

from pydantic import Field

from tunesmith.core.progress import SILENT, Progress
from tunesmith.core.view import Omitted, View
from tunesmith.data.building.summary import DatasetSummary, dataset_summary
from tunesmith.evaluation.summary import EvaluationSummary, VerdictSummary, evaluation_summary, verdict_summary
from tunesmith.pipeline.candidates import training
from tunesmith.pipeline.context import PipelineContext
from tunesmith.pipeline.stages import Stage
from tunesmith.pipeline.verdicts import verdict
from tunesmith.project import Project
from tunesmith.registry.versions import register
from tunesmith.services.training import TrainingSummary, training_summary


class StageRun(View):
    """One stage. seconds: 0 where it was skipped because its inputs did not change."""

    name: str
    seconds: float
    skipped: bool


class RunVersion(View):
    """The version that the run registered. version: its label, NAME@v3."""

    version: str
    digest: str


class RunSummary(View):
    """What a run did, by stage. registered: only where the gates passed; gate says why they did not."""

    data: DatasetSummary
    train: dict[str, TrainingSummary]
    evaluate: EvaluationSummary
    gate: VerdictSummary
    registered: Annotated[Omitted[RunVersion], Field(alias="register")] = None
    stages: tuple[StageRun, ...]


def run(project: Project, *, progress: Progress = SILENT, actor: str | None = None) -> RunSummary:
    """Run every stage up to a registered version. Skips what is unchanged and continues what was stopped."""
    store, signer = project.store, project.actor(actor)
    context = PipelineContext(project, progress, signer)
    decided = verdict(context)
    gate = verdict_summary(store, decided)
    trained = {
        name: training_summary(store, training(context, name))
        for name, settings in project.settings.candidates.items()
        if settings.train
    }
    registered = None
    if gate.verdict == "pass":
        began = time.perf_counter()
        version = register(store, name=project.settings.name, verdict=decided, actor=signer)
        registered = RunVersion(version=version.label, digest=version.digest)
        context.stages.done.append(Stage("register", time.perf_counter() - began, skipped=False))
    return RunSummary(
        data=dataset_summary(store, context.dataset.digest),
        train=trained,
        evaluate=evaluation_summary(store, gate.evaluation),
        gate=gate,
        registered=registered,
        stages=tuple(StageRun(**vars(stage)) for stage in context.stages.done),
    )
