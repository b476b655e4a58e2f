"""Search for better training settings."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import TypeAdapter, ValidationError

from tunesmith.core.errors import UsageError
from tunesmith.core.progress import SILENT, Progress
from tunesmith.core.settings import Duration
from tunesmith.core.view import View
from tunesmith.evaluation.summary import MetricInterval
from tunesmith.pipeline.candidates import better_settings
from tunesmith.pipeline.context import PipelineContext
from tunesmith.project import Project
from tunesmith.services.runs.training import only_tuned
from tunesmith.store.records import Record
from tunesmith.training.settings import LONGEST_BUDGET, PROBABILITY, TrainSettings

PRESENT = 0  # the number of the trial with the present settings
_SHORT = 3  # the training is said to be longer than the trials from so many times on


class TrialRun(View):
    """A trial in one rung (from 0). rows: trained on, with repetitions; seconds: of the training; checking: of its
    validation. score: None where answers were not scored. probability, loss: means over the labels of validation rows.
    expected_bytes, peak_bytes: memory of the process."""

    rung: int
    rows: int
    steps: int
    seconds: float
    checking: float
    score: MetricInterval | None
    probability: float
    loss: float
    expected_bytes: int
    peak_bytes: int


class Trial(View):
    """Settings that were tried; trial 0 has the present ones. runs: none where it failed at once or was not run.
    failed: why it could not be trained. cut: why and at which step its last run was ended."""

    trial: int
    settings: dict[str, Any]
    runs: tuple[TrialRun, ...]
    failed: str | None
    cut: str | None


class Difference(View):
    """The best trial minus the present settings in the last rung. p: of a permutation test over groups of validation
    rows, times the number of other settings. real: whether p is at most 0.05."""

    mean: float
    p: float
    real: bool


class SettingsSearch(View):
    """A search for better training settings.

    search: its record's digest. method: with its source. within, seconds: allowed and taken. splits: the rows that it
    could read. scored_rows: validation rows that each trial answered. longest: rows that the training itself is
    expected to see. ended: why there was no further trial. by: what the last rung is compared by, score or probability
    (of the expected answers), and why; None where nothing tells its trials apart. best: the number of the best trial.
    suggestion: settings to write under `train:`; None where the present ones should stay. conclusion: the same in
    words.
    """

    search: str
    candidate: str
    method: str
    within: float
    seconds: float
    splits: tuple[str, ...]
    rows: int
    validation_rows: int
    metric: str
    scored_rows: int
    longest: int
    ended: str
    trials: tuple[Trial, ...]
    failed: int
    cut: int
    not_run: int
    final_rung: int | None
    by: str | None
    why: str
    best: int | None
    difference: Difference | None
    suggestion: dict[str, Any] | None
    conclusion: str


def search_settings(
    project: Project, name: str | None = None, *, within: str | float = "20m", progress: Progress = SILENT
) -> SettingsSearch:
    """Search for better training settings of a candidate, by default the only one that is trained.

    within: seconds, or a duration such as 20m. A finished search of the same inputs is looked up; a search that was
    stopped goes on. Raises UsageError for a wrong duration.
    """
    allowed = _duration(within)
    digest = better_settings(PipelineContext(project, progress), name or only_tuned(project), allowed)
    return settings_search(digest, project.store.record(digest, kind="training_search"))


def settings_search(digest: str, record: Record) -> SettingsSearch:
    """A search's result, from its record."""
    body = record.body
    stated = {key: value for key, value in body.items() if key in SettingsSearch.model_fields}
    stated["trials"] = [{**each, "settings": _ordered(each["settings"])} for each in body["trials"]]
    if body["suggestion"] is not None:
        stated["suggestion"] = _ordered(body["suggestion"])
    decisions = body["decisions"]
    return SettingsSearch(
        search=digest,
        scored_rows=decisions["scored_rows"],
        longest=decisions["longest"],
        ended=decisions["ended"],
        conclusion=_conclusion(body),
        **stated,
    )


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


def _conclusion(body: Mapping[str, Any]) -> str:
    """What follows from a search, in words."""
    best, difference, corrected = body["best"], body["difference"], body["decisions"]["others"]
    tried = sum(bool(trial["runs"]) for trial in body["trials"] if trial["trial"] != PRESENT)
    not_run = f", and {body['not_run']} not" if body["not_run"] else ""
    others = f"the other settings that were tried ({tried}{not_run})"
    if best is None:
        return f"Keep what you have: {body['why']}."
    what = "score" if body["by"] == "score" else PROBABILITY.removeprefix("the ")
    if best == PRESENT:
        return f"Keep what you have: none of {others} had a higher {what} on validation rows."
    if body["suggestion"] is None:
        return (
            f"Keep what you have: the best of {others} differs by {_by(difference['mean'], what)} from the present "
            f"ones, which is within noise (p {difference['p']:.2g} after correction for {corrected} settings)."
        )
    said = "The present settings could not be trained; the best others are written below."
    if difference is not None:
        said = (
            f"The best of {others} is better by {_by(abs(difference['mean']), what)} on validation rows "
            f"(p {difference['p']:.2g} after correction for {corrected} settings)."
        )
    said += (
        f" Its {what} is optimistic, because the best was chosen by the same rows: only an evaluation on test rows "
        "says what it is worth."
    )
    final = max(run["rows"] for trial in body["trials"] for run in trial["runs"])
    if body["decisions"]["longest"] >= _SHORT * final:
        said += (
            f" The longest trial saw {final:,} rows, your training sees about {body['decisions']['longest']:,}: it may "
            "prefer a lower rate. A search with a longer --within shows that."
        )
    return said


def _by(difference: float, what: str) -> str:
    return f"{100 * difference:.1f} points" if what == "score" else f"{difference:.3f} in the probability of a token"
