"""Charts of price against quality, lift by group, and calibration, as inline SVG like those of plots.py."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from markupsafe import Markup

from tunesmith.evaluation.report.plots import Scale, across, drawn, point, reach, text
from tunesmith.evaluation.report.wording import money, visible

_HEIGHT = 300
_LABEL = 15  # pixels between two names
_BAR = 18


def price_chart(candidates: Sequence[Mapping[str, Any]], metric: str, price: str, unit: str) -> Markup:
    """Quality (vertical) against the price of 1,000 requests (horizontal), with intervals.

    The price axis is logarithmic where prices differ widely. price: the key of the price; candidates without it are
    left out. unit: the name of the axis.
    """
    points = [row for row in candidates if row["price"].get(price) is not None]
    if len(points) < 2:
        return Markup("")
    costs = [float(row["price"][price]) for row in points]
    scale, logarithmic, ticks = _price_scale(costs)
    parts = [across(_at(quarter / 4)) for quarter in range(5)]
    parts += [text("0", _at(quarter / 4) - 4, f"{quarter * 25}%") for quarter in range(5)]
    parts += [text(scale.at(_scaled(tick, logarithmic)), _HEIGHT + 16, money(tick), anchor="middle") for tick in ticks]
    taken: list[float] = []
    for row, cost in sorted(zip(points, costs, strict=True), key=lambda pair: -pair[0]["metrics"][metric]["mean"]):
        found, x = row["metrics"][metric], scale.at(_scaled(cost, logarithmic))
        style = "tuned" if row["tuned"] else "untuned"
        height = _at(found["mean"])
        parts += [reach((x, x), (_at(found["low"]), _at(found["high"])), style), point(x, height, style, 6)]
        away = _LABEL / 3 if height < _HEIGHT / 2 else -_LABEL / 3  # labels move away from the nearer edge
        height = min(height, _HEIGHT - _LABEL / 2)
        while any(abs(height - other) < _LABEL for other in taken):
            height += away
        taken.append(height)
        side, shift = ("end", -10) if float(x.rstrip("%")) > 72 else ("start", 10)
        parts.append(text(x, height + 4, visible(row["name"]), anchor=side, style="named", shift=shift))
    foot = f"{unit} per 1,000 requests{', logarithmic' if logarithmic else ''}"
    parts.append(text("100%", _HEIGHT + 34, foot, anchor="end"))
    said = "; ".join(
        f"{row['name']} {row['metrics'][metric]['mean'] * 100:.1f}% at {money(cost)}"
        for row, cost in zip(points, costs, strict=True)
    )
    return drawn(_HEIGHT + 40, "chart", f"{metric} against {foot}: {said}", parts)


def difference_bar(difference: float) -> Markup:
    """A group's difference (-1 to 1) as a bar from the middle."""
    middle, width = 50.0, abs(difference) * 50.0
    start = middle if difference >= 0 else middle - width
    parts = [
        Markup('<rect class="{}" x="{:.2f}%" y="3" width="{:.2f}%" height="{}"/>').format(
            "better" if difference >= 0 else "worse", start, width, _BAR - 6
        ),
        Markup('<line class="bound" x1="50%" x2="50%" y1="0" y2="{}"/>').format(_BAR),
    ]
    return drawn(_BAR, "track", f"{difference * 100:+.0f} points", parts)


def reliability_chart(found: Mapping[str, Any], name: str) -> Markup:
    """Accuracy (vertical) against stated confidence (horizontal). Confidences on the diagonal are right."""
    size = 230.0
    parts = [across(size - size * quarter / 4) for quarter in range(5)]
    parts.append(Markup('<line class="bound" x1="0" x2="100%" y1="{0}" y2="0"/>').format(size))
    most = max(each["n"] for each in found["bins"])
    for each in found["bins"]:
        parts.append(
            Markup(
                '<circle class="point tuned" cx="{:.2f}%" cy="{:.1f}" r="{:.1f}"><title>{} answers</title></circle>'
            ).format(
                100 * each["confidence"], size - size * each["right"], 3 + 7 * math.sqrt(each["n"] / most), each["n"]
            )
        )
    for share in (0.0, 0.5, 1.0):
        anchor = "start" if share == 0 else "end" if share == 1 else "middle"
        parts.append(text(f"{share:.0%}", size + 16, f"{share:.0%} sure", anchor=anchor))
    said = "; ".join(f"{each['confidence']:.0%} sure, {each['right']:.0%} right" for each in found["bins"])
    return drawn(size + 22, "chart square", f"Calibration of {name}: {said}", parts)


def _at(share: float) -> float:
    return _HEIGHT * (1.0 - share)


def _scaled(cost: float, logarithmic: bool) -> float:
    return math.log10(max(cost, 1e-12)) if logarithmic else cost


def _price_scale(costs: Sequence[float]) -> tuple[Scale, bool, list[float]]:
    """The axis, whether it is logarithmic, and its ticks. A price of 0 is at its left end."""
    paid = [cost for cost in costs if cost > 0]
    if not paid or max(paid) / min(paid) < 8:
        top = max([*costs, 1e-9]) * 1.08
        return Scale(-0.05 * top, top), False, _round_ticks(top)
    low, high = math.log10(min(paid)) - 0.4, math.log10(max(paid)) + 0.15
    decades = range(math.floor(low), math.ceil(high) + 1)
    rounds = [step * 10.0**decade for decade in decades for step in (1, 3)]
    return Scale(low, high), True, [tick for tick in rounds if low < math.log10(tick) < high]


def _round_ticks(top: float) -> list[float]:
    """Three to seven multiples of a round step, above 0 and up to the top."""
    decade = 10.0 ** math.floor(math.log10(top / 3.0))
    step = max(size for size in (decade, 2.0 * decade, 5.0 * decade) if size <= top / 3.0)
    return [step * times for times in range(1, math.floor(top / step) + 1)]
