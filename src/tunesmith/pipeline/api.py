"""What the command line and `import tunesmith` call: a project goes in, a digest or a document comes out."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

from tunesmith.core.errors import UsageError
from tunesmith.core.progress import SILENT, Progress
from tunesmith.data.building.build import dataset_document
from tunesmith.data.building.shards import LocalRunner, ShardRunner
from tunesmith.evaluation.evaluate import evaluation_document
from tunesmith.evaluation.gates.verdict import verdict_document
from tunesmith.pipeline.candidates import learning_rates, training
from tunesmith.pipeline.context import PipelineContext
from tunesmith.pipeline.stages import Stage
from tunesmith.pipeline.training import tuned_names
from tunesmith.pipeline.verdicts import evaluation, verdict
from tunesmith.project import Project
from tunesmith.registry.versions import Version
from tunesmith.registry.versions import register as register_version


def build_data(project: Project, progress: Progress = SILENT, shards: ShardRunner | None = None) -> str:
    """Digest of the project's dataset version. shards: who reads the source files' shards; this machine by default."""
    return PipelineContext(project, progress, shards=shards or LocalRunner()).dataset.digest


def train(
    project: Project,
    progress: Progress = SILENT,
    name: str | None = None,
    restart: bool = False,
) -> str:
    """Digest of a candidate's training; by default that of the only tuned candidate."""
    return training(PipelineContext(project, progress), name or _only_tuned(project), restart)


def find_rate(project: Project, progress: Progress = SILENT, name: str | None = None) -> dict[str, Any]:
    """What `tunesmith train --find-rate --json` prints: a range test of the candidate's learning rate."""
    return learning_rates(PipelineContext(project, progress), name or _only_tuned(project))


def _only_tuned(project: Project) -> str:
    tuned = tuned_names(project)
    if len(tuned) != 1:
        raise UsageError(f"{len(tuned)} candidates are trained", fix=f"name one: {', '.join(tuned) or 'none is'}")
    return tuned[0]


def evaluate(project: Project, progress: Progress = SILENT, names: Sequence[str] | None = None) -> str:
    """Digest of an evaluation."""
    return evaluation(PipelineContext(project, progress), names)


def gate(project: Project, progress: Progress = SILENT, name: str | None = None) -> str:
    """Digest of a verdict."""
    return verdict(PipelineContext(project, progress), name)


def latest_evaluation(project: Project) -> str | None:
    """The newest evaluation in the project's store."""
    found = project.store.records_of("evaluation")
    return found[-1] if found else None


def latest_verdict(project: Project, name: str | None = None) -> str | None:
    """The newest verdict in the project's store, on the candidate of that name where one is given."""
    for digest in reversed(project.store.records_of("verdict")):
        if name is None or project.store.record(digest).body["name"] == name:
            return digest
    return None


def register(
    project: Project, decided: str, *, actor: str, override: str | None = None, tenant: str = "", region: str = ""
) -> Version:
    """Sign and register a candidate under the project's name. decided: digest of its verdict."""
    return register_version(
        project.store,
        name=project.settings.name,
        verdict=decided,
        actor=actor,
        tenant=tenant,
        region=region,
        override=override,
    )


def run(project: Project, progress: Progress = SILENT, *, actor: str | None = None) -> dict[str, Any]:
    """The whole pipeline up to a registered version; what `tunesmith run --json` prints.

    Where the gates do not pass nothing is registered and the document has no `register`; `gate` says why.
    """
    store = project.store
    signer = project.actor(actor)
    walk = PipelineContext(project, progress, signer)
    decided = verdict(walk)
    measured = store.record(decided).parents["evaluation"]
    document: dict[str, Any] = {
        "data": dataset_document(store, walk.dataset.digest),
        "train": {
            name: training_document(project, training(walk, name))
            for name, settings in project.settings.candidates.items()
            if settings.train
        },
        "evaluate": evaluation_document(store, measured),
        "gate": verdict_document(store, decided),
    }
    outcome = document["gate"]["verdict"]
    if outcome == "pass":
        began = time.perf_counter()
        version = register(project, decided, actor=signer)
        document["register"] = {"version": version.label, "digest": version.digest}
        walk.stages.done.append(Stage("register", time.perf_counter() - began, skipped=False))
    document["stages"] = [vars(stage) for stage in walk.stages.done]
    return document


def training_document(project: Project, digest: str) -> dict[str, Any]:
    """What `tunesmith train --json` prints."""
    record = project.store.record(digest, kind="training")
    body = record.body
    shown = (
        "examples_per_second",
        "tokens_per_second",
        "seconds",
        "peak_memory_bytes",
        "checkpoint_bytes",
        "estimate",
        "final_loss",
        "rows",
        "steps",
        "tokens",
        "tokens_computed",
        "labels",
        "parameters",
        "validation",
        "notices",
        "overfitting",
    )
    (weights,) = (blob for name, blob in record.blobs.items() if name.endswith(".safetensors"))
    return {
        "training": digest,
        "adapter": str(project.store.blob_path(weights)),
        **{key: body[key] for key in shown if key in body},
    }
