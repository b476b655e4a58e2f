"""What the report's charts of loss, scores and prices draw; page/charts.html.jinja draws it.

Horizontal places are percentages of the chart's width, vertical ones pixels from the top.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from itertools import accumulate
from typing import NamedTuple

from tunesmith.core.text.wording import money
from tunesmith.evaluation.report.evidence import ReportedCandidate
from tunesmith.records.training import TrainedStep, ValidationPoint

HEIGHT, _TALL = 220, 300
_MOST_POINTS = 400
_LABEL = 15  # pixels between two names
_SHARES = [(quarter / 4, f"{quarter * 25}%") for quarter in range(5)]


class Curves(NamedTuple):
    """Curves over steps or time. label: for screen readers. grid: lines across, with the words at their left ends.

    paths: class -> a path whose horizontal places are thousandths of the width. dots: held-out points. foot: the words
    at both ends. kept: the step whose weights were kept, and its place.
    """

    label: str
    grid: list[tuple[float, str]]
    paths: dict[str, str]
    dots: list[tuple[float, float]]
    foot: tuple[str, str]
    kept: tuple[int, float] | None


class PricePoint(NamedTuple):
    """A candidate in the chart of prices. low, mean, high: heights; named: the height of its name."""

    name: str
    tuned: bool
    x: float
    low: float
    mean: float
    high: float
    named: float


class Prices(NamedTuple):
    """Quality against prices. height: of the axis. ticks: place and words on it; foot: what it shows."""

    label: str
    height: int
    grid: list[tuple[float, str]]
    ticks: list[tuple[float, str]]
    points: list[PricePoint]
    foot: str


def loss_chart(
    curve: Sequence[TrainedStep], validation: Sequence[ValidationPoint], kept: int | None = None
) -> Curves | None:
    """Training and validation loss by step; a logarithmic axis where the loss falls more than tenfold.

    kept: the step whose weights were kept, where it is known. None for under two losses.
    """
    training = [(float(p.step), p.loss) for p in curve if p.loss > 0 and math.isfinite(p.loss)]
    held_out = [(float(p.step), p.loss) for p in validation if p.loss > 0 and math.isfinite(p.loss)]
    if len(training) < 2:
        return None
    losses = [loss for _, loss in training + held_out]
    last = max(step for step, _ in training + held_out)
    logarithmic = max(losses) > 10 * min(losses)
    ticks = _loss_ticks(min(losses), max(losses), logarithmic)

    def height(loss: float) -> float:
        scaled = [math.log(v) if logarithmic else v for v in (loss, ticks[0], ticks[-1])]
        return HEIGHT * (1.0 - (scaled[0] - scaled[1]) / (scaled[2] - scaled[1]))

    label = f"Loss by training step, from {training[0][1]:.3g} to {training[-1][1]:.3g}"
    if held_out:
        label += f"; held-out validation from {held_out[0][1]:.3g} to {held_out[-1][1]:.3g}"
    place = None
    if kept is not None and 0 < kept <= last:
        label, place = f"{label}; the weights of step {kept} were kept", (kept, 100 * kept / last)
    lines = {"raw": _thinned(training), "smooth": _thinned(_smoothed(training)), "held-out": held_out}
    foot = "step 0", f"step {last:,.0f}{', logarithmic loss axis' if logarithmic else ''}"
    return _curves(label, [(height(tick), f"{tick:g}") for tick in ticks], lines, last, height, foot, place)


def score_chart(
    curve: Sequence[TrainedStep], validation: Sequence[ValidationPoint], kept: int | None = None
) -> Curves | None:
    """The score of generated answers to validation rows, from 0 to 100%, by seconds of training; None where answers
    were not scored. kept: the step whose weights were kept, where it is known."""
    seconds = [0.0, *accumulate(point.seconds for point in curve)]
    places = [(seconds[p.step], p.score) for p in validation if p.score is not None and p.step < len(seconds)]
    if len(places) < 2:
        return None
    last = seconds[-1]
    place = (kept, 100 * seconds[kept] / last) if kept is not None and 0 < kept < len(seconds) else None
    label = f"Validation score by minutes of training, from {places[0][1]:.1%} to {places[-1][1]:.1%}"
    foot = "0 min", f"{last / 60:.1f} min"
    grid = [(HEIGHT * (1 - share), said) for share, said in _SHARES]
    return _curves(label, grid, {"held-out": places}, last, lambda score: HEIGHT * (1 - score), foot, place)


def _curves(
    label: str,
    grid: list[tuple[float, str]],
    lines: Mapping[str, Sequence[tuple[float, float]]],
    last: float,
    height: Callable[[float], float],
    foot: tuple[str, str],
    kept: tuple[int, float] | None,
) -> Curves:
    """lines: class -> points over steps or seconds, up to the last. height: of a value."""
    paths = {
        style: " L".join(f"{1000 * at / last:.1f} {height(value):.1f}" for at, value in points)
        for style, points in lines.items()
        if len(points) > 1
    }
    dots = [(100 * at / last, height(value)) for at, value in lines["held-out"]]
    return Curves(label, grid, paths, dots, foot, kept)


def price_chart(candidates: Sequence[ReportedCandidate], metric: str, price: str, unit: str) -> Prices | None:
    """Quality (vertical) against the price of 1,000 requests (horizontal), with intervals; None for under two prices.

    The price axis is logarithmic where prices differ widely. price: the key of the price; candidates without it are
    left out. unit: the name of the axis.
    """
    costs = {row.name: getattr(row.price, price) for row in candidates}
    priced = [row for row in candidates if costs[row.name] is not None]
    if len(priced) < 2:
        return None
    at, logarithmic, ticks = _price_scale([costs[row.name] for row in priced])
    points: list[PricePoint] = []
    for row in sorted(priced, key=lambda row: -row.metrics[metric].mean):
        interval = row.metrics[metric]
        low, mean, high = (_TALL * (1.0 - share) for share in (interval.low, interval.mean, interval.high))
        away = _LABEL / 3 if mean < _TALL / 2 else -_LABEL / 3  # names move away from the nearer edge
        named = min(mean, _TALL - _LABEL / 2)
        while any(abs(named - other.named) < _LABEL for other in points):
            named += away
        points.append(PricePoint(row.name, row.tuned, at(costs[row.name]), low, mean, high, named))
    foot = f"{unit} per 1,000 requests{', logarithmic' if logarithmic else ''}"
    said = "; ".join(f"{row.name} {row.metrics[metric].mean * 100:.1f}% at {money(costs[row.name])}" for row in priced)
    grid = [(_TALL * (1 - share), words) for share, words in _SHARES]
    return Prices(
        f"{metric} against {foot}: {said}", _TALL, grid, [(at(tick), money(tick)) for tick in ticks], points, foot
    )


def _price_scale(costs: Sequence[float]) -> tuple[Callable[[float], float], bool, list[float]]:
    """The place of a price, whether the axis is logarithmic, and its ticks. A price of 0 is at its left end."""
    paid = [cost for cost in costs if cost > 0]
    if not paid or max(paid) / min(paid) < 8:
        top = max([*costs, 1e-9]) * 1.08
        decade = 10.0 ** math.floor(math.log10(top / 3.0))
        step = max(size for size in (decade, 2.0 * decade, 5.0 * decade) if size <= top / 3.0)
        ticks = [step * times for times in range(1, math.floor(top / step) + 1)]
        return (lambda cost: 100 * (cost / top + 0.05) / 1.05), False, ticks
    low, high = math.log10(min(paid)) - 0.4, math.log10(max(paid)) + 0.15
    decades = range(math.floor(low), math.ceil(high) + 1)
    rounds = [step * 10.0**decade for decade in decades for step in (1, 3)]
    return (
        (lambda cost: 100 * max(0.0, (math.log10(max(cost, 1e-12)) - low) / (high - low))),
        True,
        [tick for tick in rounds if low < math.log10(tick) < high],
    )


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
