"""How right forecasts are (`tunesmith forecast`), on tasks of public corpora at several sizes.

    python benchmarks/forecast.py [--minutes 10]       # trains what is missing; every finished part is kept
    python benchmarks/forecast.py --table              # the forecasts of what was trained so far, against what came
    python benchmarks/forecast.py --limits             # could intervals be narrower, and do few subsets suffice?

For each task of tasks.py, and for versions of them where tuning cannot pay (shuffled or partly wrong answers), models
are trained on nested subsets that double in size. A case is a task with N rows: its forecast sees subsets of up to N/2,
N/4 or N/8 rows and the held-out rows, and what came is the training on all N rows, scored on test requests that the
forecast never reads. Untuned candidates are the base with the task's prompt, the nearest training row and, for labels,
a classifier. Results are lines of results/forecast.jsonl.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).parent))
from forecast_cases import EPOCHS, GOAL, RATIOS, Case, collect, finished, ladders
from leakage import FOLDER
from tunesmith.evaluation.forecasting.extrapolate import CONFIDENCE, Whole, extrapolate
from tunesmith.evaluation.stats.learning_curve import SPREAD, Spread, Subsets

NOISES = (0.03, 0.06, 0.09, 0.12)  # tried by --calibrate
STRAYS = (0.0, 0.05, 0.08, 0.12)
WIDTHS = (0.55, 0.7, 0.85, 0.95, 1.0, 1.05, 1.15)  # tried by --limits


def forecast_case(case: Case, spread: Spread) -> dict[str, Any]:
    """The forecast of a case."""
    whole = Whole(case.rows, lambda _rows: case.epochs, [str(place) for place in range(case.test)])
    return extrapolate(case.measured, whole, GOAL, spread=spread)


def inside(found: Mapping[str, float], came: float) -> bool:
    """Whether an interval holds what came."""
    return found["low"] <= came <= found["high"]


def table(cases: Sequence[Case], spread: Spread = SPREAD) -> None:
    """Print every case's forecast next to what came, and the sums."""
    if not cases:
        print("no case is finished yet")
        return
    heads = ("case", "rows, epochs", "score", "forecast", "lift", "forecast", "likely")
    print("{:<24}{:>12}{:>8}{:>25}{:>8}{:>25}{:>8} decision".format(*heads))
    told = []
    for case in cases:
        found = forecast_case(case, spread)
        told.append(found)
        right = {"train": case.pays, "don't": not case.pays}.get(found["decision"])
        wrong = "" if right is None or right else " WRONG"
        cells = (f"{case.rows} x {case.epochs} /{case.ratio}", f"{case.score:.1%}", _span(found["score"], case.score),
                 f"{100 * case.lift:+.1f}", _span(found["lift"], case.lift),
                 "-" if found["likely"] is None else f"{found['likely']:.0%}")  # fmt: skip
        print("{:<24}{:>12}{:>8}{:>25}{:>8}{:>25}{:>8} ".format(case.ladder.name, *cells), end="")
        print(f"{found['decision']}{wrong} ({case.rival})")
    print(summary(cases, told))


def _span(found: Mapping[str, float], came: float) -> str:
    mark = " " if inside(found, came) else "!"
    return f"{100 * found['median']:>6.1f} [{100 * found['low']:>6.1f},{100 * found['high']:>6.1f}]{mark}"


def summary(cases: Sequence[Case], told: Sequence[Mapping[str, Any]]) -> str:
    """Coverage, widths and decisions of the forecasts of some cases."""
    lines = []
    for what in ("score", "lift"):
        hits = [inside(found[what], getattr(case, what)) for case, found in zip(cases, told, strict=True)]
        halves = [100 * (found[what]["high"] - found[what]["low"]) / 2 for found in told]
        errors = [
            100 * abs(found[what]["median"] - getattr(case, what)) for case, found in zip(cases, told, strict=True)
        ]
        lines.append(
            f"{what}: {sum(hits)} of {len(hits)} intervals ({CONFIDENCE:.0%}) hold what came, median half-width "
            f"{np.median(halves):.1f} points, median error {np.median(errors):.1f}"
        )
    pays = sum(case.pays for case in cases)
    decided = [(case, found["decision"]) for case, found in zip(cases, told, strict=True)]
    right = sum({"train": case.pays, "don't": not case.pays}.get(decision, False) for case, decision in decided)
    open_ = sum(decision == "undecided" for _, decision in decided)
    lean = sum(((found["likely"] or 0.5) >= 0.5) == case.pays for case, found in zip(cases, told, strict=True))
    lines.append(
        f"decisions: tuning pays (lift of {GOAL:.0%} or more) in {pays} of {len(cases)} cases; {right} decisions are "
        f"right, {len(cases) - right - open_} wrong, {open_} undecided; the likelier side is right in {lean}; "
        f"a constant guess is right in {max(pays, len(cases) - pays)}"
    )
    return "\n".join(lines)


def calibrate(cases: Sequence[Case]) -> None:
    """Find the spread with which intervals hold what came as often as they say, leaving out one corpus at a time."""
    grid = [Spread(noise, stray) for noise in NOISES for stray in STRAYS]
    told = {spread: [forecast_case(case, spread) for case in cases] for spread in grid}

    def best(among: Sequence[int]) -> Spread:
        return min(grid, key=lambda spread: sum(_loss(cases[place], told[spread][place]) for place in among))

    for spread in grid:
        print(
            f"noise {spread.noise:.2f}, stray {spread.stray:.2f}: "
            + summary(cases, told[spread]).replace("\n", "\n    ")
        )
    left_out: list[Mapping[str, Any]] = []
    for case in cases:
        chosen = best([place for place, other in enumerate(cases) if other.corpus != case.corpus])
        left_out.append(told[chosen][cases.index(case)])
    print(f"best over all: {best(range(len(cases)))}")
    print("each corpus by the spread that is best over the others:\n" + summary(cases, left_out))


def limits(cases: Sequence[Case]) -> None:
    """Print how wide intervals would be with nothing but chance in them, what narrower ones would hold, and what
    forecasts from the first subsets alone are worth."""
    chance = [164.5 * _chance(case) for case in cases]
    print(f"with a perfect extrapolation: lift, median half-width {np.median(chance):.1f} points, by the rows that are "
          "asked alone")  # fmt: skip
    told = [forecast_case(case, SPREAD) for case in cases]
    for factor in WIDTHS:
        print(f"intervals {factor:.2f} times as wide: " + summary(cases, [_scaled(found, factor) for found in told]))
    chosen = []
    for case in cases:
        others = [place for place, other in enumerate(cases) if other.ladder.name != case.ladder.name]
        chosen.append(min(WIDTHS, key=lambda factor: sum(
            _loss(cases[place], _scaled(told[place], factor)) for place in others)))  # fmt: skip
    print(f"widths that are best over the other tasks: {min(chosen)} to {max(chosen)}; "
          + summary(cases, [_scaled(found, factor) for found, factor in zip(told, chosen, strict=True)]))  # fmt: skip
    short = [case for case in cases if case.ratio == RATIOS[0] and case.epochs == EPOCHS]
    for many in (1, 2, 3):
        few = [replace(case, measured=_first(case.measured, many)) for case in short]
        print(f"from the first {many} of their subsets: " + summary(few, [forecast_case(case, SPREAD) for case in few]))


def _chance(case: Case) -> float:
    """The standard error of a lift that comes from the choice of held-out and of test rows."""
    best = case.measured.untuned[:, int(case.measured.untuned.mean(axis=0).argmax())]
    difference = case.measured.scores[:, -1] - best
    group = np.unique(np.asarray(case.measured.groups), return_inverse=True)[1]
    sums = np.bincount(group, weights=difference - difference.mean())
    return float(np.sqrt((sums**2).sum() / len(difference) ** 2 + difference.var() / case.test))


def _scaled(found: Mapping[str, Any], factor: float) -> dict[str, Any]:
    """A forecast whose intervals' ends are so many times as far from the middle."""
    changed = {}
    for what in ("score", "lift"):
        middle = found[what]["median"]
        ends = {end: middle + factor * (found[what][end] - middle) for end in ("low", "high")}
        changed[what] = {"median": middle, **ends}
    return {**found, **changed}


def _first(measured: Subsets, many: int) -> Subsets:
    """What was measured, of the smallest subsets alone."""
    return replace(
        measured, sizes=measured.sizes[:many], losses=measured.losses[:, :many], scores=measured.scores[:, :many]
    )


def _loss(case: Case, found: Mapping[str, Any]) -> float:
    """The interval scores of both intervals (Gneiting and Raftery 2007, equation 43): width, and distance outside."""
    alpha, total = 1.0 - CONFIDENCE, 0.0
    for what in ("score", "lift"):
        came, low, high = getattr(case, what), found[what]["low"], found[what]["high"]
        total += high - low + 2.0 / alpha * (max(0.0, low - came) + max(0.0, came - high))
    return total


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, nargs="?", default=FOLDER)
    parser.add_argument("--minutes", type=float, default=10.0, help="how long to train")
    parser.add_argument("--table", action="store_true", help="only show what was collected")
    parser.add_argument("--calibrate", action="store_true", help="find the constants of the forecast's spread")
    parser.add_argument("--limits", action="store_true", help="what narrower intervals and fewer subsets would give")
    chosen = parser.parse_args()
    plan = ladders(chosen.folder)
    if chosen.calibrate:
        calibrate(finished(plan))
        return
    if chosen.limits:
        limits(finished(plan))
        return
    if not chosen.table:
        collect(plan, chosen.minutes)
    table(finished(plan))


if __name__ == "__main__":
    main()
