"""The table of goals: a line for each, whatever could be measured of it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple


class Line(NamedTuple):
    """A goal. ours, peer: figures as text; ratio: ours over the peer's, None where there is none; goal: what it must
    be at least, or with `most` at most; reached: where it is judged otherwise; lacks: why there is no figure."""

    what: str
    ours: str = "-"
    against: str = "-"
    peer: str = "-"
    ratio: float | None = None
    goal: float | None = None
    most: bool = False
    shown: str | None = None  # the ratio and the goal, where they are not "times"
    wanted: str | None = None
    reached: bool | None = None
    lacks: str | None = None

    def verdict(self) -> str:
        """yes, no, or why it cannot be said."""
        if self.lacks is not None:
            return f"not measured: {self.lacks}"
        reached = self.reached
        if reached is None and self.ratio is not None and self.goal is not None:
            reached = self.ratio <= self.goal if self.most else self.ratio >= self.goal
        return "" if reached is None else "yes" if reached else "NO"


def _rows(lines: Sequence[Line]) -> list[tuple[str, ...]]:
    """The head, and a row of cells for each line."""
    rows = [("what", "ours", "peer", "its figure", "ratio", "goal", "reached")]
    for line in lines:
        ratio = line.shown or ("-" if line.ratio is None else f"{line.ratio:.2f}x")
        goal = line.wanted or ("-" if line.goal is None else f"{'<=' if line.most else '>='} {line.goal:g}x")
        rows.append((line.what, line.ours, line.against, line.peer, ratio, goal, line.verdict()))
    return rows


def markdown(lines: Sequence[Line]) -> str:
    """The lines as a table in Markdown."""
    head, *rows = ["| " + " | ".join(row) + " |" for row in _rows(lines)]
    return "\n".join([head, "|---" * 7 + "|", *rows])


def table(lines: Sequence[Line]) -> str:
    """The lines under a head, in columns."""
    rows = _rows(lines)
    widths = [max(len(row[place]) for row in rows) for place in range(6)]
    return "\n".join(
        "  ".join([*(cell.ljust(width) for cell, width in zip(row[:6], widths, strict=True)), row[6]]).rstrip()
        for row in rows
    )
