"""Run the whole pipeline, train candidates, and search for better training settings."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable
from typing import Annotated, Any

from pydantic import Field, TypeAdapter, ValidationError

from tunesmith.core.errors import UsageError
from tunesmith.core.progress import SILENT, Progress
from tunesmith.core.scope import Scope
from tunesmith.core.settings import Duration
from tunesmith.core.view import Omitted, View
from tunesmith.data.building.summary import DatasetSummary, dataset_summary
from tunesmith.evaluation.summary import EvaluationSummary, VerdictSummary, evaluation_summary, verdict_summary
from tunesmith.pipeline.candidates import better_settings, repeat_training, training
from tunesmith.pipeline.context import PipelineContext
from tunesmith.pipeline.stages import Stage
from tunesmith.pipeline.training_search import PRESENT
from tunesmith.pipeline.verdicts import verdict
from tunesmith.project import Project
from tunesmith.registry.registration import register
from tunesmith.services.run_settings import only_tuned
from tunesmith.store.records import Record
from tunesmith.store.store import Store
from tunesmith.training.estimates.more_time import more_time
from tunesmith.training.settings import LONGEST_BUDGET, PROBABILITY, TrainSettings


class ExpectedCost(View):
    """The estimate that was made before the training."""

    seconds: float
    step_seconds: float
    peak_memory_bytes: int
    checkpoint_bytes: int


class TrainingSummary(View):
    """A finished training. training: its record's digest; adapter: path of its weights; weights: their digest.

    epochs: done, a fraction where the last one was not. rehearsed: answers of the base that were drawn for it. tokens:
    of the rows; tokens_computed: with padding; labels: tokens that the loss counts; parameters: trained numbers.
    validation: step and loss of each validation, and the score where answers were scored. score: which metric, over how
    many rows; null where no answers were scored. kept: the step whose weights were kept. decisions: what a
    schedule decided while it ran; null where it was planned. overfitting: where the validation loss rose again.
    more_time: what twice the time would bring, by the slope of the validations; null where nothing was validated.
    """

    training: str
    adapter: str
    weights: str
    examples_per_second: float
    tokens_per_second: float
    seconds: float
    peak_memory_bytes: int
    checkpoint_bytes: int
    estimate: ExpectedCost
    final_loss: float
    rows: int
    rehearsed: int
    epochs: float
    steps: int
    kept: int
    tokens: int
    tokens_computed: int
    labels: int
    parameters: int
    validation: tuple[dict[str, Any], ...]
    score: dict[str, Any] | None
    decisions: dict[str, Any] | None
    notices: tuple[str, ...]
    overfitting: Any
    more_time: dict[str, Any] | None


class Repeated(View):
    """A training that was repeated from its record. same: whether its weights have the same bytes."""

    training: str
    same: bool
    steps: int
    seconds: float


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


def train(
    project: Project, name: str | None = None, *, restart: bool = False, progress: Progress = SILENT
) -> TrainingSummary:
    """Train a candidate, by default the only one that is trained; continues from its newest complete checkpoint.

    restart: train again from the start.
    """
    context = PipelineContext(project, progress)
    return training_summary(project.store, training(context, name or only_tuned(project), restart))


def train_together(
    opened: Callable[[], Project],
    name: str | None = None,
    *,
    copies: int = 1,
    restart: bool = False,
    progress: Progress = SILENT,
) -> TrainingSummary | None:
    """Train a candidate with the other processes that torchrun started; None in those that rank 0 leads.

    opened: opens the project, on rank 0 alone. copies: of the model that the processes hold together.
    """
    from tunesmith.engines.ranks import joined
    from tunesmith.training.launchers import together

    with joined(copies) as ranks:
        if not ranks.first:
            together.take_part(ranks)
            return None
        project = opened()
        context = PipelineContext(project, progress, together=ranks)
        digest = training(context, name or only_tuned(project), restart)
        together.end(ranks)
    return training_summary(project.store, digest)


def repeat(project: Project, name: str | None = None, *, progress: Progress = SILENT) -> Repeated:
    """Train a candidate again with the decisions of its finished training, and compare the weights. Keeps nothing.

    Raises UsageError where there is no such training.
    """
    digest, found = repeat_training(PipelineContext(project, progress), name or only_tuned(project))
    record = project.store.record(digest, kind="training")
    return Repeated(training=digest, same=found.weights == dict(record.blobs), steps=found.steps, seconds=found.seconds)


def run(
    project: Project, *, progress: Progress = SILENT, actor: str | None = None, scope: Scope = Scope()
) -> RunSummary:
    """Run every stage up to a registered version. Skips what is unchanged and continues what was stopped.

    scope: whom the version is for.
    """
    store, signer = project.store, project.actor(actor)
    context = PipelineContext(project, progress, signer, scope)
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
            risk = None if project.settings.risk is None else project.settings.risk.requirement
            version = register(store, name=project.settings.name, verdict=decided, actor=signer, scope=scope, risk=risk)
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


def training_summary(store: Store, digest: str) -> TrainingSummary:
    """The summary of a training. Raises Refused where its record is missing or damaged."""
    record = store.record(digest, kind="training")
    (weights,) = (blob for name, blob in record.blobs.items() if name.endswith(".safetensors"))
    stated = {key: value for key, value in record.body.items() if key in TrainingSummary.model_fields}
    return TrainingSummary(
        training=digest,
        adapter=str(store.blob_path(weights)),
        weights=weights,
        more_time=more_time(record.body),
        **stated,
    )


# Search for better training settings


TRIALS = 12  # by default
_MOST_TRIALS = 100


class Trial(View):
    """Settings that were tried; trial 0 has the present ones. outcome: complete, pruned or failed; why it failed.
    reports: the mean probability of the expected answers' tokens at each validation; probability: at the end. score:
    None where answers were not scored."""

    number: int
    settings: dict[str, Any]
    outcome: str
    why: str | None
    seconds: float
    reports: tuple[float, ...]
    probability: float | None
    score: float | None


class Difference(View):
    """The best trial minus the present settings. p: of a permutation test over groups of validation rows, times the
    number of other settings. real: whether p is at most 0.05."""

    mean: float
    p: float
    real: bool


class SettingsSearch(View):
    """A search for better training settings.

    search: its record's digest. planned: trials; fewer were run where the time `within` was used. splits: the rows that
    it could read. scored_rows: validation rows that each complete trial answered; unscored: why none were. by: what the
    complete trials are compared by, score or probability (of the expected answers). best: the number of the best trial,
    None where none is complete. suggestion: settings to write under `train:`; None where the present ones should stay.
    conclusion: the same in words.
    """

    search: str
    candidate: str
    method: str
    planned: int
    within: float | None
    splits: tuple[str, ...]
    validation_rows: int
    metric: str
    scored_rows: int
    unscored: str | None
    trials: tuple[Trial, ...]
    by: str
    best: int | None
    difference: Difference | None
    suggestion: dict[str, Any] | None
    conclusion: str


def search_settings(
    project: Project,
    name: str | None = None,
    *,
    trials: int = TRIALS,
    within: str | float | None = None,
    progress: Progress = SILENT,
) -> SettingsSearch:
    """Search for better training settings of a candidate, by default the only one that is trained.

    within: seconds, or a duration such as 20m, after which no further trial begins. A finished search of the same
    inputs is looked up; a search that was stopped goes on. Raises UsageError for a wrong duration or number of trials.
    """
    if not 2 <= trials <= _MOST_TRIALS:
        raise UsageError(f"a search has 2 to {_MOST_TRIALS} trials", where=f"--trials {trials}")
    allowed = None if within is None else _duration(within)
    digest = better_settings(PipelineContext(project, progress), name or only_tuned(project), trials, allowed)
    return settings_search(digest, project.store.record(digest, kind="training_search"))


def settings_search(digest: str, record: Record) -> SettingsSearch:
    """A search's result, from its record."""
    stated = {key: value for key, value in record.body.items() if key in SettingsSearch.model_fields}
    stated["trials"] = [
        {**{key: each[key] for key in Trial.model_fields}, "settings": _ordered(each["settings"])}
        for each in stated["trials"]
    ]
    if stated["suggestion"] is not None:
        stated["suggestion"] = _ordered(stated["suggestion"])
    found = SettingsSearch(search=digest, conclusion="", **stated)
    return found.model_copy(update={"conclusion": _conclusion(found)})


def _ordered(values: dict[str, Any]) -> dict[str, Any]:
    """Settings in the order in which they are documented; a record has them by name."""
    return {key: values[key] for key in TrainSettings.model_fields if key in values}


def _duration(given: str | float) -> float:
    try:
        seconds: float = TypeAdapter(Duration).validate_python(given)
    except ValidationError as error:
        said = error.errors(include_url=False)[0]["msg"].removeprefix("Value error, ")
        raise UsageError(said, where=f"--within {given}") from error
    if not 0 < seconds <= LONGEST_BUDGET:
        days = LONGEST_BUDGET // 86400
        raise UsageError(f"a search takes more than no time and at most {days} days", where=f"--within {given}")
    return seconds


def _conclusion(found: SettingsSearch) -> str:
    """What follows from a search, in words."""
    if found.best is None:
        return "Keep what you have: no setting could be trained."
    outcomes = Counter(each.outcome for each in found.trials if each.number != PRESENT)
    counted = [f"{outcomes[name]} {name}" for name in ("complete", "pruned", "failed") if outcomes[name]]
    if found.planned > len(found.trials):
        counted.append(f"{found.planned - len(found.trials)} not run for want of time")
    others = f"the other settings ({', '.join(counted)})"
    what = "score" if found.by == "score" else PROBABILITY.removeprefix("the ")
    if found.best == PRESENT:
        return f"Keep what you have: none of {others} had a higher {what} on validation rows."
    said = "The present settings could not be trained; the best others are written below."
    if (difference := found.difference) is not None:
        by = f"{100 * difference.mean:.1f} points" if found.by == "score" else f"{difference.mean:.3f}"
        p = f"(p {difference.p:.2g} after correction for {len(found.trials) - 1} settings)"
        if not difference.real:
            return (
                f"Keep what you have: the best of {others} has a {what} that is higher by {by}, which is within noise "
                f"{p}."
            )
        said = f"The best of {others} has a {what} that is higher by {by} on validation rows {p}."
    return (
        f"{said} It is optimistic, because the best was chosen by the same rows: only an evaluation on test rows says "
        "what it is worth."
    )
