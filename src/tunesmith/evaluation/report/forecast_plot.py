"""The chart of a forecast as inline SVG: the expected score by training rows, and what came of it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from markupsafe import Markup

from tunesmith.evaluation.report.plots import Scale, across, drawn, point, reach, text
from tunesmith.evaluation.report.wording import percent, visible

_HEIGHT = 300
_LABEL = 15  # pixels between two names


def forecast_chart(found: Mapping[str, Any], came: Mapping[str, Any] | None = None) -> Markup:
    """The forecast score (vertical) by training rows (horizontal, logarithmic), with its interval.

    Dots are the subsets as they were measured, lines across are the untuned candidate and the goal. came: what the
    evaluation measured after the training, {"mean", "low", "high"}.
    """
    curve = found["curve"]
    scale = Scale(math.log(curve[0]["rows"]), math.log(curve[-1]["rows"]))

    def at(rows: float) -> str:
        return scale.at(math.log(rows))

    parts = [across(_at(quarter / 4)) for quarter in range(5)]
    parts += [text("0", _at(quarter / 4) - 4, f"{quarter * 25}%") for quarter in range(5)]
    parts += [text(at(rows), _HEIGHT + 16, f"{rows:,}", anchor="middle") for rows in _ticks(curve)]
    parts.append(_band(curve, at))
    parts += _levels(found)
    parts += [point(at(each["rows"]), _at(each["mean"]), "held-out", 5) for each in found["subsets"]]
    parts += _marked(at(found["rows"]), found["score"], "median", "tuned", "forecast", -9)
    if came is not None:
        parts += _marked(at(found["rows"]), came, "mean", "came", "measured", 9)
    parts.append(text("100%", _HEIGHT + 34, "training rows, logarithmic", anchor="end"))
    said = f"{found['metric']} by training rows: " + "; ".join(
        f"{each['rows']} rows {percent(each['mean'])}" for each in found["subsets"]
    )
    return drawn(_HEIGHT + 40, "chart", said, parts)


def _at(score: float) -> float:
    return _HEIGHT * (1.0 - score)


def _band(curve: Sequence[Mapping[str, float]], at: Any) -> Markup:
    """The curve's interval as an area, and its middle as a line; stretched, so that text beside it is not."""

    def places(key: str, points: Sequence[Mapping[str, float]]) -> str:
        return " L".join(f"{10 * float(at(each['rows']).rstrip('%')):.1f} {_at(each[key]):.1f}" for each in points)

    area = f"M{places('low', curve)} L{places('high', curve[::-1])} Z"
    return Markup(
        '<svg width="100%" height="{0}" viewBox="0 0 1000 {0}" preserveAspectRatio="none">'
        '<path class="band" d="{1}"/><path class="smooth" d="M{2}"/></svg>'
    ).format(_HEIGHT, area, places("median", curve))


def _levels(found: Mapping[str, Any]) -> list[Markup]:
    """The rival's score and the goal, as lines across."""
    if found["rival"] is None:
        return []
    rival = found["rivals"][found["rival"]]
    goal = min(max(rival + found["goal"], 0.0), 1.0)
    parts = []
    for name, level in ((visible(found["rival"]), rival), ("goal", goal)):
        parts.append(Markup('<line class="bound" x1="0" x2="100%" y1="{0:.1f}" y2="{0:.1f}"/>').format(_at(level)))
        above = -5 if name == "goal" or abs(goal - rival) * _HEIGHT >= _LABEL else 14
        parts.append(text("60%" if name == "goal" else "4.5%", _at(level) + above, name, style="named"))
    return parts


def _marked(x: str, found: Mapping[str, Any], middle: str, style: str, name: str, shift: float) -> list[Markup]:
    """An interval at a number of rows, moved aside by some pixels so that two do not cover each other."""
    side = "end" if shift < 0 else "start"
    label = text(
        x, _at(found[middle]) - 10, f"{name} {percent(found[middle])}", anchor=side, style="named", shift=shift / 9 * 8
    )
    parts = [
        reach((x, x), (_at(found["low"]), _at(found["high"])), style),
        point(x, _at(found[middle]), style, 6),
        label,
    ]
    return [Markup('<g transform="translate({:g} 0)">{}</g>').format(shift / 2, Markup("").join(parts))]


def _ticks(curve: Sequence[Mapping[str, float]]) -> list[int]:
    """Round numbers of rows within the curve."""
    low, high = curve[0]["rows"], curve[-1]["rows"]
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    rounds = [step * 10**decade for decade in decades for step in (1, 2, 5)]
    return [tick for tick in rounds if low < tick < high]
