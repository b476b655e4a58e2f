"""Line charts as geometry in percent of the drawing, for `charts.html.jinja`, which draws them as SVG."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

Points = Sequence[tuple[float, float | None]]


@dataclass(frozen=True)
class Line:
    """One line. number: 1 to 4, its colour and dashes.

    paths: points of SVG polylines; a gap begins a new one. dots: points with a gap on either side.
    """

    label: str
    number: int
    paths: tuple[str, ...]
    dots: tuple[str, ...]


@dataclass(frozen=True)
class Chart:
    """A chart. ticks: (label, height in percent from the top), the highest first. ends: labels of the x axis.

    bounds: (label, height) of horizontal lines that the lines are compared with.
    """

    title: str
    lines: tuple[Line, ...]
    ticks: tuple[tuple[str, float], ...]
    ends: tuple[str, str]
    bounds: tuple[tuple[str, float], ...] = ()


def chart(
    title: str,
    lines: Sequence[tuple[str, Points]],
    *,
    ends: tuple[str, str],
    low: float = 0.0,
    high: float | None = None,
    bounds: Sequence[tuple[str, float]] = (),
    log: bool = False,
) -> Chart:
    """A chart of lines over the same span of x.

    low, high: of the y axis, by default from 0 to the largest value. log: a logarithmic y axis; low is above 0 then.
    """
    points = [point for _, each in lines for point in each]
    known = [y for _, y in points if y is not None]
    high = max([*known, *(bound for _, bound in bounds), low + 1e-9]) if high is None else high
    first, last = min((x for x, _ in points), default=0.0), max((x for x, _ in points), default=1.0)

    def height(y: float) -> float:
        y, bottom, top = (math.log10(v) for v in (max(y, low), low, high)) if log else (y, low, high)
        return 100 - 100 * min(1.0, max(0.0, (y - bottom) / ((top - bottom) or 1)))

    def place(x: float) -> float:
        return 100 * (x - first) / ((last - first) or 1)

    def line(label: str, number: int, each: Points) -> Line:
        found: list[list[str]] = [[]]
        for x, y in each:
            if y is None:
                found.append([])
            else:
                found[-1].append(f"{place(x):.2f},{height(y):.2f}")
        # A line from a point to itself with round ends is a dot.
        dots = tuple(f"{path[0]} {path[0]}" for path in found if len(path) == 1)
        return Line(label, number, tuple(" ".join(path) for path in found if len(path) > 1), dots)

    drawn = (line(label, number, each) for number, (label, each) in enumerate(lines, start=1))
    middle = math.sqrt(low * high) if log else (low + high) / 2
    ticks = tuple((f"{value:.3g}", height(value)) for value in (high, middle, low))
    marked = tuple((label, height(bound)) for label, bound in bounds)
    return Chart(title, tuple(drawn), ticks, ends, marked)
