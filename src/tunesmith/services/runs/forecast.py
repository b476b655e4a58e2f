"""Forecast a training: what it will give, whether it pays, and what it costs."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from tunesmith.core.errors import Refused, UsageError
from tunesmith.core.progress import SILENT, Progress
from tunesmith.core.system.files import write_atomic
from tunesmith.core.view import View
from tunesmith.evaluation.forecasting.wording import headline, reasons
from tunesmith.pipeline.context import PipelineContext
from tunesmith.pipeline.forecast import forecast as run_forecast
from tunesmith.pipeline.training import tuned_names
from tunesmith.project import Project
from tunesmith.services.runs.training import only_tuned
from tunesmith.store.store import Store

SHARE = 0.1  # of the training's budget, for its forecast
_LOOKED_AT = 50  # newest forecasts that are looked through for a project's
_WITHOUT_BUDGET = 120.0  # seconds, for the forecast of a training that has epochs


class Expected(View):
    """The middle of a forecast, and the ends of its interval."""

    median: float
    low: float
    high: float


class SubsetScore(View):
    """A short training. rows: of it; mean: its score on the held-out rows."""

    rows: int
    epochs: float
    mean: float


class CurvePoint(View):
    """The expected score after a training on so many rows."""

    rows: int
    median: float
    low: float
    high: float


class ExpectedTraining(View):
    """Time and price of a training. money: None without a price."""

    seconds: float
    epochs: float
    money: float | None


class NeededRows(ExpectedTraining):
    """Rows, and the training on them."""

    rows: int


class Needed(View):
    """The rows that the goal takes; None where no number up to a hundred times the rows reaches it.

    As many as the smallest subset has: at most so many. never: the probability that none reaches it.
    """

    low: NeededRows | None
    median: NeededRows | None
    high: NeededRows | None
    never: float


class Pays(View):
    """When lower running costs repay the training. unit: of the costs; days: in which they have to.

    rival_per_1000: None where the two cannot be compared. requests_a_day: None where a request costs no less than the
    rival's.
    """

    unit: Literal["money", "seconds"]
    days: float
    training: float
    tuned_per_1000: float
    rival_per_1000: float | None
    requests_a_day: float | None


class Forecast(View):
    """What a training will give. forecast: its record's digest; name: the candidate; rows: training rows.

    held: held-out rows that were asked, by the split that they are of. test: test rows; budget, seconds: that the
    forecast had and took. confidence: of every interval. goal: the lift from which tuning pays; likely: the probability
    that it is reached. rival: the best untuned candidate on the held-out rows, or the one that the lift gate names
    (rival_named); rivals: means of those that were compared; rival_counted: the rival's, with half a right and half a
    wrong answer more, from which lifts are. complete: whether a larger budget would measure no more.
    within: seconds of the training's budget, None where it has epochs. currency: of all money, None without prices.
    score, lift: as the test rows will measure them. curve: the expected score by rows. Without an untuned candidate,
    lift, decision, likely, needed and pays are None.
    """

    forecast: str
    name: str
    metric: str
    rows: int
    held: dict[str, int]
    test: int
    budget: float
    seconds: float
    confidence: float
    decision: Literal["train", "don't", "undecided"] | None
    likely: float | None
    goal: float
    rival: str | None
    rival_named: bool
    rivals: dict[str, float]
    rival_counted: float | None = None
    complete: bool = False
    within: float | None = None
    currency: str | None = None
    subsets: tuple[SubsetScore, ...]
    score: Expected
    lift: Expected | None
    needed: Needed | None
    curve: tuple[CurvePoint, ...]
    training: ExpectedTraining
    pays: Pays | None
    headline: str
    reasons: tuple[str, ...]


def forecast(
    project: Project,
    name: str | None = None,
    *,
    budget: float | None = None,
    goal: float | None = None,
    days: float = 30.0,
    progress: Progress = SILENT,
    actor: str | None = None,
) -> Forecast:
    """Forecast a candidate's training, by default that of the only one that is trained.

    budget: seconds; by default a tenth of the training's budget. goal: the lift from which tuning pays, by default the
    lift gate's bound. days: in which lower running costs have to repay the training.
    """
    context, name = PipelineContext(project, progress, actor), name or only_tuned(project)
    train = context.settings_of(name).train
    if budget is None:
        budget = SHARE * train.budget if train is not None and train.budget is not None else _WITHOUT_BUDGET
    return forecast_view(project.store, run_forecast(context, name, budget=budget, goal=goal, days=days))


def forecast_view(store: Store, digest: str) -> Forecast:
    """A recorded forecast."""
    body: dict[str, Any] = dict(store.record(digest, kind="forecast").body)
    return Forecast(forecast=digest, **body, headline=headline(body), reasons=tuple(reasons(body)))


class KeptForecast(View):
    """A forecast that was made before. at: when, ISO 8601."""

    at: str
    forecast: Forecast


def newest_forecast(project: Project) -> KeptForecast | None:
    """The newest forecast of a candidate that this project trains; None where there is none.

    A store may be shared with other projects: a forecast with rivals that this one does not have is another's.
    """
    known, trained = set(project.settings.candidates), set(tuned_names(project))
    for digest, at in project.store.dated_records("forecast", most=_LOOKED_AT):
        try:
            found = forecast_view(project.store, digest)
        except (Refused, UsageError):
            continue
        if found.name in trained and known >= set(found.rivals):
            return KeptForecast(at=at, forecast=found)
    return None


def forecast_page(found: Forecast, path: Path) -> None:
    """Write a forecast as one HTML page."""
    from tunesmith.evaluation.report.html import render_forecast

    write_atomic(path, render_forecast(found.document()).encode())
