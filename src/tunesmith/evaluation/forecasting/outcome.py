"""A forecast next to what the evaluation measured after the training."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tunesmith.candidates.candidate import Candidate
from tunesmith.evaluation.forecasting.wording import headline, reasons
from tunesmith.evaluation.report.wording import percent, points
from tunesmith.evaluation.scores import rounded
from tunesmith.store.store import Store

_TIMING = "checkpoint_seconds"  # a setting that no result depends on


def find_forecast(
    store: Store, dataset: str, candidate: Candidate, settings: Mapping[str, Any]
) -> dict[str, Any] | None:
    """The newest forecast of a candidate on a dataset version with these training settings; None without one.

    That is the newest that was made before the candidate's training, and only where there is none, the newest of all
    (before_training: false). One with another base, prompt or rule for answers is another candidate's.
    """
    untrained = candidate.untrained_digest
    trained = None if candidate.training is None else store.made_at(candidate.training)
    wanted = {key: value for key, value in settings.items() if key != _TIMING}
    late: dict[str, Any] | None = None
    for digest, at in store.dated_records("forecast"):
        record = store.record(digest, kind="forecast")
        curve = store.record(record.parents["curve"], kind="curve")
        stated = {key: value for key, value in curve.body["settings"].items() if key != _TIMING}
        if curve.parents["dataset"] == dataset and curve.body.get("tuned") == untrained and stated == wanted:
            body = dict(record.body)
            found = {"forecast": digest, **body, "headline": headline(body), "reasons": reasons(body)}
            if trained is not None and at < trained:
                return {**found, "before_training": True}
            late = late or {**found, "before_training": False}
    return late


def outcome(
    forecast: Mapping[str, Any],
    score: Mapping[str, float],
    over: str | None,
    lift: Mapping[str, float] | None,
    seconds: float,
) -> dict[str, Any]:
    """What came of a forecast: each error is what was measured minus the middle of the forecast.

    score: measured on the test rows; over, lift: the forecast's rival and the lift over it, None where it was not
    measured. seconds: of the training. {"score", "score_error", "score_inside", "over", "lift", "lift_error",
    "lift_inside", "right", "seconds", "seconds_error", "sentences"}; right: whether the decision was, None where there
    was none.
    """
    found: dict[str, Any] = {**_compared("score", forecast["score"], score)}
    found |= {"over": over, **_compared("lift", forecast["lift"], lift)}
    pays = None if lift is None else lift["mean"] >= forecast["goal"]
    decided = {"train": True, "don't": False}.get(forecast["decision"] or "")
    found["right"] = None if pays is None or decided is None else decided == pays
    found |= {"seconds": rounded(seconds), "seconds_error": rounded(seconds - forecast["training"]["seconds"])}
    return {**found, "sentences": _sentences(forecast, found)}


def _compared(what: str, forecast: Mapping[str, float] | None, came: Mapping[str, float] | None) -> dict[str, Any]:
    found: dict[str, Any] = {what: None if came is None else dict(came), f"{what}_error": None, f"{what}_inside": None}
    if forecast is None or came is None:
        return found
    inside = forecast["low"] <= came["mean"] <= forecast["high"]
    return {**found, f"{what}_error": rounded(came["mean"] - forecast["median"]), f"{what}_inside": inside}


def _sentences(forecast: Mapping[str, Any], found: Mapping[str, Any]) -> list[str]:
    where = {True: "within", False: "outside"}
    said = [
        f"After it: {forecast['metric']} is {percent(found['score']['mean'])}, {points(found['score_error'])} points "
        f"from the forecast and {where[found['score_inside']]} its interval."
    ]
    if found["lift_error"] is not None:
        said.append(
            f"The lift over {found['over']} is {points(found['lift']['mean'])} points, {points(found['lift_error'])} "
            f"from the forecast and {where[found['lift_inside']]} its interval."
        )
    if found["right"] is not None:
        said.append("The decision was right." if found["right"] else "The decision was wrong.")
    return said
