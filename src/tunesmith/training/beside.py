"""An untuned candidate beside a training: its score on the same validation rows, and what to say of the difference."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple

from tunesmith.core.text.wording import percent, points

BESIDE = "beside:"  # `beside:NAME` is reported of a training: the untuned candidate's score
GAP = ("difference", "difference_low", "difference_high")  # reported of a step: its gap
Gap = tuple[float, float, float]
_SAID = {
    1: "is better than {}: the interval of the difference is above zero",
    -1: "is worse than {}: the interval of the difference is below zero",
    0: "is no longer better or worse than {}: the interval of the difference holds zero",
}


class Rival(NamedTuple):
    """The best untuned candidate beside a training.

    score: its mean score on so many validation rows. gaps: by step, how much higher the training's score on the same
    rows is, and the ends of that difference's interval. compare: adds the gap of a step whose answers were scored last.
    """

    name: str
    score: float
    rows: int
    gaps: Mapping[int, Gap]
    compare: Callable[[int], None]

    def said(self, step: int) -> tuple[str, str]:
        """How the answers that were scored last compare: the end of a line on their score, and a sentence, which is ""
        where it would say what was said before."""
        self.compare(step)
        since, sentence = standing(self.name, {each: gap for each, gap in self.gaps.items() if each <= step})
        mean, low, high = map(points, self.gaps[step])
        line = f"; {self.name} has {percent(self.score)} on the same {self.rows} rows: {mean} points "
        line += f"[{low.removeprefix('+')}, {high.removeprefix('+')}]"
        return line, sentence if since == step else ""


def standing(rival: str, gaps: Mapping[int, Gap]) -> tuple[int, str]:
    """Since which step the model that is trained has been better or worse than the rival, or no longer is, and that in
    a sentence; 0 and "" where the interval of the difference has always held zero."""
    since, now = 0, 0
    for step, (_, low, high) in sorted(gaps.items()):
        if (side := (low > 0) - (high < 0)) != now:
            since, now = step, side
    return since, f"from step {since} on the tuned model {_SAID[now].format(rival)}" if since else ""
