"""The whole pipeline up to a registered version, and what a finished training and a finished run are."""

from __future__ import annotations

import time
from typing import Annotated, Any

from pydantic import Field

from tunesmith.core.progress import SILENT, Progress
from tunesmith.core.text.names import Scope
from tunesmith.core.values import Omitted, View
from tunesmith.data.dataset import DatasetSummary, dataset_summary
from tunesmith.evaluation.summary import EvaluationSummary, VerdictSummary, evaluation_summary, verdict_summary
from tunesmith.pipeline.beside import best_untuned
from tunesmith.pipeline.candidates import training
from tunesmith.pipeline.context import PipelineContext
from tunesmith.pipeline.stages import Stage
from tunesmith.pipeline.verdicts import verdict
from tunesmith.project import Project
from tunesmith.records.training import TrainingBody, TrainingFigures
from tunesmith.registry.registration import register
from tunesmith.store.store import Store
from tunesmith.training.schedule import more_time


class TrainingSummary(TrainingFigures, View):
    """A finished training. training: its record's digest; adapter: path of its weights; weights: their digest.

    more_time: which budget would hold all epochs; null where this one did.
    """

    training: str
    adapter: str
    weights: str
    more_time: str | None


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
    stages: tuple[Stage, ...]

    def without_paths(self) -> dict[str, Any]:
        """The document without paths of this machine, for people on others."""
        document = self.document()
        for trained in document["train"].values():
            del trained["adapter"]
        return document


def training_summary(store: Store, digest: str) -> TrainingSummary:
    """The summary of a training. Raises Refused where its record is missing or damaged."""
    record = store.record(digest, kind="training")
    (weights,) = (blob for name, blob in record.blobs.items() if name.endswith(".safetensors"))
    body, adapter = TrainingBody.of(record), str(store.blob_path(weights))
    return TrainingSummary.of(body, training=digest, adapter=adapter, weights=weights, more_time=more_time(body))


def run(
    project: Project, *, progress: Progress = SILENT, actor: str | None = None, scope: Scope = Scope()
) -> RunSummary:
    """Run every stage up to a registered version. Skips what is unchanged and continues what was stopped.

    scope: whom the version is for. Raises Refused where the project file changed before the version was registered.
    """
    store, signer = project.store, project.actor(actor)
    context = PipelineContext(project, progress, signer, scope, beside=best_untuned)
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
        with progress.task("registering", 1):  # the last step at which the run can be stopped
            project.unchanged("this run began")
            risk = None if project.settings.risk is None else project.settings.risk.requirement
            version = register(
                store, name=project.settings.name, verdict=decided, actor=signer, scope=scope, risk=risk,
                papers=project.settings.papers,
            )  # fmt: skip
        registered = RunVersion(version=version.label, digest=version.digest)
        context.stages.done.append(Stage("register", time.perf_counter() - began, skipped=False))
    return RunSummary(
        data=dataset_summary(store, context.dataset.digest),
        train=trained,
        evaluate=evaluation_summary(store, gate.evaluation),
        gate=gate,
        registered=registered,
        stages=tuple(context.stages.done),
    )
