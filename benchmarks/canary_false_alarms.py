"""How often does the canary's test err when it is looked at after every request, and how soon does it decide?

    python benchmarks/canary_false_alarms.py [--runs 200] [--requests 400]

The hypothesis of each row is true by construction, so every decision against it is a false one: at most 5% of the runs
may have one, however often one looks. Beside it, what a t-test looked at after every request would do, and below, how
many canary requests the test needs where there is something to find.
"""

from __future__ import annotations

import argparse
import math

import numpy as np

from tunesmith.rollout.analysis import evidence_not_worse, evidence_worse

NEEDED = 20.0
Array = np.ndarray


def stream(rng: np.random.Generator, canary: float, stable: float, share: float, requests: int) -> tuple[Array, Array]:
    """(to canary?, score) of each request."""
    arm = rng.random(requests) < share
    return arm, (rng.random(requests) < np.where(arm, canary, stable)).astype(np.float64)


def first_decision(arm: Array, scores: Array, margin: float, *, worse: bool) -> int | None:
    """Canary requests seen when the evidence first suffices."""
    evidence = evidence_worse if worse else evidence_not_worse
    for seen in range(1, len(arm) + 1):
        ours, theirs = scores[:seen][arm[:seen]], scores[:seen][~arm[:seen]]
        if evidence(ours, theirs, margin) >= NEEDED:
            return len(ours)
    return None


def t_test_alarms(arm: Array, scores: Array) -> bool:
    """Whether a one-sided two-sample z-statistic ever passes 1.645, from the tenth request of each arm on."""
    ours, theirs = np.cumsum(arm), np.cumsum(~arm)
    both = (ours >= 10) & (theirs >= 10)
    p, q = np.cumsum(scores * arm)[both] / ours[both], np.cumsum(scores * ~arm)[both] / theirs[both]
    spread = np.sqrt(p * (1 - p) / ours[both] + q * (1 - q) / theirs[both])
    return bool(np.any((q - p > 1.645 * spread) & (spread > 0)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=200)
    parser.add_argument("--requests", type=int, default=400)
    options = parser.parse_args()
    rng = np.random.default_rng(20_240_101)

    print(f"{options.runs} runs of {options.requests} requests, a look after each; decisions at 95% confidence")
    print(f"{'truth':<44}{'false decisions':>16}{'z-test, same looks':>20}")
    for canary, stable, share, margin, worse in (
        (0.3, 0.3, 0.5, 0.0, True),
        (0.3, 0.3, 0.1, 0.0, True),
        (0.95, 0.95, 0.1, 0.0, True),
        (0.4, 0.5, 0.5, 0.1, False),
        (0.85, 0.95, 0.1, 0.1, False),
    ):
        false = naive = 0
        for _ in range(options.runs):
            arm, scores = stream(rng, canary, stable, share, options.requests)
            false += first_decision(arm, scores, margin, worse=worse) is not None
            naive += worse and t_test_alarms(arm, scores)
        truth = f"canary {canary}, stable {stable}, {share:.0%} canary, margin {margin}"
        rate = false / options.runs
        error = 1.96 * math.sqrt(rate * (1 - rate) / options.runs)
        print(
            f"{truth:<44}{rate:>9.1%} ± {error:.1%}{(f'{naive / options.runs:.1%}' if worse else ''):>20}", flush=True
        )

    print(f"\n{'to be found':<44}{'found':>8}{'canary requests, median':>26}")
    for canary, stable, share, worse in ((0.0, 0.3, 0.5, True), (0.0, 0.3, 0.1, True), (0.6, 0.25, 0.5, False)):
        found = []
        for _ in range(options.runs // 4):
            arm, scores = stream(rng, canary, stable, share, 4 * options.requests)
            needed = first_decision(arm, scores, 0.05, worse=worse)
            found += [needed] if needed is not None else []
        truth = f"canary {canary}, stable {stable}, {share:.0%} canary, margin 0.05"
        print(f"{truth:<44}{len(found) / (options.runs // 4):>8.0%}{np.median(found):>26.0f}", flush=True)


if __name__ == "__main__":
    main()
