"""Train candidates, and test learning rates."""

from __future__ import annotations

from typing import Any

from tunesmith.core.errors import UsageError
from tunesmith.core.progress import SILENT, Progress
from tunesmith.core.view import View
from tunesmith.pipeline.candidates import learning_rates, training
from tunesmith.pipeline.context import PipelineContext
from tunesmith.pipeline.training import tuned_names
from tunesmith.project import Project
from tunesmith.store.store import Store


class ExpectedCost(View):
    """The estimate that was made before the training."""

    seconds: float
    peak_memory_bytes: int
    checkpoint_bytes: int


class TrainingSummary(View):
    """A finished training. training: its record's digest; adapter: path of its weights.

    tokens: of the rows; tokens_computed: with padding; labels: tokens that the loss counts; parameters: trained
    numbers. validation: loss after each epoch or part of one. overfitting: where the validation loss rose again.
    """

    training: str
    adapter: str
    examples_per_second: float
    tokens_per_second: float
    seconds: float
    peak_memory_bytes: int
    checkpoint_bytes: int
    estimate: ExpectedCost
    final_loss: float
    rows: int
    steps: int
    tokens: int
    tokens_computed: int
    labels: int
    parameters: int
    validation: tuple[dict[str, Any], ...]
    notices: tuple[str, ...]
    overfitting: Any


class LearningRates(View):
    """A range test: the loss at rising learning rates. suggestion: by rule; None where no rate made the loss fall."""

    rates: tuple[float, ...]
    losses: tuple[float, ...]
    smoothed: tuple[float, ...]
    suggestion: float | None
    rule: str


def train(
    project: Project, name: str | None = None, *, restart: bool = False, progress: Progress = SILENT
) -> TrainingSummary:
    """Train a candidate, by default the only one that is trained; continues from its newest complete checkpoint.

    restart: train again from the start.
    """
    context = PipelineContext(project, progress)
    return training_summary(project.store, training(context, name or _only_tuned(project), restart))


def find_rate(project: Project, name: str | None = None, *, progress: Progress = SILENT) -> LearningRates:
    """Run a few steps at rising learning rates. Keeps nothing."""
    found = learning_rates(PipelineContext(project, progress), name or _only_tuned(project))
    return LearningRates.model_validate(found)


def training_summary(store: Store, digest: str) -> TrainingSummary:
    """The summary of a training. Raises Refused where its record is missing or damaged."""
    record = store.record(digest, kind="training")
    (weights,) = (blob for name, blob in record.blobs.items() if name.endswith(".safetensors"))
    stated = {key: value for key, value in record.body.items() if key in TrainingSummary.model_fields}
    return TrainingSummary(training=digest, adapter=str(store.blob_path(weights)), **stated)


def _only_tuned(project: Project) -> str:
    tuned = tuned_names(project)
    if len(tuned) != 1:
        raise UsageError(f"{len(tuned)} candidates are trained", fix=f"name one: {', '.join(tuned) or 'none is'}")
    return tuned[0]
