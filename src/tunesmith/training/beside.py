"""An untuned candidate beside a training: its score on the same validation rows, and what to say of the difference."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple

from tunesmith.core.text.wording import percent, points

BESIDE = "beside:"  # what is reported of a training: `beside:NAME` is the untuned candidate's score
GAP = ("difference", "difference_low", "difference_high")  # what is reported of a step whose answers were compared
Gap = tuple[float, float, float]


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
        ends = f"[{low.removeprefix('+')}, {high.removeprefix('+')}]"
        line = f"; {self.name} has {percent(self.score)} on the same {self.rows} rows: {mean} points {ends}"
        return line, sentence if since == step else ""

    def numbers(self, step: int) -> dict[str, float]:
        """The gap of a step as it is reported; {} where nothing was compared."""
        return dict(zip(GAP, self.gaps.get(step, ()), strict=False))


def standing(rival: str, gaps: Mapping[int, Gap]) -> tuple[int, str]:
    """Whether the model that is trained is better or worse than the rival, in a sentence, and since which step; 0 and
    "" where the interval of the difference has always held zero."""
    since, now, before = 0, 0, 0
    for step, (_, low, high) in sorted(gaps.items()):
        if (side := (low > 0) - (high < 0)) != now:
            since, now, before = step, side, now
    if not since:
        return 0, ""
    word = "better" if (now or before) > 0 else "worse"
    how, place = (f"{word} than", "is above" if now > 0 else "is below") if now else (f"no longer {word} than", "holds")
    return since, f"from step {since} on the tuned model is {how} {rival}: the interval of the difference {place} zero"
