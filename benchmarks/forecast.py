"""How right forecasts are (`tunesmith forecast`), on tasks of public corpora.

    python benchmarks/forecast.py [--minutes 10]       # trains what is missing; every finished part is kept
    python benchmarks/forecast.py --table              # the forecasts of what was trained so far, against what came

For each task of tasks.py, and for versions of them where tuning cannot pay (shuffled or partly wrong answers), models
are trained on subsets that double in size. A case is a task with N rows: its forecast sees the scores of held-out rows
after trainings on up to N/2, N/4 or N/8 rows, and what came is the training on all N rows, scored on test requests that
the forecast never reads. Untuned candidates are the base with the task's prompt, the nearest training row and, for
labels, a classifier. Results are lines of results/forecast.jsonl.
"""

from __future__ import annotations

import argparse
import sys
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

sys.path.insert(0, str(Path(__file__).parent))
from forecast_cases import EPOCHS, collect, ladders, results
from leakage import FOLDER
from tunesmith.evaluation.learning_curve import CONFIDENCE, WIDEST, Extrapolated, Measured, extrapolate

GOAL = 0.05  # the lift from which tuning pays
RATIOS = (2, 4, 8)  # rows of a case, as a multiple of its largest subset's
SUBSETS, LEAST_SUBSETS = 4, 3
LEAST_ROWS = 200  # of a case


class Case(NamedTuple):
    """A task with so many rows, `ratio` times the largest subset's or more. score, lift: what came on the test rows."""

    task: str
    rows: int
    ratio: int
    measured: Measured
    test: int
    score: float
    lift: float

    @property
    def pays(self) -> bool:
        return self.lift >= GOAL


def cases(lines: Sequence[Mapping[str, Any]]) -> list[Case]:
    """The cases of which every part was measured."""
    tasks: defaultdict[str, dict[tuple[str, int], Mapping[str, Any]]] = defaultdict(dict)
    for line in lines:
        if line["epochs"] in (0, EPOCHS):
            tasks[line["task"]][line["who"], line["rows"]] = line
    found = []
    for task, known in tasks.items():
        sizes = sorted(rows for who, rows in known if who == "tuned")
        for rows in (size for size in sizes if size >= LEAST_ROWS):
            for ratio in RATIOS:
                subsets = [size for size in sizes if size * ratio <= rows][-SUBSETS:]
                if len(subsets) >= LEAST_SUBSETS:
                    found.append(_case(task, rows, ratio, subsets, known))
    return found


def _case(
    task: str, rows: int, ratio: int, subsets: Sequence[int], known: Mapping[tuple[str, int], Mapping[str, Any]]
) -> Case:
    def scores(who: str, size: int, split: str) -> np.ndarray:
        return np.array([float(value) for value in known[who, size]["scores"][split]])

    untuned = [key for key in known if key[0] != "tuned" and key[1] in (0, rows)]
    came = scores("tuned", rows, "test")
    rival = max(scores(*key, "test").mean() for key in untuned)
    held = np.array([scores("tuned", size, "held") for size in subsets]).T
    others = np.array([scores(*key, "held") for key in untuned]).T
    groups = known["start", 0].get("groups") or [str(place) for place in range(len(held))]
    measured = Measured(subsets, held, others, groups)
    return Case(task, rows, ratio, measured, len(came), float(came.mean()), float(came.mean() - rival))


def table(found: Sequence[Case]) -> None:
    """Print every case's forecast next to what came, and the sums."""
    told = [(case, extrapolate(case.measured, case.rows, case.test, GOAL)) for case in found]
    heads = ("case", "rows", "score", "forecast", "lift", "forecast", "likely")
    print("{:<24}{:>9}{:>8}{:>25}{:>8}{:>25}{:>8} decision".format(*heads))
    for case, forecast in told:
        assert forecast.lift is not None
        right = {"train": case.pays, "don't": not case.pays}.get(forecast.decision or "")
        cells = (f"{case.rows} /{case.ratio}", f"{case.score:.1%}", _span(forecast.score, case.score),
                 f"{100 * case.lift:+.1f}", _span(forecast.lift, case.lift), f"{forecast.likely:.0%}")  # fmt: skip
        print("{:<24}{:>9}{:>8}{:>25}{:>8}{:>25}{:>8} ".format(case.task, *cells), end="")
        print(f"{forecast.decision}{' WRONG' if right is False else ''}{'' if forecast.said else ', score unsaid'}")
    for ratio in (*RATIOS, None):
        print(summary([one for one in told if ratio in (None, one[0].ratio)], ratio))


def _span(found: Any, came: float) -> str:
    mark = " " if found.low <= came <= found.high else "!"
    return f"{100 * found.median:>6.1f} [{100 * found.low:>6.1f},{100 * found.high:>6.1f}]{mark}"


def summary(told: Sequence[tuple[Case, Extrapolated]], ratio: int | None) -> str:
    """Coverage, widths and decisions of the forecasts of some cases."""
    lines = [f"largest subset 1/{ratio} of the rows:" if ratio else "all:"]
    for what in ("score", "lift"):
        pairs = [(getattr(forecast, what), getattr(case, what)) for case, forecast in told]
        inside = sum(one.low <= came <= one.high for one, came in pairs)
        half = 50 * np.median([one.high - one.low for one, _ in pairs])
        error = 100 * np.median([abs(one.median - came) for one, came in pairs])
        lines.append(
            f"  {what}: {inside} of {len(pairs)} intervals ({CONFIDENCE:.0%}) hold what came, median half-width "
            f"{half:.1f} points, median error {error:.1f}"
        )
    decided = [(case.pays, forecast.decision) for case, forecast in told if forecast.decision != "undecided"]
    right = sum(pays == (decision == "train") for pays, decision in decided)
    lines.append(
        f"  {right} of {len(told)} decisions are right, {len(decided) - right} wrong, {len(told) - len(decided)} "
        f"undecided; tuning pays (by {GOAL:.0%} or more) in {sum(case.pays for case, _ in told)}; the score is said, "
        f"within {100 * WIDEST:.0f} points, of {sum(forecast.said for _, forecast in told)}"
    )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, nargs="?", default=FOLDER)
    parser.add_argument("--minutes", type=float, default=10.0, help="how long to train")
    parser.add_argument("--table", action="store_true", help="only show what was collected")
    chosen = parser.parse_args()
    if not chosen.table:
        collect(ladders(chosen.folder), chosen.minutes)
    table(cases(results()))


if __name__ == "__main__":
    main()
