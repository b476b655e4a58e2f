"""Gates: one requirement held against an evaluation's scores. Three outcomes: pass, fail, inconclusive.

A gate with an interval passes where the whole interval is on the wanted side of the bound, fails where the whole of it
is on the other side, and is inconclusive between. Evidence that is missing, too small or unusable is inconclusive.

All gates of a verdict must pass, so each keeps its own error rate and no correction for their number is due: a release
that violates any of them passes that one with at most its error rate (intersection-union test, Berger 1982). A failure
needs one of them, so failures are corrected, in verdict.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

from tunesmith.core.errors import Inconclusive
from tunesmith.evaluation.answers import BASE
from tunesmith.evaluation.metrics.classification import brier_interval, calibration_error_interval, macro_f1_interval
from tunesmith.evaluation.metrics.labels import Labelled
from tunesmith.evaluation.probes.items import Measured
from tunesmith.evaluation.probes.judging import Case, judge_probe
from tunesmith.evaluation.probes.suites import suite_of
from tunesmith.evaluation.report.wording import percent, points
from tunesmith.evaluation.scores import GENERAL, Column, check_paired, drop, rounded
from tunesmith.evaluation.settings import BEST_UNTUNED, Forgetting, Gate, Lift, Probe, Retain, Threshold, Whole
from tunesmith.evaluation.stats.statistics import (
    MINIMUM_GROUPS,
    Interval,
    confidence_at_use,
    effective_groups,
    interval,
)

Outcome = Literal["pass", "fail", "inconclusive"]
_FIGURES = {
    "macro_f1": macro_f1_interval,
    "calibration_error": calibration_error_interval,
    "brier": brier_interval,
}


@dataclass(frozen=True, slots=True)
class Evidence:
    """What gates judge: the scores of one evaluation, and whose turn it is.

    columns: (candidate, metric) -> scores. tuned: candidate -> whether its weights differ from the base's.
    candidate: the one that is judged. test_set_use: how many candidates the test rows have judged, with this one.
    """

    columns: Mapping[tuple[str, str], Column]
    tuned: Mapping[str, bool]
    candidate: str
    test_set_use: int
    seed: int
    # (suite, candidate) -> what a risk probe measured, and what the evaluation's record says of it.
    measured: Mapping[tuple[str, str], Measured] = field(default_factory=dict)
    told: Mapping[tuple[str, str], Mapping[str, Any]] = field(default_factory=dict)
    primary: str = ""
    labelled: Mapping[tuple[str, str], Labelled] = field(default_factory=dict)  # by candidate and metric


@dataclass(frozen=True, slots=True)
class Finding:
    """A gate's outcome. value, low, high are None where nothing could be measured; extra stands in the record too."""

    outcome: Outcome
    value: float | None
    low: float | None
    high: float | None
    bound: float
    reason: str
    extra: Mapping[str, Any] = field(default_factory=dict)


def judge_gate(gate: Gate, evidence: Evidence) -> Finding:
    """Hold one gate against the evidence. Never raises for the evidence's sake: what is unusable is inconclusive."""
    try:
        if isinstance(gate, Lift):
            return _lift(gate, evidence)
        if isinstance(gate, Forgetting):
            return _forgetting(gate, evidence)
        if isinstance(gate, Retain):
            return _retain(gate, evidence)
        if isinstance(gate, Probe):
            return _probe(gate, evidence)
        if isinstance(gate, Whole):
            return _whole(gate, evidence)
        return _threshold(gate, evidence)
    except Inconclusive as error:
        return not_judged(gate, error.what)


def not_judged(gate: Gate, reason: str) -> Finding:
    """The finding of a gate for which there is no usable evidence."""
    return Finding("inconclusive", None, None, None, bound_of(gate), reason)


def bound_of(gate: Gate) -> float:
    """The number that the gate's value is held against."""
    if isinstance(gate, Lift):
        return gate.at_least
    if isinstance(gate, Forgetting | Retain):
        return gate.drop_at_most
    if isinstance(gate, Probe):
        return gate.at_most
    bound = gate.at_least if gate.at_least is not None else gate.at_most
    assert bound is not None
    return bound


def best_untuned(evidence: Evidence, metric: str) -> str:
    """The untuned candidate with the highest mean, the judged one aside; of equals the first by name.

    The rival is chosen on the rows it is then compared on, which flatters the rival: the lift over it is, if anything,
    understated. Raises Inconclusive where there is none.
    """
    rivals = [name for name, tuned in sorted(evidence.tuned.items()) if not tuned and name != evidence.candidate]
    if not rivals:
        raise Inconclusive("no untuned candidate was measured, so there is nothing to compare with")
    return max(rivals, key=lambda name: rounded(float(np.mean(evidence.columns[name, metric].values))))


def _rivals(metric: str, over: str, evidence: Evidence) -> tuple[str, Column, Column]:
    """Whom the candidate is held against, its own scores and theirs. Raises Inconclusive where that says nothing."""
    rival = best_untuned(evidence, metric) if over == BEST_UNTUNED else over
    if rival == evidence.candidate:
        raise Inconclusive("a candidate is not compared with itself")
    own, other = evidence.columns[evidence.candidate, metric], evidence.columns[rival, metric]
    check_paired(own, other)
    _check_size(own)
    return rival, own, other


def _lift(gate: Lift, evidence: Evidence) -> Finding:
    rival, own, other = _rivals(gate.metric, gate.over, evidence)
    confidence = confidence_at_use(gate.confidence, evidence.test_set_use)
    measured = _rounded(
        interval(own.values - other.values, own.groups, ends=(-1.0, 1.0), confidence=confidence, seed=evidence.seed)
    )
    outcome = _above(measured, gate.at_least)
    reason = (
        f"{points(measured.mean)} points of {gate.metric} over {rival} "
        f"({_level(confidence)} interval {points(measured.low)} to {points(measured.high)}), "
        f"at least {points(gate.at_least)} wanted"
    )
    if outcome == "inconclusive":
        reason += _rows_needed(measured, gate.at_least)
    extra = {"metric": gate.metric, "over": rival, "confidence": rounded(confidence)}
    return Finding(outcome, measured.mean, measured.low, measured.high, gate.at_least, reason, extra)


def _retain(gate: Retain, evidence: Evidence) -> Finding:
    rival, own, other = _rivals(gate.metric, gate.not_below, evidence)
    confidence = confidence_at_use(gate.confidence, evidence.test_set_use)
    measured = _rounded(
        interval(other.values - own.values, own.groups, ends=(-1.0, 1.0), confidence=confidence, seed=evidence.seed)
    )
    outcome = _below(measured, gate.drop_at_most)
    reason = (
        f"{points(-measured.mean)} points of {gate.metric} against {rival} ({_level(confidence)} interval of the drop "
        f"{points(measured.low)} to {points(measured.high)}), a drop of at most {gate.drop_at_most * 100:g} allowed"
    )
    if outcome == "inconclusive":
        reason += _rows_needed(measured, gate.drop_at_most)
    extra = {"metric": gate.metric, "not_below": rival, "confidence": rounded(confidence)}
    return Finding(outcome, measured.mean, measured.low, measured.high, gate.drop_at_most, reason, extra)


def _probe(gate: Probe, evidence: Evidence) -> Finding:
    extra = {"probe": gate.probe}
    if not evidence.tuned[evidence.candidate] and not suite_of(gate.suite).untuned:
        reason = "answers with the base's own weights, so tuning has done nothing to them"
        return Finding("pass", 0.0, 0.0, 0.0, gate.at_most, reason, extra)
    key = gate.suite, evidence.candidate
    told = evidence.told.get(key, {})
    if "unusable" in told:
        raise Inconclusive(str(told["unusable"]))
    if key not in evidence.measured:
        raise Inconclusive("the probe was not made: evaluate again with this gate in the project file")
    confidence = confidence_at_use(gate.confidence, evidence.test_set_use)
    test = evidence.columns.get((evidence.candidate, evidence.primary))
    if test is None:
        raise Inconclusive("the evaluation does not say which metric leads")
    shown = judge_probe(Case(gate, evidence.measured[key], test, confidence, evidence.seed, told))
    measured = _rounded(shown.interval)
    reason = f"{shown.sentence} ({_level(confidence)} interval); at most {gate.at_most:g} allowed"
    return Finding(
        _below(measured, gate.at_most),
        measured.mean,
        measured.low,
        measured.high,
        gate.at_most,
        reason,
        {**extra, **shown.extra, "confidence": rounded(confidence)},
    )


def _threshold(gate: Threshold, evidence: Evidence) -> Finding:
    own = evidence.columns[evidence.candidate, gate.metric]
    _check_size(own)
    # Looking again does not weaken a bound on the measured rows themselves; it weakens what they say of others.
    confidence = confidence_at_use(gate.confidence, evidence.test_set_use) if gate.confidence else 0.95
    measured = _rounded(interval(own.values, own.groups, ends=(0.0, 1.0), confidence=confidence, seed=evidence.seed))
    at_least, bound = gate.at_least is not None, bound_of(gate)
    judged = measured if gate.confidence else Interval(measured.mean, measured.mean, measured.mean)
    outcome = _above(judged, bound) if at_least else _below(judged, bound)
    wanted = f"at {'least' if at_least else 'most'} {bound * 100:g}% wanted"
    reason = (
        f"{percent(measured.mean)} {gate.metric} "
        f"({_level(confidence)} interval {percent(measured.low)} to {percent(measured.high)}), "
        f"{wanted} {'of the whole interval' if gate.confidence else 'of the measured rows'}"
    )
    if outcome == "inconclusive":
        reason += _rows_needed(measured, bound)
    extra = {"metric": gate.metric, "confidence": rounded(confidence)}
    return Finding(outcome, measured.mean, measured.low, measured.high, bound, reason, extra)


def _whole(gate: Whole, evidence: Evidence) -> Finding:
    rows = evidence.labelled.get((evidence.candidate, gate.metric))
    if rows is None:
        raise Inconclusive(f"the evaluation keeps no labels by {gate.metric!r}: name a scorer with `label`")
    _check_size(evidence.columns[evidence.candidate, gate.metric])
    confidence = confidence_at_use(gate.confidence, evidence.test_set_use)
    measured = _rounded(_FIGURES[gate.figure](rows, confidence, evidence.seed))
    at_least, bound = gate.at_least is not None, bound_of(gate)
    reason = (
        f"{measured.mean:.3f} {gate.figure} of {gate.metric} "
        f"({_level(confidence)} interval {measured.low:.3f} to {measured.high:.3f}), "
        f"at {'least' if at_least else 'most'} {bound:g} wanted of the whole interval"
    )
    outcome = _above(measured, bound) if at_least else _below(measured, bound)
    if outcome == "inconclusive":
        reason += _rows_needed(measured, bound)
    extra = {"figure": gate.figure, "metric": gate.metric, "confidence": rounded(confidence)}
    return Finding(outcome, measured.mean, measured.low, measured.high, bound, reason, extra)


def _forgetting(gate: Forgetting, evidence: Evidence) -> Finding:
    extra = {"metric": GENERAL, "over": BASE}
    if not evidence.tuned[evidence.candidate]:
        reason = "answers with the base's own weights, so nothing can have been forgotten"
        return Finding("pass", 0.0, 0.0, 0.0, gate.drop_at_most, reason, extra)
    before, after = evidence.columns.get((BASE, GENERAL)), evidence.columns.get((evidence.candidate, GENERAL))
    if before is None or after is None:
        raise Inconclusive("general ability was not measured before and after tuning")
    confidence = confidence_at_use(gate.confidence, evidence.test_set_use)
    measured = _rounded(drop(before, after, confidence=confidence, seed=evidence.seed))
    outcome = _below(measured, gate.drop_at_most)
    moved = "fell" if measured.mean > 0 else "rose" if measured.mean < 0 else "changed"
    reason = (
        f"general ability {moved} by {abs(measured.mean) * 100:.1f} points ({_level(confidence)} interval of the drop "
        f"{points(measured.low)} to {points(measured.high)}), a drop of at most {gate.drop_at_most * 100:.1f} allowed"
    )
    return Finding(
        outcome,
        measured.mean,
        measured.low,
        measured.high,
        gate.drop_at_most,
        reason,
        {**extra, "confidence": rounded(confidence)},
    )


def _above(measured: Interval, bound: float) -> Outcome:
    return "pass" if measured.low >= bound else "fail" if measured.high < bound else "inconclusive"


def _below(measured: Interval, bound: float) -> Outcome:
    return "pass" if measured.high <= bound else "fail" if measured.low > bound else "inconclusive"


def _check_size(column: Column) -> None:
    found = effective_groups(column.groups)
    if found < MINIMUM_GROUPS:
        raise Inconclusive(
            f"{len(column.ids)} test rows in groups that count as {found:.1f} of equal size: "
            f"at least {MINIMUM_GROUPS} are needed before anything is concluded"
        )


def _rounded(measured: Interval) -> Interval:
    """Judged as it is recorded, so that a reader who holds the record's numbers against the bound agrees."""
    return Interval(rounded(measured.mean), rounded(measured.low), rounded(measured.high))


def _rows_needed(measured: Interval, bound: float) -> str:
    """How many times as many rows would decide, should the mean stay: an interval shrinks with their square root."""
    gap = measured.mean - bound
    if gap == 0.0:
        return "; the mean is at the bound itself"
    reach = measured.mean - measured.low if gap > 0 else measured.high - measured.mean
    return f"; if the mean stays, about {max(1.1, (reach / gap) ** 2):.1f} times as many test rows would decide"


def _level(confidence: float) -> str:
    """0.95 is 95%; confidences tightened by repeated looks keep the digits that tell them apart."""
    return f"{confidence * 100:.4g}%"
