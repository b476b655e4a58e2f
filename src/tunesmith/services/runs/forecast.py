"""Forecast a training from a learning curve: what it will give, whether it pays, and what it costs."""

from __future__ import annotations

from tunesmith.core.errors import Refused, UsageError
from tunesmith.core.progress import SILENT, Progress
from tunesmith.core.view import View
from tunesmith.evaluation.learning_curve import Forecast
from tunesmith.pipeline.context import PipelineContext
from tunesmith.pipeline.forecast import forecast as run_forecast
from tunesmith.pipeline.training import tuned_names
from tunesmith.project import Project
from tunesmith.services.runs.training import only_tuned
from tunesmith.store.store import Store

_LOOKED_AT = 50  # newest forecasts that are looked through for a project's


class ForecastView(Forecast):
    """A recorded forecast. forecast: its record's digest."""

    forecast: str


def forecast(
    project: Project,
    name: str | None = None,
    *,
    rows: int | None = None,
    goal: float | None = None,
    progress: Progress = SILENT,
    actor: str | None = None,
) -> ForecastView:
    """Forecast a candidate's training, by default that of the only one that is trained.

    rows: of the largest subset, by default a sixteenth of the rows and 100 at least. goal: the lift from which tuning
    pays, by default the lift gate's bound.
    """
    context, name = PipelineContext(project, progress, actor), name or only_tuned(project)
    return forecast_view(project.store, run_forecast(context, name, rows=rows, goal=goal))


def forecast_view(store: Store, digest: str) -> ForecastView:
    """A recorded forecast. Of one that an earlier version made, what is still computed."""
    body = store.record(digest, kind="forecast").body
    known = {key: value for key, value in body.items() if key in Forecast.model_fields}
    return ForecastView.model_validate({**known, "forecast": digest})


class KeptForecast(View):
    """A forecast that was made before. at: when, ISO 8601."""

    at: str
    forecast: ForecastView


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
