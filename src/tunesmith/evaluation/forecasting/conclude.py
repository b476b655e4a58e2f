"""From the scores of subsets to the forecast: the decision, what it takes to reach the goal, and what it costs."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from tunesmith.candidates.settings import TokenPrice
from tunesmith.core.errors import Inconclusive
from tunesmith.evaluation.forecasting.extrapolate import CONFIDENCE, Whole, extrapolate, worth
from tunesmith.evaluation.forecasting.plan import Answered, epochs_of
from tunesmith.evaluation.lines import is_number, is_share
from tunesmith.evaluation.prices import money_of
from tunesmith.evaluation.scores import SCORE_LINES, rounded
from tunesmith.evaluation.settings import PriceSettings
from tunesmith.evaluation.stats.learning_curve import Subsets
from tunesmith.evaluation.stats.statistics import Floats
from tunesmith.store.records import Record
from tunesmith.store.store import Store
from tunesmith.training.recipe import usual_epochs

LOSS = "loss of the expected answer"  # beside the metric's name in the scores; in nats


@dataclass(frozen=True, slots=True)
class Wanted:
    """What a forecast is asked. goal: the lift from which tuning pays; over: the untuned candidate that it is measured
    against, None for the best. days: in which savings have to repay the training. tokens: prices of endpoints."""

    goal: float
    over: str | None
    days: float
    prices: PriceSettings | None
    tokens: Mapping[str, TokenPrice]


def conclude(store: Store, curve: str, test_groups: Sequence[str], wanted: Wanted) -> dict[str, Any]:
    """The body of a forecast record. curve: digest. test_groups: of the rows that will measure the training."""
    record = store.record(curve, kind="curve")
    body, settings = record.body, record.body["settings"]

    def epochs(rows: float) -> float:
        if body["usual_epochs"] and rows != body["rows"]:  # not rounded, or more rows would seem worth less
            return usual_epochs(rows)
        return epochs_of(rows, seconds=body["row_seconds"], budget=settings["budget"], epochs=settings["epochs"])

    measured = _subsets(store, record, wanted.over)
    whole = Whole(body["rows"], epochs, test_groups)
    found = extrapolate(measured, whole, wanted.goal, body["seed"])
    untuned = {name: each for name, each in body["untuned"].items() if wanted.over in (None, name)}
    rivals = {name: each["mean"] for name, each in untuned.items()}
    rival = max(sorted(untuned), key=lambda name: _middle(untuned[name]), default=None)
    stated = {
        **{key: body[key] for key in ("name", "metric", "rows", "held", "test", "budget", "seconds")},
        "confidence": CONFIDENCE,
        "goal": wanted.goal,
        "rival": rival,
        "rival_named": wanted.over is not None,
        "rivals": rivals,
        "rival_counted": None if rival is None else rounded(_middle(untuned[rival])),
        "complete": body.get("complete", False),
        "within": settings["budget"],
        "currency": None if wanted.prices is None else wanted.prices.currency,
        "subsets": [{key: each[key] for key in ("rows", "epochs", "mean")} for each in body["subsets"]],
        **found,
        "training": _training(body, body["rows"], epochs(body["rows"]), wanted.prices),
        "pays": None if rival is None else _pays(body, rival, epochs(body["rows"]), wanted),
    }
    for end, rows in (found["needed"] or {}).items():
        if end in ("low", "median", "high") and rows is not None:
            stated["needed"][end] = {"rows": rows, **_training(body, rows, epochs(rows), wanted.prices)}
    return stated


def _middle(stated: Mapping[str, Any]) -> float:
    """The score of an untuned candidate, of which few answers say less than many."""
    asked, total = stated["asked"], stated["asked"] * stated["mean"]
    return Answered(asked, total, 0.0).middle


def _subsets(store: Store, record: Record, over: str | None) -> Subsets:
    """The scores and losses of a curve record. Raises Inconclusive where they are not those that it states."""
    body = record.body
    groups: dict[str, str] = {}
    rows: defaultdict[tuple[str, str], dict[str, float]] = defaultdict(dict)
    for place, line in SCORE_LINES.read(store, record):
        value, loss = line["value"], line["metric"] == LOSS
        if not (is_number(value) and value >= 0.0 if loss else is_share(value)):
            raise Inconclusive(f"{value!r} is no {'loss' if loss else 'number from 0 to 1'}", where=place)
        rows[line["candidate"], line["metric"]][line["id"]] = float(value)
        groups[line["id"]] = line["group"]
    # A few rows read three times may be worth more than a few more rows read once.
    trained = sorted(body["subsets"], key=lambda each: worth(each["rows"], each["epochs"]))
    subsets = [f"{each['rows']} rows" for each in trained]
    untuned = [name for name in body["untuned"] if over in (None, name)]
    ids = sorted(rows[subsets[0], LOSS])
    wanted = [(name, metric) for name in subsets for metric in (body["metric"], LOSS)]
    few = [rows[name, body["metric"]].keys() for name in untuned]
    if (
        not ids
        or not all(rows[key].keys() == set(ids) for key in wanted)
        or not all(one and one <= set(ids) for one in few)
    ):
        raise Inconclusive("the forecast's scores are not of the same rows for everyone", where="scores.jsonl")

    def columns(names: Sequence[str], metric: str) -> Floats:
        found = [[rows[name, metric].get(each, np.nan) for each in ids] for name in names]
        return np.array(found).T.reshape(len(ids), len(names))

    return Subsets(
        sizes=tuple(worth(each["rows"], each["epochs"]) for each in trained),
        losses=columns(subsets, LOSS),
        scores=columns(subsets, body["metric"]),
        untuned=columns(untuned, body["metric"]),
        groups=[groups[each] for each in ids],
    )


def _training(body: Mapping[str, Any], rows: float, epochs: float, prices: PriceSettings | None) -> dict[str, Any]:
    """{"seconds", "epochs", "money"} of a training on so many rows; money is None without a price.

    A budget holds the validations too. Without one, their answers take as long as those of the last subset's model.
    """
    seconds, settings = rows * epochs * body["row_seconds"], body["settings"]
    if settings["budget"] is None:
        answers = settings["validations"] * body.get("scored", 0)
        seconds += answers * body["subsets"][-1]["price"]["seconds_per_1000"] / 1000.0
    money = None if prices is None else rounded(seconds / 3600.0 * prices.machine_hour)
    return {"seconds": rounded(seconds), "epochs": rounded(epochs), "money": money}


def _pays(body: Mapping[str, Any], rival: str, epochs: float, wanted: Wanted) -> dict[str, Any]:
    """From how many requests a day lower running costs repay the training within `days`.

    {"unit": "money" or "seconds", "days", "training", "tuned_per_1000", "rival_per_1000", "requests_a_day"}. Seconds of
    this machine are compared where a price is missing; rival_per_1000 is None where they cannot be compared either, as
    with an endpoint or a server, which answer elsewhere. requests_a_day is None where a request costs no less than the
    rival's.
    """
    own, other = body["subsets"][-1]["price"], body["untuned"][rival]["price"]
    training = _training(body, body["rows"], epochs, wanted.prices)
    remote = rival in (*body["endpoints"], *body["on_server"])
    mine = money_of(own, wanted.prices, None, remote=False)
    theirs = money_of(other, wanted.prices, wanted.tokens.get(rival), remote=remote)
    unit, spent = "money", training["money"]
    if mine is None or theirs is None:
        unit, spent = "seconds", training["seconds"]
        mine, theirs = own["seconds_per_1000"], None if remote else other["seconds_per_1000"]
    found = {"unit": unit, "days": wanted.days, "training": spent, "tuned_per_1000": mine, "rival_per_1000": theirs}
    saved = 0.0 if theirs is None else rounded(theirs - mine)
    return {**found, "requests_a_day": rounded(spent / saved * 1000.0 / wanted.days) if saved > 0 else None}
