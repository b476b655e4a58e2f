"""The report's charts as inline SVG: intervals, loss, and counts as a bar.

Positions are percentages, so that a chart stretches and its text does not. All functions escape their arguments.
Colours come from the style sheet, by class.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate

from markupsafe import Markup

from tunesmith.core.text.wording import visible
from tunesmith.evaluation.summary import GateResult
from tunesmith.records.training import TrainedStep, ValidationPoint

_TRACK_HEIGHT = 28
_CHART_HEIGHT = 220
_MOST_POINTS = 400


@dataclass(frozen=True, slots=True)
class Scale:
    """Values between low and high as percentages of the width."""

    low: float
    high: float

    def at(self, value: float) -> str:
        """The position of a value, such as `12.34%`; a value outside the scale is at its edge."""
        share = (value - self.low) / (self.high - self.low)
        return f"{100 * min(max(share, 0.0), 1.0):.2f}%"


def interval_track(mean: float, low: float, high: float, *, style: str, label: str) -> Markup:
    """A candidate's mean as a point on its interval, from 0 to 1. style: a class of the sheet (tuned, untuned)."""
    marks = [_line(f"{quarter * 25}%", 0, _TRACK_HEIGHT, "grid") for quarter in range(5)]
    return drawn(_TRACK_HEIGHT, "track", label, [*marks, *_interval(mean, low, high, Scale(0.0, 1.0), style)])


def gate_track(gate: GateResult) -> Markup:
    """A gate's interval and its bound; empty where nothing was measured."""
    if gate.value is None or gate.low is None or gate.high is None:
        return Markup("")
    reach = [gate.low, gate.high, gate.bound]
    if min(reach) >= 0.0 and max(reach) - min(reach) > 0.25:
        reach.append(0.0)
    margin = max((max(reach) - min(reach)) * 0.12, 0.004)
    scale = Scale(min(reach) - margin, max(reach) + margin)
    below = gate.settings.drop_at_most is not None or gate.settings.at_most is not None
    bound = scale.at(gate.bound)
    allowed = ("0", bound) if below else (bound, f"{100 - float(bound.rstrip('%')):.2f}%")
    parts = [
        Markup('<rect class="allowed" x="{}" y="3" width="{}" height="22"/>').format(*allowed),
        _line(bound, 1, _TRACK_HEIGHT - 1, "bound"),
        *_interval(gate.value, gate.low, gate.high, scale, gate.outcome),
    ]
    label = f"{gate.name}: {gate.low:.3f} to {gate.high:.3f}, bound {gate.bound:.3f}"
    return drawn(_TRACK_HEIGHT, "track", label, parts)


def loss_chart(curve: Sequence[TrainedStep], validation: Sequence[ValidationPoint], kept: int | None = None) -> Markup:
    """Training and validation loss by step; a logarithmic axis where the loss falls more than tenfold.

    kept: the step whose weights were kept, marked where it is known.
    """
    training = [(float(p.step), p.loss) for p in curve if p.loss > 0 and math.isfinite(p.loss)]
    held_out = [(float(p.step), p.loss) for p in validation if p.loss > 0 and math.isfinite(p.loss)]
    if len(training) < 2:
        return Markup("")
    losses = [loss for _, loss in training + held_out]
    last = max(step for step, _ in training + held_out)
    logarithmic = max(losses) > 10 * min(losses)
    ticks = _loss_ticks(min(losses), max(losses), logarithmic)

    def height(loss: float) -> float:
        scaled = [math.log(v) if logarithmic else v for v in (loss, ticks[0], ticks[-1])]
        return _CHART_HEIGHT * (1.0 - (scaled[0] - scaled[1]) / (scaled[2] - scaled[1]))

    grid = [mark for tick in ticks for mark in (across(height(tick)), text("0", height(tick) - 4, f"{tick:g}"))]
    lines = {"raw": _thinned(training), "smooth": _thinned(_smoothed(training)), "held-out": held_out}
    axis_note = ", logarithmic loss axis" if logarithmic else ""
    parts = _curves(lines, last, height) + _foot("step 0", f"step {last:,.0f}{axis_note}")
    label = f"Loss by training step, from {training[0][1]:.3g} to {training[-1][1]:.3g}"
    if held_out:
        label += f"; held-out validation from {held_out[0][1]:.3g} to {held_out[-1][1]:.3g}"
    if kept is not None and 0 < kept <= last:
        parts += _kept_mark(kept, 100 * kept / last)
        label += f"; the weights of step {kept} were kept"
    return drawn(_CHART_HEIGHT + 24, "chart", label, [*grid, *parts])


def score_chart(curve: Sequence[TrainedStep], validation: Sequence[ValidationPoint], kept: int | None = None) -> Markup:
    """The score of generated answers to validation rows, from 0 to 100%, by seconds of training; empty where answers
    were not scored. kept: the step whose weights were kept, marked where it is known."""
    seconds = [0.0, *accumulate(point.seconds for point in curve)]
    places = [(seconds[p.step], p.score) for p in validation if p.score is not None and p.step < len(seconds)]
    if len(places) < 2:
        return Markup("")
    last = seconds[-1]
    parts = share_grid(_CHART_HEIGHT)
    parts += _curves({"held-out": places}, last, lambda score: _CHART_HEIGHT * (1 - score))
    parts += _foot("0 min", f"{last / 60:.1f} min")
    label = f"Validation score by minutes of training, from {places[0][1]:.1%} to {places[-1][1]:.1%}"
    if kept is not None and 0 < kept < len(seconds):
        parts += _kept_mark(kept, 100 * seconds[kept] / last)
    return drawn(_CHART_HEIGHT + 24, "chart", label, parts)


def _curves(
    lines: Mapping[str, Sequence[tuple[float, float]]], last: float, height: Callable[[float], float]
) -> list[Markup]:
    """Lines by class over steps or seconds. Held-out points are dots, too."""
    paths = [
        Markup('<path class="{}" d="M{}"/>').format(
            style, " L".join(f"{1000 * at / last:.1f} {height(value):.1f}" for at, value in points)
        )
        for style, points in lines.items()
        if len(points) > 1
    ]
    dots = [
        Markup('<circle class="held-out" cx="{:.2f}%" cy="{:.1f}" r="4"/>').format(100 * at / last, height(value))
        for at, value in lines["held-out"]
    ]
    return [stretched(_CHART_HEIGHT, paths), *dots]


def _foot(first: str, last: str) -> list[Markup]:
    return [text("0", _CHART_HEIGHT + 18, first), text("100%", _CHART_HEIGHT + 18, last, anchor="end")]


def _kept_mark(kept: int, place: float) -> list[Markup]:
    """A line at a place, in percent, that names the step whose weights were kept."""
    x = f"{place:.2f}%"
    side, shift = ("end", -6) if place > 50 else ("start", 6)
    label = text(x, 12, f"kept: step {kept:,}", anchor=side, style="named", shift=shift)
    return [_line(x, 0, _CHART_HEIGHT, "bound"), label]


def stacked_bar(parts: Sequence[tuple[str, int]]) -> Markup:
    """Counts as shares of one bar, in order; each part has the class part-0, part-1, ..."""
    total = sum(count for _, count in parts)
    if total == 0:
        return Markup("")
    rectangles, start = [], 0.0
    for index, (name, count) in enumerate(parts):
        width = 100.0 * count / total
        rectangles.append(
            Markup(
                '<rect class="part-{}" x="{:.3f}%" y="0" width="{:.3f}%" height="18"><title>{}: {:,}</title></rect>'
            ).format(index, start, width, visible(name), count)
        )
        start += width
    return drawn(18, "stack", ", ".join(f"{name} {count}" for name, count in parts), rectangles)


def drawn(height: float, style: str, label: str, parts: Sequence[Markup]) -> Markup:
    """A chart as wide as the page. label: its description for screen readers; style: its class."""
    spoken = Markup('role="img" aria-label="{}"').format(visible(label)) if label else Markup('aria-hidden="true"')
    return Markup('<svg class="{}" width="100%" height="{:g}" {}>{}</svg>').format(
        style, height, spoken, Markup("").join(parts)
    )


def stretched(height: float, paths: Sequence[Markup]) -> Markup:
    """Paths whose horizontal places are thousandths of the chart's width."""
    return Markup('<svg width="100%" height="{0}" viewBox="0 0 1000 {0}" preserveAspectRatio="none">{1}</svg>').format(
        height, Markup("").join(paths)
    )


def share_grid(height: float) -> list[Markup]:
    """Lines across a chart of shares, with 0% to 100% at their left ends."""
    places = [(height * (1 - quarter / 4), f"{quarter * 25}%") for quarter in range(5)]
    return [mark for y, share in places for mark in (across(y), text("0", y - 4, share))]


def _line(x: str, top: float, bottom: float, style: str) -> Markup:
    return Markup('<line class="{}" x1="{}" x2="{}" y1="{:g}" y2="{:g}"/>').format(style, x, x, top, bottom)


def text(x: str, y: float, words: str, *, anchor: str = "start", style: str = "tick", shift: float = 0) -> Markup:
    """Words at a place. x: a percentage; y: pixels from the top; shift: pixels to the right of x."""
    return Markup('<text class="{}" x="{}" y="{:.1f}" dx="{:g}" text-anchor="{}">{}</text>').format(
        style, x, y, shift, anchor, words
    )


def point(x: str, y: float, style: str, radius: float = 5.5) -> Markup:
    """A measured value as a dot."""
    return Markup('<circle class="point {}" cx="{}" cy="{:.1f}" r="{:.1f}"/>').format(style, x, y, radius)


def reach(x: tuple[str, str], y: tuple[float, float], style: str) -> Markup:
    """A line from one end of an interval to the other."""
    return Markup('<line class="reach {}" x1="{}" x2="{}" y1="{:.1f}" y2="{:.1f}"/>').format(style, *x, *y)


def across(y: float) -> Markup:
    """A horizontal grid line at a height."""
    return Markup('<line class="grid" x1="0" x2="100%" y1="{0:.1f}" y2="{0:.1f}"/>').format(y)


def _interval(mean: float, low: float, high: float, scale: Scale, style: str) -> list[Markup]:
    middle = _TRACK_HEIGHT / 2
    return [
        reach((scale.at(low), scale.at(high)), (middle, middle), style),
        _line(scale.at(low), middle - 5, middle + 5, f"reach {style}"),
        _line(scale.at(high), middle - 5, middle + 5, f"reach {style}"),
        point(scale.at(mean), middle, style),
    ]


def _loss_ticks(low: float, high: float, logarithmic: bool) -> list[float]:
    """Round numbers that enclose the losses, at most about seven."""
    if logarithmic:
        decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 2)
        rounds = [step * 10.0**decade for decade in decades for step in (1, 2, 5)]
    else:
        step = 10.0 ** math.floor(math.log10(high))
        step = next(size for size in (step / 5, step / 2, step, 2 * step) if high / size <= 6)
        rounds = [step * index for index in range(math.ceil(high / step) + 2)]
    inside = [tick for tick in rounds if low < tick < high]
    below, above = max(t for t in rounds if t <= low), min(t for t in rounds if t > high)
    return [below, *inside, above]


def _smoothed(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """A running mean over a fiftieth of the steps either side."""
    reach = max(1, len(points) // 50)
    smooth = []
    for index, (step, _) in enumerate(points):
        near = [loss for _, loss in points[max(0, index - reach) : index + reach + 1]]
        smooth.append((step, sum(near) / len(near)))
    return smooth


def _thinned(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    every = max(1, math.ceil(len(points) / _MOST_POINTS))
    return [*points[:-1:every], points[-1]]
