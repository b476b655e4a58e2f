"""How often does the canary's test err when it is looked at after every request, and how soon does it decide?

    python benchmarks/canary_false_alarms.py [--runs 200] [--requests 400] [--part peeking|callers]

The hypothesis of each row is true by construction, so every decision against it is a false one: at most 5% of the runs
may have one, however often one looks. Beside it, what a t-test looked at after every request would do, and below, how
many canary requests the test needs where there is something to find.

The second part gives a share of the traffic to one hostile caller, who chooses the arm and the score of each of its
requests, or to one honest caller whose requests are harder. It compares the verdict on all requests with the verdict
that must hold without any one group of callers, which is what a rollout uses.
"""

from __future__ import annotations

import argparse
import math
from dataclasses import dataclass

import numpy as np

from tunesmith.rollout.analysis import Arm, evidence_not_worse, evidence_worse, judge
from tunesmith.rollout.settings import Analysis

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
        if evidence([ours], [theirs], margin)[0] >= NEEDED:
            return len(ours)
    return None


def t_test_alarms(arm: Array, scores: Array) -> bool:
    """Whether a one-sided two-sample z-statistic ever passes 1.645, from the tenth request of each arm on."""
    ours, theirs = np.cumsum(arm), np.cumsum(~arm)
    both = (ours >= 10) & (theirs >= 10)
    p, q = np.cumsum(scores * arm)[both] / ours[both], np.cumsum(scores * ~arm)[both] / theirs[both]
    spread = np.sqrt(p * (1 - p) / ours[both] + q * (1 - q) / theirs[both])
    return bool(np.any((q - p > 1.645 * spread) & (spread > 0)))


@dataclass(frozen=True)
class World:
    """Honest callers and one other. canary, stable: the honest requests' means. groups: of honest callers.

    share: of the other caller. attack: abort (all its requests go to the canary and score 0), pass (half go to the
    canary and score 1, half to stable and score 0), or None: it is honest, but its means are lower by `harder`.
    """

    canary: float
    stable: float
    groups: int
    share: float = 0.0
    attack: str | None = None
    harder: float = 0.0

    def requests(self, rng: np.random.Generator, count: int) -> tuple[Array, Array, Array]:
        """(group, to canary?, score) of each request. The other caller is group 0."""
        other = rng.random(count) < self.share
        group = np.where(other, 0, rng.integers(1, self.groups + 1, count))
        arm = rng.random(count) < 0.5
        mean = np.where(arm, self.canary, self.stable) - self.harder * other
        scores = (rng.random(count) < mean).astype(np.float64)
        if self.attack == "abort":
            arm, scores = arm | other, np.where(other, 0.0, scores)
        elif self.attack == "pass":
            scores = np.where(other, arm.astype(np.float64), scores)
        return group, arm, scores


def verdict(world: World, rng: np.random.Generator, requests: int, *, by_caller: bool) -> tuple[str, int]:
    """(outcome, requests until then) of an analysis that is evaluated every 100 requests."""
    analysis = Analysis(metric="exact_match", worse_by_at_most=0.05)
    group, arm, scores = world.requests(rng, requests)
    for seen in range(100, requests + 1, 100):
        arms = []
        for here in (arm[:seen], ~arm[:seen]):
            mine, owners = scores[:seen][here].tolist(), group[:seen][here]
            parts = {str(one): scores[:seen][here][owners == one].tolist() for one in np.unique(owners)}
            groups = {key: Arm(part, len(part)) for key, part in parts.items()} if by_caller else {}
            arms.append(Arm(mine, len(mine), groups=groups))
        outcome = judge(analysis, *arms).outcome
        if outcome != "inconclusive":
            return outcome, seen
    return "inconclusive", requests


# "at the margin" is where both kinds of error are most likely.
_TRUTHS = (("good canary", 0.95, 0.95), ("at the margin", 0.85, 0.9), ("bad canary", 0.7, 0.9))


def callers(runs: int, requests: int) -> None:
    """Print what one caller does to the verdict, on all requests and without any one group."""
    print(f"\n{runs} runs of {requests} requests, half to the canary, evaluated every 100; 95% confidence, margin 0.05")
    print(f"{'':<58}{'all requests':^29}{'without any one group':^29}")
    shown = ("aborted", "passed", "requests")
    print(f"{'10 tokens, or 20 groups of end users':<58}" + "".join(f"{name:>9}" for name in shown * 2))
    rows = []
    for who, groups in (("tokens", 10), ("end users", 20)):
        for truth, canary, stable in _TRUTHS:
            rows.append((f"{who}: nobody hostile; {truth}", World(canary, stable, groups)))
    for truth, canary, stable in _TRUTHS:
        rows.append((f"tokens: one honest with 50%, harder; {truth}", World(canary, stable, 9, 0.5, harder=0.4)))
    for share in (0.01, 0.1, 0.5):
        for attack, truth, canary, stable in (
            ("abort", *_TRUTHS[0]), ("abort", *_TRUTHS[1]), ("pass", *_TRUTHS[1]), ("pass", *_TRUTHS[2])
        ):  # fmt: skip
            rows.append(
                (f"tokens: hostile {share:.0%}, for {attack}; {truth}", World(canary, stable, 9, share, attack))
            )
    for name, world in rows:
        cells = ""
        for by_caller in (False, True):
            rng = np.random.default_rng(20_240_102)
            found = [verdict(world, rng, requests, by_caller=by_caller) for _ in range(runs)]
            decided = [seen for outcome, seen in found if outcome != "inconclusive"]
            rates = [sum(outcome == wanted for outcome, _ in found) / runs for wanted in ("fail", "pass")]
            cells += "".join(f"{rate:>9.1%}" for rate in rates) + f"{np.median(decided) if decided else math.nan:>9.0f}"
        print(f"{name:<58}{cells}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=200)
    parser.add_argument("--requests", type=int, default=400)
    parser.add_argument("--part", choices=("peeking", "callers"))
    options = parser.parse_args()
    if options.part != "callers":
        peeking(options.runs, options.requests)
    if options.part != "peeking":
        callers(options.runs, 5 * options.requests)


def peeking(runs: int, requests: int) -> None:
    """Print how often the test errs, and how soon it decides, when it is evaluated after every request."""
    rng = np.random.default_rng(20_240_101)

    print(f"{runs} runs of {requests} requests, a look after each; decisions at 95% confidence")
    print(f"{'truth':<44}{'false decisions':>16}{'z-test, same looks':>20}")
    for canary, stable, share, margin, worse in (
        (0.3, 0.3, 0.5, 0.0, True),
        (0.3, 0.3, 0.1, 0.0, True),
        (0.95, 0.95, 0.1, 0.0, True),
        (0.4, 0.5, 0.5, 0.1, False),
        (0.85, 0.95, 0.1, 0.1, False),
    ):
        false = naive = 0
        for _ in range(runs):
            arm, scores = stream(rng, canary, stable, share, requests)
            false += first_decision(arm, scores, margin, worse=worse) is not None
            naive += worse and t_test_alarms(arm, scores)
        truth = f"canary {canary}, stable {stable}, {share:.0%} canary, margin {margin}"
        rate = false / runs
        error = 1.96 * math.sqrt(rate * (1 - rate) / runs)
        print(f"{truth:<44}{rate:>9.1%} ± {error:.1%}{(f'{naive / runs:.1%}' if worse else ''):>20}", flush=True)

    print(f"\n{'to be found':<44}{'found':>8}{'canary requests, median':>26}")
    for canary, stable, share, worse in ((0.0, 0.3, 0.5, True), (0.0, 0.3, 0.1, True), (0.6, 0.25, 0.5, False)):
        found = []
        for _ in range(runs // 4):
            arm, scores = stream(rng, canary, stable, share, 4 * requests)
            needed = first_decision(arm, scores, 0.05, worse=worse)
            found += [needed] if needed is not None else []
        truth = f"canary {canary}, stable {stable}, {share:.0%} canary, margin 0.05"
        print(f"{truth:<44}{len(found) / (runs // 4):>8.0%}{np.median(found):>26.0f}", flush=True)


if __name__ == "__main__":
    main()
