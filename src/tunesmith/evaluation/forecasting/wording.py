"""Says a forecast in sentences. Each rests on numbers that the forecast states."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from tunesmith.evaluation.report.wording import duration, money, percent, points

_VISIBLE = 0.002  # of a difference between shares


def headline(found: Mapping[str, Any]) -> str:
    """The decision in one sentence."""
    name, goal = found["name"], f"the goal, a lift of at least {points(found['goal'])} points"
    if found["decision"] is None:
        return f"No decision on {name}: there is no untuned candidate to compare it with."
    return {
        "train": f"Train {name}: it is likely to reach {goal}.",
        "don't": f"Don't train {name} on these rows: it is unlikely to reach {goal}.",
        "undecided": f"Undecided: {name} may reach {goal}, or not.",
    }[found["decision"]]


def reasons(found: Mapping[str, Any]) -> list[str]:
    """Why, what it takes, and what it costs: one sentence each."""
    score, level = found["score"], f"{found['confidence']:.0%}"
    said = [
        f"With all {found['rows']:,} training rows, {found['metric']} on the test rows will be about "
        f"{percent(score['median'])} ({level} interval {percent(score['low'])} to {percent(score['high'])})."
    ]
    if found["lift"] is not None:
        lift = found["lift"]
        who = "which the lift gate names" if found["rival_named"] else "the best untuned candidate on the held-out rows"
        said.append(
            f"That is a lift of {points(lift['median'])} points ({level} interval {points(lift['low'])} to "
            f"{points(lift['high'])}) over {found['rival']}, {who} ({_rival(found)})."
        )
        said.append(f"A lift of at least {points(found['goal'])} points is {percent(found['likely'])} likely.")
        said.append(_needed(found))
    said.append(_training(found))
    if found["pays"] is not None:
        said.append(_pays(found["pays"], found))
    if found["decision"] == "undecided":
        further = "trains larger subsets and asks more rows, which narrows it"
        if found.get("complete"):
            further = "does not narrow it: train, or collect more rows"
        said.append(f"This forecast took {duration(found['seconds'])}. A larger budget (--budget) {further}.")
    return said


def _rival(found: Mapping[str, Any]) -> str:
    """The rival's score, and what the lift is over where that is visibly another one, as after few answers."""
    mean, counted = found["rivals"][found["rival"]], found.get("rival_counted")
    if counted is None or abs(counted - mean) < _VISIBLE:
        return percent(mean)
    return f"{percent(mean)}, counted as {percent(counted)}: with half a right and half a wrong answer more"


def _needed(found: Mapping[str, Any]) -> str:
    needed, goal = found["needed"], f"A lift of {points(found['goal'])} points"
    budget = found.get("within")
    within = "" if budget is None else f" within a training of {duration(budget)}"
    low, middle, high = (needed[name] and needed[name]["rows"] for name in ("low", "median", "high"))
    least = found["subsets"][0]["rows"]  # nothing was measured with fewer
    if middle is None:
        most = f"; at best it takes {low:,}{' or fewer' if low <= least else ''}" if low else ""
        never = f"with {percent(needed['never'])} probability"
        return f"{goal} is out of reach of more rows of this kind{within} {never}{most}."
    upper = f"{high:,}" if high is not None else f"no number of rows{within} ({percent(needed['never'])} likely)"
    about = "at most" if middle <= least else "about"
    lower = f"at most {low:,}" if low <= least else f"{low:,}"
    more = max(0, middle - found["rows"])
    further = f", {more:,} more than the training has" if more else ""
    return (
        f"{goal} takes {about} {middle:,} rows ({found['confidence']:.0%} interval {lower} to {upper}){further}. "
        f"Training on {middle:,} rows takes {_cost(needed['median'], found)}."
    )


def _training(found: Mapping[str, Any]) -> str:
    training, about = found["training"], "" if found.get("within") is None else "about "
    return f"Training on all rows takes about {_cost(training, found)}: {about}{training['epochs']:.1f} epochs."


def _cost(training: Mapping[str, Any], found: Mapping[str, Any]) -> str:
    price = "" if training["money"] is None else f" and {_amount(training['money'], found)}"
    return f"{duration(training['seconds'])}{price}"


def _amount(amount: float, found: Mapping[str, Any]) -> str:
    """Money with its currency, which earlier forecasts do not state."""
    return f"{money(amount)} {found.get('currency') or ''}".rstrip()


def _pays(pays: Mapping[str, Any], found: Mapping[str, Any]) -> str:
    name, rival = found["name"], found["rival"]
    if pays["rival_per_1000"] is None:
        return (
            f"What 1,000 requests cost with {name} and with {rival} cannot be compared, so nothing says when the "
            "training is repaid."
        )
    own, other = (
        _amount(pays[key], found) if pays["unit"] == "money" else duration(pays[key])
        for key in ("tuned_per_1000", "rival_per_1000")
    )
    each = f"1,000 requests cost {own}, with {rival} {other}"
    if not pays["training"]:
        return f"{each}. The training costs nothing, so nothing has to be repaid."
    if pays["requests_a_day"] is None:
        return f"{each}: lower running costs never repay the training."
    least = max(1, math.ceil(round(pays["requests_a_day"], 6)))
    return (
        f"{each}: lower running costs repay the training within {pays['days']:g} days from "
        f"{least:,} request{'s' if least > 1 else ''} a day on."
    )
