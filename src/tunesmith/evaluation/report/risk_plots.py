"""Charts of canary exposure, and of bias before and after tuning, as inline SVG like those of plots.py."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from markupsafe import Markup

from tunesmith.evaluation.report.plots import Scale, across, drawn, point, reach, text
from tunesmith.evaluation.report.risks import CHANCE_BITS

_HEIGHT = 220
_LEFT = 8.0  # percent of the width that the axis' numbers take
_APART = 2.2  # percent between before and after
_PAIR_HEIGHT = 40


def exposure_chart(found: Mapping[str, Any]) -> Markup:
    """Exposure in bits (vertical) by how often a canary was planted, before and after tuning, with intervals."""
    most = float(found["most"])

    def height(bits: float) -> float:
        return _HEIGHT * (1.0 - bits / most)

    parts = []
    for bits in range(0, int(most) + 1, 2):
        parts.append(across(height(bits)))
        parts.append(text("0", height(bits) - 4, f"{bits} bits"))
    chance = height(CHANCE_BITS)
    parts.append(Markup('<line class="bound" x1="0" x2="100%" y1="{0:.1f}" y2="{0:.1f}"/>').format(chance))
    parts.append(text("100%", chance - 4, "chance", anchor="end"))
    levels, spoken = found["levels"], []
    for place, level in enumerate(levels):
        middle = _LEFT + (100.0 - _LEFT) * (place + 0.5) / len(levels)
        for side, style, shift in (("before", "untuned", -_APART), ("after", "tuned", _APART)):
            parts += _upright(level[side], middle + shift, height, style)
        name = f"planted {level['repeats']}×"
        parts.append(_centred(middle, _HEIGHT + 16, f"{name} ({level['n']})"))
        if level["after"] is None:
            parts.append(_centred(middle + _APART, _HEIGHT / 2, "too few to say"))
            spoken.append(f"{name} too few to say")
        else:
            spoken.append(f"{name} {level['after']['mean']:.1f} bits")
    label = f"Exposure of planted secrets: {', '.join(spoken)}; chance is {CHANCE_BITS:.1f}"
    return drawn(_HEIGHT + 24, "chart", label, parts)


def before_and_after(row: Mapping[str, Any]) -> Markup:
    """One measure before tuning (upper line) and after it (lower line), on a scale between the measure's ends."""
    scale, neutral = Scale(*row["ends"]), 0.5 if row["probe"] == "crows_pairs" else 0.0
    zero = scale.at(neutral)
    parts = [Markup('<line class="bound" x1="{0}" x2="{0}" y1="2" y2="{1}"/>').format(zero, _PAIR_HEIGHT - 2)]
    for side, style, y in (("before", "untuned", 11.0), ("after", "tuned", 29.0)):
        found = row[side]
        parts.append(reach((scale.at(found["low"]), scale.at(found["high"])), (y, y), style))
        parts.append(point(scale.at(found["mean"]), y, style))
    return drawn(_PAIR_HEIGHT, "track", f"{row['asked']}: {row['sentence']}", parts)


def ends_axis(ends: Sequence[float]) -> Markup:
    """The two ends of a scale and its middle, in points."""
    (low, high), parts = ends, []
    form = "{:+.0f}" if low < 0 else "{:.0f}"
    for share, anchor in ((0.0, "start"), (0.5, "middle"), (1.0, "end")):
        value = (low + (high - low) * share) * 100
        number = form.format(value) if value else "0"
        parts.append(Markup('<text x="{:.0f}%" y="12" text-anchor="{}">{}</text>').format(share * 100, anchor, number))
    return drawn(16, "axis", "", parts)


def _upright(found: Mapping[str, float] | None, x: float, height: Callable[[float], float], style: str) -> list[Markup]:
    if found is None:
        return []
    place = f"{x:.2f}%"
    ends = height(found["low"]), height(found["high"])
    return [reach((place, place), ends, style), point(place, height(found["mean"]), style)]


def _centred(x: float, y: float, words: str) -> Markup:
    return text(f"{x:.2f}%", y, words, anchor="middle")
