"""Trainings: run the pipeline with them here, train a candidate, and search for better settings."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from pydantic import TypeAdapter, ValidationError

from tunesmith.core import telemetry
from tunesmith.core.errors import NextStep, TunesmithError, UsageError
from tunesmith.core.progress import SILENT, Progress, Stopped
from tunesmith.core.values import Duration, View, first_problem
from tunesmith.jobs import leases, queue
from tunesmith.jobs.arguments import CHANGEABLE, Changes, run_arguments, with_changes
from tunesmith.jobs.kinds import run_project
from tunesmith.jobs.performing import JobProgress, Outcome, perform
from tunesmith.pipeline.beside import best_untuned
from tunesmith.pipeline.candidates import better_settings, repeat_training, training
from tunesmith.pipeline.context import PipelineContext
from tunesmith.pipeline.run import RunSummary, TrainingSummary, training_summary
from tunesmith.pipeline.training import Repeated, only_tuned
from tunesmith.pipeline.training_search import PRESENT
from tunesmith.project import Project
from tunesmith.records.training import TrainingSearchBody
from tunesmith.training.settings import LONGEST_BUDGET, PROBABILITY, TrainSettings

if TYPE_CHECKING:
    from tunesmith.training.estimates.memory_plan import MemoryPlan


def run_here(
    project: Project,
    *,
    changes: Changes = MappingProxyType({}),
    progress: Progress = SILENT,
    actor: str | None = None,
) -> RunSummary:
    """Run the whole pipeline in this process, as a job that others see in the list of jobs.

    changes: training settings of this run that differ from the project file.

    Raises what `pipeline.run` raises, and TunesmithError where somebody stopped the job.
    """
    telemetry.check()
    by, store = project.actor(actor), project.store
    arguments = run_arguments(project, changes)
    lease = leases.begin(store, leases.worker_name(), "run", arguments, project=project.settings.name, actor=by)
    project, done = with_changes(project, changes), list[RunSummary]()

    def work(progress: JobProgress) -> Outcome:
        summary, outcome = run_project(project, by, progress)
        done.append(summary)
        return outcome

    try:
        with telemetry.sending():
            perform(store, lease, work, shown=progress)
    except Stopped:
        state = queue.get(store, lease.job).state
        raise TunesmithError(
            f"the run was stopped: its job is {state}",
            where=f"job {lease.job}",
            fix=NextStep("see by whom; another run continues from here", "jobs log", job=lease.job),
        ) from None
    return done[0]


def train(
    project: Project, name: str | None = None, *, restart: bool = False, progress: Progress = SILENT
) -> TrainingSummary:
    """Train a candidate, by default the only one that is trained; continues from its newest complete checkpoint.

    restart: train again from the start.
    """
    context = PipelineContext(project, progress, beside=best_untuned)
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
    from tunesmith.training.launchers import end, take_part

    with joined(copies) as ranks:
        if not ranks.first:
            take_part(ranks)
            return None
        project = opened()
        context = PipelineContext(project, progress, together=ranks)
        digest = training(context, name or only_tuned(project), restart)
        end(ranks)
    return training_summary(project.store, digest)


def repeat(project: Project, name: str | None = None, *, progress: Progress = SILENT) -> Repeated:
    """Train a candidate again with the decisions of its finished training, and compare the weights. Keeps nothing.

    Raises UsageError where there is no such training.
    """
    return repeat_training(PipelineContext(project, progress), name or only_tuned(project))


TRIALS = 12  # by default
_MOST_TRIALS = 100


class SettingsSearch(TrainingSearchBody):
    """A search for better training settings. search: its record's digest. conclusion: what follows, in words."""

    search: str
    conclusion: str

    @property
    def compared_by(self) -> str:
        """What the trials were compared by, in words."""
        return _compared_by(self)


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
        raise UsageError(f"a search has 2 to {_MOST_TRIALS} trials", where="trials")
    allowed = None if within is None else _duration(within)
    digest = better_settings(PipelineContext(project, progress), name or only_tuned(project), trials, allowed)
    return settings_search(digest, TrainingSearchBody.read(project.store, digest))


def settings_search(digest: str, body: TrainingSearchBody) -> SettingsSearch:
    """A search's result, from its record."""
    trials = tuple(each.model_copy(update={"settings": _ordered(each.settings)}) for each in body.trials)
    suggestion = None if body.suggestion is None else _ordered(body.suggestion)
    ordered = {**dict(body), "trials": trials, "suggestion": suggestion}
    return SettingsSearch(**ordered, search=digest, conclusion=_conclusion(body))


def _ordered(values: Mapping[str, Any]) -> dict[str, Any]:
    """Settings in the order in which they are documented; a record has them by name."""
    return {key: values[key] for key in TrainSettings.model_fields if key in values}


def _duration(given: str | float) -> float:
    try:
        seconds: float = TypeAdapter(Duration).validate_python(given)
    except ValidationError as error:
        raise UsageError(first_problem(error)[1], where="the time of the search") from error
    if not 0 < seconds <= LONGEST_BUDGET:
        days = LONGEST_BUDGET // 86400
        raise UsageError(f"a search takes more than no time and at most {days} days", where="the time of the search")
    return seconds


def _compared_by(body: TrainingSearchBody) -> str:
    return "the score" if body.by == "score" else PROBABILITY


def _conclusion(body: TrainingSearchBody) -> str:
    """What follows from a search, in words."""
    if body.best is None:
        return "Keep what you have: no setting could be trained."
    outcomes = Counter(each.outcome for each in body.trials if each.number != PRESENT)
    counted = [f"{outcomes[name]} {name}" for name in ("complete", "pruned", "failed") if outcomes[name]]
    if body.planned > len(body.trials):
        counted.append(f"{body.planned - len(body.trials)} not run for want of time")
    others = f"the other settings ({', '.join(counted)})"
    what = _compared_by(body).removeprefix("the ")
    if body.best == PRESENT:
        return f"Keep what you have: none of {others} had a higher {what} on validation rows."
    said = "The present settings could not be trained; the best others are written below."
    if (difference := body.difference) is not None:
        by = f"{100 * difference.mean:.1f} points" if body.by == "score" else f"{difference.mean:.3f}"
        p = f"(p {difference.p:.2g} after correction for {len(body.trials) - 1} settings)"
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


class Setting(View):
    """A training setting that a run may change. value: the project file's, None where a default applies; help: what it
    means."""

    key: str
    label: str
    value: Any
    help: str


class TrainedCandidate(View):
    """A candidate that is trained, and what a run may change of that."""

    name: str
    settings: tuple[Setting, ...]


def changeable(project: Project) -> tuple[TrainedCandidate, ...]:
    """The trained candidates of a project, with what a run may change. A training with a budget has no epochs."""
    candidates = []
    for name, candidate in project.settings.candidates.items():
        if (train := candidate.train) is None:
            continue
        left_out = {"epochs" if train.budget is not None else "budget", *(() if train.method == "lora" else ("rank",))}
        fields, given = type(train).model_fields, train.model_fields_set
        settings = tuple(
            Setting(
                key=key,
                label=label,
                value=getattr(train, key) if key in given else None,
                help=fields[key].description or "",
            )
            for key, label in CHANGEABLE.items()
            if key not in left_out
        )
        candidates.append(TrainedCandidate(name=name, settings=settings))
    return tuple(candidates)


def memory(folder: Path, base: str | None = None, **given: Any) -> MemoryPlan:
    """Which ways of training a base fit a device, by default the base of the project in folder. Loads no weights.

    given: as `memory_plan` takes it, which says what is raised.
    """
    from tunesmith.training.estimates.memory_plan import memory_plan

    return memory_plan(base or Project.load(folder).settings.base, folder, **given)
