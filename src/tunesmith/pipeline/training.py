"""The training stage: trains a candidate's weights on the dataset version's rows, composed with its prompt."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tunesmith.candidates.candidate import Candidate
from tunesmith.candidates.composing import Composer, count_prompts, describe_prompts
from tunesmith.core.errors import UsageError
from tunesmith.data.dataset import Example
from tunesmith.data.governance.signoff import require_signed
from tunesmith.pipeline.context import PipelineContext
from tunesmith.project import Project
from tunesmith.training.rows import TrainingRow, training_rows
from tunesmith.training.settings import MetricsSettings, TrainSettings

if TYPE_CHECKING:
    from tunesmith.training.range_test import RateSearch


def train_candidate(
    context: PipelineContext, name: str, candidate: Candidate, settings: TrainSettings, *, restart: bool = False
) -> str:
    """Digest of a candidate's training.

    restart: train again, and ignore earlier results and checkpoints. Raises UsageError for a candidate with shots.
    """
    inputs = _inputs(context, name, candidate, settings)

    def run(work: Path) -> str:
        from tunesmith.training.train import make_spec, train

        counted = count_prompts(candidate, (each.request for each in context.dataset.examples("train")))
        context.progress.say(f"{name}: system prompt in training: {describe_prompts(counted)}")
        rows, validation = composed_rows(context, candidate, settings)
        spec = make_spec(
            base=context.base,
            dataset=context.dataset.digest,
            rows=rows,
            validation=validation,
            settings=settings,
            work=work / "checkpoints",
            name=name,
            restart=restart,
            metrics=_metrics(context),
        )
        return train(context.store, spec, model=context.model, progress=context.progress)

    return context.stages.run(f"train {name}", "train", inputs, run, again=restart)


def find_rate(context: PipelineContext, name: str, candidate: Candidate, settings: TrainSettings) -> RateSearch:
    """The result of a range test over the first steps of a candidate's training. Keeps nothing."""
    from tunesmith.training.train import find_rate as search

    _inputs(context, name, candidate, settings)  # raises for what cannot be trained
    rows, _validation = composed_rows(context, candidate, settings)
    return search(base=context.base, rows=rows, settings=settings, model=context.model, progress=context.progress)


def _metrics(context: PipelineContext) -> MetricsSettings | None:
    """Where curves are shown, with the folder's path made relative to the project's. No stage depends on it."""
    metrics = context.project.settings.metrics
    if metrics is None or metrics.tensorboard is None:
        return metrics
    return metrics.model_copy(update={"tensorboard": str(context.project.root / metrics.tensorboard)})


def _inputs(context: PipelineContext, name: str, candidate: Candidate, settings: TrainSettings) -> dict[str, Any]:
    """The inputs of the training stage. Raises UsageError for a candidate that cannot be trained."""
    if candidate.shots:
        raise UsageError(
            "a candidate with shots cannot be trained: some rows would show their own answers",
            where=f"candidates.{name}",
            fix="remove shots or train; or use another candidate's adapter with weights:",
        )
    if context.project.settings.data.sign_off:
        require_signed(context.store, context.dataset.digest)
    return {
        **candidate.model_dump(mode="json", by_alias=True, include={"retrieve", "documents", "embedder"}),
        "base": context.base.digest,
        "dataset": context.dataset.digest,
        "prompt": candidate.prompt,
        "settings": settings.model_dump(mode="json", exclude={"checkpoint_seconds"}),
    }


def composed_rows(
    context: PipelineContext, candidate: Candidate, settings: TrainSettings
) -> tuple[list[TrainingRow], list[TrainingRow]]:
    """A candidate's training rows and validation rows, composed as it will see requests. Needs no engine."""
    composer = Composer(context.store, candidate)

    def composed(examples: Sequence[Example]) -> list[TrainingRow]:
        return [TrainingRow(each.id, composer.training_conversation(each)) for each in examples]

    chosen = training_rows(context.dataset.examples("train"), settings)
    return composed(chosen), composed(context.dataset.examples("validation"))


def tuned_names(project: Project) -> list[str]:
    """Names of the candidates that are trained, without the controls whose answers are shuffled."""
    candidates = project.settings.candidates.items()
    return [name for name, settings in candidates if settings.train and not settings.train.permute_answers]
