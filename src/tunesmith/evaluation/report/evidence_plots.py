"""Charts of price, lift by group, calibration, canary exposure and bias, as inline SVG like those of plots.py."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from markupsafe import Markup

from tunesmith.core.text.wording import money, visible
from tunesmith.evaluation.report.evidence import Bias, Exposure, ReportedCandidate
from tunesmith.evaluation.report.plots import Scale, across, drawn, point, reach, share_grid, text
from tunesmith.evaluation.report.risks import CHANCE_BITS
from tunesmith.records.evaluation import Calibration, MetricInterval

_HEIGHT = 300
_LABEL = 15  # pixels between two names
_BAR = 18
_BITS_HEIGHT = 220
_LEFT = 8.0  # percent of the width that the axis' numbers take
_APART = 2.2  # percent between before and after
_PAIR_HEIGHT = 40


def price_chart(candidates: Sequence[ReportedCandidate], metric: str, price: str, unit: str) -> Markup:
    """Quality (vertical) against the price of 1,000 requests (horizontal), with intervals.

    The price axis is logarithmic where prices differ widely. price: the key of the price; candidates without it are
    left out. unit: the name of the axis.
    """
    points = [row for row in candidates if getattr(row.price, price) is not None]
    if len(points) < 2:
        return Markup("")
    costs = [float(getattr(row.price, price)) for row in points]
    scale, logarithmic, ticks = _price_scale(costs)
    parts = share_grid(_HEIGHT)
    parts += [text(scale.at(_scaled(tick, logarithmic)), _HEIGHT + 16, money(tick), anchor="middle") for tick in ticks]
    taken: list[float] = []
    for row, cost in sorted(zip(points, costs, strict=True), key=lambda pair: -pair[0].metrics[metric].mean):
        found, x = row.metrics[metric], scale.at(_scaled(cost, logarithmic))
        style = "tuned" if row.tuned else "untuned"
        height = _at(found.mean)
        parts += [reach((x, x), (_at(found.low), _at(found.high)), style), point(x, height, style, 6)]
        away = _LABEL / 3 if height < _HEIGHT / 2 else -_LABEL / 3  # labels move away from the nearer edge
        height = min(height, _HEIGHT - _LABEL / 2)
        while any(abs(height - other) < _LABEL for other in taken):
            height += away
        taken.append(height)
        side, shift = ("end", -10) if float(x.rstrip("%")) > 72 else ("start", 10)
        parts.append(text(x, height + 4, visible(row.name), anchor=side, style="named", shift=shift))
    foot = f"{unit} per 1,000 requests{', logarithmic' if logarithmic else ''}"
    parts.append(text("100%", _HEIGHT + 34, foot, anchor="end"))
    said = "; ".join(
        f"{row.name} {row.metrics[metric].mean * 100:.1f}% at {money(cost)}"
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


def reliability_chart(found: Calibration, name: str) -> Markup:
    """Accuracy (vertical) against stated confidence (horizontal). Confidences on the diagonal are right."""
    size = 230.0
    parts = [across(size - size * quarter / 4) for quarter in range(5)]
    parts.append(Markup('<line class="bound" x1="0" x2="100%" y1="{0}" y2="0"/>').format(size))
    most = max(each.n for each in found.bins)
    for each in found.bins:
        parts.append(
            Markup(
                '<circle class="point tuned" cx="{:.2f}%" cy="{:.1f}" r="{:.1f}"><title>{} answers</title></circle>'
            ).format(100 * each.confidence, size - size * each.right, 3 + 7 * math.sqrt(each.n / most), each.n)
        )
    for share in (0.0, 0.5, 1.0):
        anchor = "start" if share == 0 else "end" if share == 1 else "middle"
        parts.append(text(f"{share:.0%}", size + 16, f"{share:.0%} sure", anchor=anchor))
    said = "; ".join(f"{each.confidence:.0%} sure, {each.right:.0%} right" for each in found.bins)
    return drawn(size + 22, "chart square", f"Calibration of {name}: {said}", parts)


def exposure_chart(found: Exposure) -> Markup:
    """Exposure in bits (vertical) by how often a canary was planted, before and after tuning, with intervals."""

    def height(bits: float) -> float:
        return _BITS_HEIGHT * (1.0 - bits / found.most)

    parts = []
    for bits in range(0, int(found.most) + 1, 2):
        parts.append(across(height(bits)))
        parts.append(text("0", height(bits) - 4, f"{bits} bits"))
    chance = height(CHANCE_BITS)
    parts.append(Markup('<line class="bound" x1="0" x2="100%" y1="{0:.1f}" y2="{0:.1f}"/>').format(chance))
    parts.append(text("100%", chance - 4, "chance", anchor="end"))
    levels, spoken = found.levels, []
    for place, level in enumerate(levels):
        middle = _LEFT + (100.0 - _LEFT) * (place + 0.5) / len(levels)
        for side, style, shift in ((level.before, "untuned", -_APART), (level.after, "tuned", _APART)):
            parts += _upright(side, middle + shift, height, style)
        name = f"planted {level.repeats}×"
        parts.append(_centred(middle, _BITS_HEIGHT + 16, f"{name} ({level.n})"))
        if level.after is None:
            parts.append(_centred(middle + _APART, _BITS_HEIGHT / 2, "too few to say"))
            spoken.append(f"{name} too few to say")
        else:
            spoken.append(f"{name} {level.after.mean:.1f} bits")
    label = f"Exposure of planted secrets: {', '.join(spoken)}; chance is {CHANCE_BITS:.1f}"
    return drawn(_BITS_HEIGHT + 24, "chart", label, parts)


def before_and_after(row: Bias) -> Markup:
    """One measure before tuning (upper line) and after it (lower line), on a scale between the measure's ends."""
    scale, neutral = Scale(*row.ends), 0.5 if row.probe == "crows_pairs" else 0.0
    zero = scale.at(neutral)
    parts = [Markup('<line class="bound" x1="{0}" x2="{0}" y1="2" y2="{1}"/>').format(zero, _PAIR_HEIGHT - 2)]
    for found, style, y in ((row.before, "untuned", 11.0), (row.after, "tuned", 29.0)):
        parts.append(reach((scale.at(found.low), scale.at(found.high)), (y, y), style))
        parts.append(point(scale.at(found.mean), y, style))
    return drawn(_PAIR_HEIGHT, "track", f"{row.asked}: {row.sentence}", parts)


def ends_axis(ends: Sequence[float]) -> Markup:
    """The two ends of a scale and its middle, in points."""
    (low, high), parts = ends, []
    form = "{:+.0f}" if low < 0 else "{:.0f}"
    for share, anchor in ((0.0, "start"), (0.5, "middle"), (1.0, "end")):
        value = (low + (high - low) * share) * 100
        number = form.format(value) if value else "0"
        parts.append(Markup('<text x="{:.0f}%" y="12" text-anchor="{}">{}</text>').format(share * 100, anchor, number))
    return drawn(16, "axis", "", parts)


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


def _upright(found: MetricInterval | None, x: float, height: Callable[[float], float], style: str) -> list[Markup]:
    if found is None:
        return []
    place = f"{x:.2f}%"
    ends = height(found.low), height(found.high)
    return [reach((place, place), ends, style), point(place, height(found.mean), style)]


def _centred(x: float, y: float, words: str) -> Markup:
    return text(f"{x:.2f}%", y, words, anchor="middle")
