"""How often does the lift gate err, and does the power it promised before a run hold?

    python benchmarks/statistics_simulations.py [--runs 10000] [--only passes|power]

False passes: two candidates that are truly equal (or truly apart by the bound itself) are evaluated again and again;
the gate may pass at most alpha = 2.5% of them (one side of its 95% interval). Clustered: rows of one group share their
fate with a correlation of 0.5. Beside it what a percentile bootstrap over rows would pass.

Power: the rows that `tunesmith plan` asks for, and the fewest rows with which the simulated gate passes as often; the
two must agree within 10%.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator

import numpy as np

from tunesmith.evaluation.planning import Grouping, LiftTest
from tunesmith.evaluation.stats import statistics
from tunesmith.evaluation.stats.statistics import Level, intervals

ALPHA, CONFIDENCE, TOGETHER = 0.025, 0.95, 500
# The gate itself draws 20,000 times. A quarter of that moves an end by a tenth of its tail, up and down alike, and lets
# ten thousand evaluations be simulated in a minute or two; --draws 20000 is the gate as it is.
DRAWS = 5_000
Array = np.ndarray


def gaps(
    rng: np.random.Generator, runs: int, groups: int, size: int, lift: float, differing: float, correlation: float
) -> Array:
    """Differences of scores, runs x rows; rows of one group share one draw with probability sqrt(correlation)."""
    chances = [(differing - lift) / 2, 1 - differing, (differing + lift) / 2]
    edges = np.cumsum(chances)[:2]

    def drawn(many: int) -> Array:
        return np.searchsorted(edges, rng.random((runs, many)), side="right").astype(np.float64) - 1.0

    own = drawn(groups * size)
    if size == 1 or correlation == 0.0:
        return own
    shared = drawn(groups).repeat(size, axis=1)
    return np.where(rng.random(own.shape) < np.sqrt(correlation), shared, own)


def lows(rows: Array, names: list[str]) -> Array:
    """The interval's lower end of each run, by the function that the gate itself calls."""
    found = []
    for start in range(0, len(rows), TOGETHER):
        part = intervals(rows[start : start + TOGETHER].T, names, (-1.0, 1.0), Level(CONFIDENCE, start))
        found += [round(each.low, 9) for each in part]
    return np.array(found)


def percentile_lows(rng: np.random.Generator, rows: Array) -> Array:
    """What most tools do: resample rows, take the 2.5th percentile of the means."""
    many = rows.shape[1]
    draws = rng.multinomial(many, np.full(many, 1 / many), size=1000) / many
    return np.quantile(draws @ rows.T, ALPHA, axis=0)


def share_of(passed: Array) -> str:
    rate = float(np.mean(passed))
    return f"{rate:6.2%} ± {1.96 * np.sqrt(rate * (1 - rate) / len(passed)):.2%}"


def false_passes(rng: np.random.Generator, runs: int) -> bool:
    """Print the table of false passes; whether all stay at or below alpha."""
    print(f"false passes of the lift gate, {runs:,} evaluations each; at most {ALPHA:.1%} allowed")
    print(f"{'rows':>5}{'groups':>8}{'differ':>8}{'truth':>8}{'bound':>8}{'gate':>18}{'percentile bootstrap':>24}")
    sound = True
    for rows, size in ((50, 1), (200, 1), (700, 1), (50, 2), (200, 4), (700, 7)):
        names = [f"{i // size:05d}" for i in range(rows)]
        for differing, bound in ((0.04, 0.0), (0.3, 0.0), (0.3, 0.05)):
            found = gaps(rng, runs, rows // size, size, bound, differing, 0.5)
            passed = lows(found, names) >= bound
            naive = percentile_lows(rng, found[: min(runs, 1000)]) >= bound
            rate = float(passed.mean())
            sound &= rate <= ALPHA + 1.96 * np.sqrt(ALPHA * (1 - ALPHA) / runs)
            shown = f"{rows:>5}{rows // size:>8}{differing:>8.0%}{bound * 100:>+8.0f}{bound * 100:>+8.0f}"
            print(f"{shown}{share_of(passed):>18}{share_of(naive):>24}", flush=True)
    return sound


def crossing(power_at: Callable[[int], float], around: int, size: int, wanted: float) -> int:
    """Rows at which the simulated power reaches what is wanted: a line through six sizes about the promised one."""
    counts = [max(size, round(around * factor / size)) * size for factor in (0.8, 0.88, 0.96, 1.04, 1.12, 1.2)]
    slope, start = np.polyfit(counts, [power_at(count) for count in counts], 1)
    return round((wanted - start) / slope)


def scenarios() -> Iterator[tuple[float, float, float, int, float]]:
    """(true lift, bound, share that differs, rows a group, correlation)."""
    yield 0.05, 0.0, 0.10, 1, 0.0
    yield 0.05, 0.0, 0.20, 1, 0.0
    yield 0.05, 0.0, 0.30, 1, 0.0
    yield 0.10, 0.05, 0.20, 1, 0.0
    yield 0.05, 0.0, 0.10, 4, 0.5
    yield 0.05, 0.0, 0.20, 7, 0.3


def promised_power(rng: np.random.Generator, runs: int) -> bool:
    """Print what was promised against what is simulated; whether all agree within 10%."""
    print(f"\nrows to see a lift with 80% power; {runs:,} evaluations at each of six sizes")
    print(f"{'lift':>6}{'bound':>7}{'differ':>8}{'a group':>9}{'promised':>10}{'simulated':>11}{'off':>7}{'power':>9}")
    sound = True
    for lift, bound, differing, size, correlation in scenarios():
        grouping = Grouping(size, correlation)
        test = LiftTest(differing, bound, grouping=grouping)
        needed = test.rows_needed(lift)
        assert needed is not None

        def simulated(count: int) -> float:
            names = [f"{i // size:05d}" for i in range(count)]  # noqa: B023 - called within this turn
            found = gaps(rng, runs, count // size, size, lift, differing, correlation)  # noqa: B023
            return float(np.mean(lows(found, names) >= bound))  # noqa: B023

        needed = -(-needed // size) * size
        truly = crossing(simulated, needed, size, 0.8)
        off = needed / truly - 1
        sound &= abs(off) <= 0.10
        there = test.chance(truly, lift)
        shown = f"{lift * 100:>+6.0f}{bound * 100:>+7.0f}{differing:>8.0%}{size:>9}"
        print(f"{shown}{needed:>10}{truly:>11}{off:>+7.1%}{there:>9.1%}", flush=True)
    return sound


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=10_000)
    parser.add_argument("--draws", type=int, default=DRAWS)
    parser.add_argument("--only", choices=("passes", "power"))
    options = parser.parse_args()
    statistics._DRAWS, statistics._TAIL_DRAWS = options.draws, options.draws // 80
    rng, began, sound = np.random.default_rng(20_240_601), time.perf_counter(), True
    if options.only != "power":
        sound &= false_passes(rng, options.runs)
    if options.only != "passes":
        sound &= promised_power(rng, max(100, options.runs // 10))
    print(f"\n{'as promised' if sound else 'NOT AS PROMISED'}; {time.perf_counter() - began:.0f} s")
    raise SystemExit(not sound)


if __name__ == "__main__":
    main()
