"""Line charts as documents, which `charts.html.jinja` puts into a page and `charts.js` draws by uPlot."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Literal

from tunesmith.core.text.display import printable
from tunesmith.core.view import View

Points = Mapping[float, float | None]  # x -> y, None for a gap
# share: from 0 to 1, shown as a percentage. log: logarithmic, values above 0.
Scale = Literal["linear", "share", "log", "count"]
# The colours by what is drawn, the same in every chart: the new version and what was tuned have the first.
CANARY, STABLE, GOOD, BAD = 1, 2, 3, 4


@dataclass(frozen=True)
class Line:
    """One line. colour: from 1 to 4, of the style sheet's --chart-1 to --chart-4; 0 for a grey one."""

    label: str
    points: Points
    colour: int
    dashed: bool = False


class DrawnLine(View):
    """A line with a value for each x of its chart, None for a gap."""

    label: str
    colour: int
    dashed: bool
    values: tuple[float | None, ...]


class Chart(View):
    """A chart as the page has it. says: its lines in words. at: the values of x."""

    title: str
    x: str
    y: str
    scale: Scale
    says: str
    at: tuple[float, ...]
    lines: tuple[DrawnLine, ...]


def chart(title: str, lines: Sequence[Line], *, x: str, y: str, scale: Scale = "linear") -> Chart:
    """A chart of lines over the same span of x.

    x, y: what the axes show, with its unit. An x named "time" is in seconds since 1970.
    """
    at = tuple(sorted({place for line in lines for place in line.points}))
    drawn = tuple(
        DrawnLine.of(line, label=printable(line.label), values=tuple(map(line.points.get, at))) for line in lines
    )
    said = " ".join(_said(line, x, scale) for line in lines)
    return Chart(title=printable(title), x=x, y=printable(y), scale=scale, says=said, at=at, lines=drawn)


def _said(line: Line, x: str, scale: Scale) -> str:
    """A line in words: where it begins and ends."""
    known = [(place, value) for place, value in sorted(line.points.items()) if value is not None]
    if not known:
        return printable(f"{line.label}: no value.")

    def said(place: float, value: float) -> str:
        shown = f"{value:.1%}" if scale == "share" else f"{value:.4g}"
        where = f"{datetime.fromtimestamp(place, UTC):%Y-%m-%d %H:%M} UTC" if x == "time" else f"{x} {place:g}"
        return f"{shown} at {where}"

    ends = dict.fromkeys((said(*known[0]), said(*known[-1])))
    return printable(f"{line.label}: {', '.join(ends)}.")
