"""Search for better training settings."""

from __future__ import annotations

from collections import Counter
from typing import Any

from pydantic import TypeAdapter, ValidationError

from tunesmith.core.errors import UsageError
from tunesmith.core.progress import SILENT, Progress
from tunesmith.core.settings import Duration
from tunesmith.core.view import View
from tunesmith.pipeline.candidates import better_settings
from tunesmith.pipeline.context import PipelineContext
from tunesmith.pipeline.training_search import PRESENT
from tunesmith.project import Project
from tunesmith.services.runs.training import only_tuned
from tunesmith.store.records import Record
from tunesmith.training.settings import LONGEST_BUDGET, PROBABILITY, TrainSettings

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
