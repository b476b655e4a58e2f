"""Successive halving: how long a search trains each trial, and which trials go on.

Method: Jamieson and Talwalkar 2016, "Non-stochastic Best Arm Identification and Hyperparameter Optimization" (AISTATS).
Many settings are trained briefly, the best of them for longer, again and again. Each round, called a rung, gets the
same share of the time. A third goes on, as in Li et al. 2018, "Hyperband" (JMLR 18). The present settings, trial 0, are
in every rung, so that the last one compares the best of the others with them.

Time decides through `SearchDecisions` only. They are on the disk before they act, and follow from what was measured
before the first trial and from the results on the disk: a search that is killed goes on as it would have.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import product
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from tunesmith.core.errors import Refused
from tunesmith.core.system.files import write_atomic
from tunesmith.training.settings import LEAST_SCORED

SOURCE = (
    "successive halving (Jamieson and Talwalkar 2016, Non-stochastic Best Arm Identification and Hyperparameter "
    "Optimization)"
)
PRESENT = 0  # the number of the trial with the present settings
LEAST_STEPS = 20  # of the present batch, in the first rung
_OTHERS = (27, 18, 9, 6, 3)  # how many other settings a search may try; as many as the time allows
_SHARE = 3  # one in so many goes on
_SCORED_SHARE = 0.4  # of a first trial's time, for answers
_PLANNED = 0.9  # of the time; the rest is for trials that take longer than the mean
_OVERRUN = 0.05  # of the time: a trial that goes further beyond is ended


class Measured(BaseModel):
    """Seconds measured before the first trial: to train a row, to compute the validation loss, to answer a row; total:
    of measuring."""

    model_config = ConfigDict(frozen=True)

    row: float = Field(gt=0)
    loss: float = Field(ge=0)
    answer: float = Field(ge=0)
    total: float = Field(ge=0)


class Rung(BaseModel):
    """Trials that are trained on so many rows each, in the order in which they run. not_run: how many more there would
    have been, had there been time."""

    model_config = ConfigDict(frozen=True)

    rows: int = Field(ge=1)
    trials: tuple[int, ...]
    not_run: int = 0


class SearchDecisions(BaseModel):
    """What a search decided.

    environment: what its numbers depend on besides its input. others: how many other settings it tries. scored_rows:
    validation rows that each trial answers; 0: trials are compared by the probability of the expected answers. longest:
    rows that the training itself is expected to see, with repetitions; no trial is longer. ended: why there is no
    further trial.
    """

    model_config = ConfigDict(frozen=True)

    environment: dict[str, Any]
    measured: Measured
    others: int
    scored_rows: int
    longest: int
    rungs: tuple[Rung, ...] = ()
    ended: str | None = None


class TrialResult(BaseModel):
    """A trial in a rung. rows: trained on, with repetitions. seconds: of the training; checking: of what follows.

    loss, probability: mean over all labels of the validation rows; probabilities: of each row, the sum over its labels.
    scores: of each answered row. failed: why it could not be trained. cut: why it was ended before its steps were done.
    There is neither loss nor probability in either case. expected_bytes, peak_bytes: memory of the process during the
    training, as estimated and as measured.
    """

    model_config = ConfigDict(frozen=True)

    rung: int
    trial: int
    rows: int
    steps: int
    seconds: float
    checking: float = 0.0
    loss: float | None = None
    probability: float | None = None
    probabilities: tuple[float, ...] = ()
    scores: tuple[float, ...] = ()
    failed: str | None = None
    cut: str | None = None
    expected_bytes: int | None = None
    peak_bytes: int | None = None

    @property
    def score(self) -> float | None:
        """The mean score; None where answers were not scored."""
        return math.fsum(self.scores) / len(self.scores) if self.scores else None


def rung_sizes(others: int) -> list[int]:
    """How many trials each rung has, the present settings included, where so many others are tried."""
    sizes = [others + 1]
    while others > 1:
        others = math.ceil(others / _SHARE)
        sizes.append(others + 1)
    return sizes


def decide_search(
    within: float,
    measured: Measured,
    environment: dict[str, Any],
    *,
    available: int,
    batch: int,
    longest: int,
    scorable: int,
) -> SearchDecisions:
    """What is decided before the first trial: the most other settings that the time allows.

    available: other settings that there are. batch: the present one. longest: see SearchDecisions. scorable: validation
    rows that can be scored. Where the time allows no score that says enough, however few settings are tried, trials are
    compared by the probability of the expected answers. Raises Refused where the time does not allow a first rung.
    """
    least = min(LEAST_STEPS * batch, longest)
    counts = sorted({min(each, available) for each in _OTHERS}, reverse=True)
    for by_score, others in product((True, False), counts):
        sizes = rung_sizes(others)
        each = _PLANNED * (within - measured.total) / len(sizes) / sizes[0]
        scored = min(scorable, int(_SCORED_SHARE * each / max(measured.answer, 1e-9))) if by_score else 0
        if by_score and scored < LEAST_SCORED:
            continue
        if each - measured.loss - scored * measured.answer >= least * measured.row:
            return SearchDecisions(
                environment=environment, measured=measured, others=others, scored_rows=scored, longest=longest
            )
    sizes = rung_sizes(counts[-1])
    needed = measured.total + len(sizes) * sizes[0] * (measured.loss + least * measured.row) / _PLANNED
    raise Refused(
        f"{within:.0f} s are too short for a search: measuring, and {sizes[0]} trials of {least} rows in the first of "
        f"{len(sizes)} rungs, take about {needed:.0f} s",
        where="--within",
        fix=f"give it --within {math.ceil(1.2 * needed / 60)}m or more",
    )


def ranking(results: Sequence[TrialResult]) -> list[int]:
    """The numbers of a rung's trials that were checked, the best first: by score and, among equals or without
    scores, by the probability of the expected answers. Of two that are equal in both the one that was planned first
    comes first."""
    keyed = [(-(each.score or 0.0), -each.probability, each.trial) for each in results if each.probability is not None]
    return [trial for _, _, trial in sorted(keyed)]


def final_results(results: Sequence[TrialResult]) -> list[TrialResult]:
    """The results that a search's outcome follows from: those of the last rung in which two trials or more were
    checked, or one where there is no such rung; without trials that failed in any rung."""
    failed = {each.trial for each in results if each.failed is not None}
    sound = [each for each in results if each.trial not in failed and each.cut is None]
    by_rung = [[each for each in sound if each.rung == rung] for rung in sorted({each.rung for each in sound})]
    several = [found for found in by_rung if len(found) > 1]
    return (several or by_rung or [[]])[-1]


def spent(decisions: SearchDecisions, results: Sequence[TrialResult]) -> float:
    """Seconds that a search has taken so far."""
    return decisions.measured.total + math.fsum(each.seconds + each.checking for each in results)


def next_rung(decisions: SearchDecisions, results: Sequence[TrialResult], within: float) -> SearchDecisions:
    """The decisions with one more rung, or with the reason why there is none."""
    trials = tuple(range(decisions.others + 1))
    before = decisions.rungs[-1] if decisions.rungs else None
    if before is not None:
        last = [each for each in results if each.rung == len(decisions.rungs) - 1]
        ranked = [trial for trial in ranking(last) if trial != PRESENT]
        others = sum(trial != PRESENT for trial in before.trials)
        if not ranked:
            return _ended(decisions, "none of the other settings could be trained")
        if others == 1:
            return _ended(decisions, "one of the other settings is left")
        if before.rows >= decisions.longest:
            return _ended(decisions, "the trials were as long as the training itself")
        present = () if any(each.failed for each in last if each.trial == PRESENT) else (PRESENT,)
        trials = (*present, *ranked[: math.ceil(others / _SHARE)])
    rungs = len(rung_sizes(sum(trial != PRESENT for trial in trials)))
    costs = [_costs(decisions, results, trial) for trial in trials]
    row, check = (math.fsum(cost[part] for cost in costs) for part in (0, 1))
    rows = int((_PLANNED * (within - spent(decisions, results)) / rungs - check) / row)
    rows = min(decisions.longest, max(1, rows))
    if before is not None and rows <= before.rows:
        return _ended(decisions, "the time does not allow longer trials")
    return decisions.model_copy(update={"rungs": (*decisions.rungs, Rung(rows=rows, trials=trials))})


def _costs(decisions: SearchDecisions, results: Sequence[TrialResult], trial: int) -> tuple[float, float]:
    """Seconds to train a row, and to check: of the trial's own last run, else of the mean trial, as far as is known."""
    done = [each for each in results if each.probability is not None]
    done = [each for each in done if each.trial == trial][-1:] or done
    if not done:
        measured = decisions.measured
        return measured.row, measured.loss + decisions.scored_rows * measured.answer
    return (
        max(1e-9, math.fsum(each.seconds for each in done) / sum(each.rows for each in done)),
        math.fsum(each.checking for each in done) / len(done),
    )


def _allowed(
    decisions: SearchDecisions, results: Sequence[TrialResult], rung: int, trial: int, within: float
) -> float | None:
    """Seconds after which a trial's training is ended; None where there is no time to begin it."""
    row, check = _costs(decisions, results, trial)
    used = spent(decisions, results) + check
    if used + row * decisions.rungs[rung].rows > within:
        return None
    return (1 + _OVERRUN) * within - used


def _ended(decisions: SearchDecisions, reason: str) -> SearchDecisions:
    return decisions.model_copy(update={"ended": reason})


def _cut(decisions: SearchDecisions, ran: int) -> SearchDecisions:
    """The decisions without the trials of the last rung after the first so many."""
    *before, last = decisions.rungs
    cut = last.model_copy(update={"trials": last.trials[:ran], "not_run": len(last.trials) - ran})
    rungs = {"rungs": (*before, cut)}
    return _ended(decisions.model_copy(update=rungs), "the time was used before all trials of the last rung had run")


def successive_halving(
    decisions: SearchDecisions,
    within: float,
    *,
    keep: Callable[[SearchDecisions], None],
    finished: Callable[[int, int], TrialResult | None],
    run: Callable[[int, int, int, float], TrialResult],
) -> tuple[SearchDecisions, list[TrialResult]]:
    """Run a search to its end; returns what was decided and the results in the order in which they were made.

    decisions: the first ones, or those of a search that was stopped. keep: puts decisions on the disk. finished: the
    result of a trial (by rung and number) that ran before the search was stopped. run: trains a trial (by rung and
    number) on so many rows, ends it after so many seconds of training, and puts its result on the disk.
    """
    results: list[TrialResult] = []
    rung = 0
    while True:
        if rung == len(decisions.rungs):
            if decisions.ended is None:
                keep(decisions := next_rung(decisions, results, within))
            if decisions.ended is not None:
                return decisions, results
        for place, trial in enumerate(decisions.rungs[rung].trials):
            result = finished(rung, trial)
            if result is None:
                seconds = _allowed(decisions, results, rung, trial, within)
                if seconds is None:
                    keep(decisions := _cut(decisions, place))
                    break
                result = run(rung, trial, decisions.rungs[rung].rows, seconds)
            results.append(result)
            if result.cut is not None:
                if decisions.ended is None:
                    keep(decisions := _cut(decisions, place + 1))
                break
        rung += 1


def keep_search(path: Path, decisions: SearchDecisions) -> None:
    """Write a search's decisions so that they survive a crash."""
    write_atomic(path, decisions.model_dump_json().encode())
