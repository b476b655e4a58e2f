"""Judges gates: each compares one number of an evaluation with its bound. Outcomes: pass, fail, inconclusive.

A gate with an interval passes where the whole interval is on the allowed side of the bound, fails where the whole
interval is on the other side, and is inconclusive between. Missing, unusable or too little evidence is inconclusive.

A pass needs all gates, so each gate keeps its own error rate without correction: a release that violates any
requirement passes that gate with at most the gate's error rate (intersection-union test, Berger 1982). A failure needs
only one gate, so failures are corrected for the number of gates, in verdict.py.

The wording of reasons may change: `verdict.replay` compares outcomes and numbers, not reasons.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from tunesmith.candidates.candidate import Kind
from tunesmith.core.errors import Inconclusive
from tunesmith.core.text.wording import percent, points
from tunesmith.evaluation.answers import BASE
from tunesmith.evaluation.gates.probe_judging import Case, judge_probe
from tunesmith.evaluation.gates.settings import (
    BEST_UNTUNED,
    Forgetting,
    Gate,
    GateSettings,
    Gone,
    Lift,
    PolicyGate,
    Probe,
    Retain,
    Style,
    Threshold,
    Whole,
)
from tunesmith.evaluation.metrics.classification import brier_interval, calibration_error_interval, macro_f1_interval
from tunesmith.evaluation.metrics.labels import Labelled
from tunesmith.evaluation.policy.outcomes import Tally
from tunesmith.evaluation.probes.items import Measured
from tunesmith.evaluation.probes.numbers import check_groups
from tunesmith.evaluation.probes.suites import suite_of
from tunesmith.evaluation.scores import GENERAL, Column, check_paired, drop, rounded
from tunesmith.evaluation.stats.statistics import Interval, confidence_at_use, interval
from tunesmith.evaluation.style.shares import Classified
from tunesmith.records.evaluation import RiskResults
from tunesmith.records.verdict import Outcome

_FIGURES = {
    "macro_f1": macro_f1_interval,
    "calibration_error": calibration_error_interval,
    "brier": brier_interval,
}


@dataclass(frozen=True, slots=True)
class Evidence:
    """What gates judge: the scores of one evaluation, and which candidate is judged.

    columns: (candidate, metric) -> scores. tuned: candidate -> whether it has trained weights. candidate: the one that
    is judged; kind: what answers for it. test_set_use: how many candidates have used these test rows, with this one.
    measured, told: (suite, candidate) -> a risk probe's measurements, and the evaluation record's account of them.
    primary: the primary metric. labelled: (candidate, metric) -> labels. policy: (candidate, check) -> outcomes of a
    policy check; no_policy: candidate -> why it has none. style: which answers are taken for references, or no_style:
    why not.
    """

    columns: Mapping[tuple[str, str], Column]
    tuned: Mapping[str, bool]
    candidate: str
    test_set_use: int
    seed: int
    measured: Mapping[tuple[str, str], Measured] = field(default_factory=dict)
    told: Mapping[tuple[str, str], RiskResults] = field(default_factory=dict)
    primary: str = ""
    labelled: Mapping[tuple[str, str], Labelled] = field(default_factory=dict)
    policy: Mapping[tuple[str, str], Tally] = field(default_factory=dict)
    style: Classified | None = None
    no_policy: Mapping[str, str] = field(default_factory=dict)
    no_style: str = ""
    kind: Kind = "model"

    def confidence(self, wanted: float) -> float:
        """The confidence that an interval needs at this use of the test rows. Raises Inconclusive for too many uses."""
        return confidence_at_use(wanted, self.test_set_use)


@dataclass(frozen=True, slots=True)
class GateFinding:
    """A gate's outcome. value, low, high: None where nothing could be measured. extra: further keys of the record."""

    outcome: Outcome
    value: float | None
    low: float | None
    high: float | None
    bound: float
    reason: str
    extra: Mapping[str, Any] = field(default_factory=dict)


def judge_gate(gate: Gate, evidence: Evidence) -> GateFinding:
    """The finding of one gate. Unusable evidence never raises: it makes the gate inconclusive."""
    try:
        return JUDGES[type(gate)](gate, evidence)
    except Inconclusive as error:
        return not_judged(gate, error.what)


def not_judged(gate: Gate, reason: str) -> GateFinding:
    """The finding of a gate without usable evidence."""
    return GateFinding("inconclusive", None, None, None, gate.bound, reason)


def best_untuned(evidence: Evidence, metric: str) -> str:
    """The untuned candidate with the highest mean, without the judged one; among equals the first by name.

    The rival is chosen on the same rows that it is then compared on. That favours the rival, so the lift over it is
    understated, if anything. Raises Inconclusive where there is no untuned candidate.
    """
    rivals = [name for name, tuned in sorted(evidence.tuned.items()) if not tuned and name != evidence.candidate]
    if not rivals:
        raise Inconclusive("no untuned candidate was measured, so there is nothing to compare with")
    return max(rivals, key=lambda name: rounded(float(np.mean(evidence.columns[name, metric].values))))


def _rivals(metric: str, over: str, evidence: Evidence) -> tuple[str, Column, Column]:
    """The rival's name, the candidate's scores, the rival's scores. Raises Inconclusive where they do not compare."""
    rival = best_untuned(evidence, metric) if over == BEST_UNTUNED else over
    if rival == evidence.candidate:
        raise Inconclusive("a candidate cannot be compared with itself")
    own, other = evidence.columns[evidence.candidate, metric], evidence.columns[rival, metric]
    check_paired(own, other)
    check_groups("test rows", own.groups)
    return rival, own, other


def _lift(gate: Lift, evidence: Evidence) -> GateFinding:
    rival, own, other = _rivals(gate.metric, gate.over, evidence)
    confidence = evidence.confidence(gate.confidence)
    measured = _rounded(
        interval(own.values - other.values, own.groups, ends=(-1.0, 1.0), confidence=confidence, seed=evidence.seed)
    )
    reason = (
        f"{gate.metric} differs from {rival} by {points(measured.mean)} points "
        f"{_within(measured, confidence, points)}; at least {points(gate.bound)} points required"
    )
    extra = {"metric": gate.metric, "over": rival, "confidence": rounded(confidence)}
    return _finding(gate, _above(measured, gate.bound), measured, reason, extra)


def _retain(gate: Retain, evidence: Evidence) -> GateFinding:
    rival, own, other = _rivals(gate.metric, gate.not_below, evidence)
    confidence = evidence.confidence(gate.confidence)
    fall = interval(other.values - own.values, own.groups, ends=(-1.0, 1.0), confidence=confidence, seed=evidence.seed)
    extra = {"metric": gate.metric, "not_below": rival}
    return _limited(gate, fall, f"{gate.metric} differs from {rival}", confidence, extra)


def _probe(gate: Probe, evidence: Evidence) -> GateFinding:
    extra: dict[str, Any] = {"probe": gate.probe}
    _check_weights(evidence)
    if not evidence.tuned[evidence.candidate] and not suite_of(gate.suite).untuned:
        return _untouched(gate, evidence, extra)
    key = gate.suite, evidence.candidate
    told = evidence.told.get(key, RiskResults())
    if told.unusable is not None:
        raise Inconclusive(told.unusable)
    if key not in evidence.measured:
        raise Inconclusive("the evaluation does not hold this probe: evaluate again with this gate in the project file")
    confidence = evidence.confidence(gate.confidence)
    test = evidence.columns[evidence.candidate, evidence.primary]
    shown = judge_probe(Case(gate, evidence.measured[key], test, confidence, evidence.seed, told))
    measured = _rounded(shown.interval)
    reason = f"{shown.sentence} ({_level(confidence)} interval); at most {gate.bound:g} allowed"
    extra = {**extra, **shown.extra, "confidence": rounded(confidence)}
    return _finding(gate, _below(measured, gate.bound), measured, reason, extra, rows_needed=False)


def _threshold(gate: Threshold, evidence: Evidence) -> GateFinding:
    own = evidence.columns[evidence.candidate, gate.metric]
    check_groups("test rows", own.groups)
    # Without confidence the bound is on the measured rows themselves, which further uses of them do not weaken.
    confidence = evidence.confidence(gate.confidence) if gate.confidence else 0.95
    measured = _rounded(interval(own.values, own.groups, ends=(0.0, 1.0), confidence=confidence, seed=evidence.seed))
    judged = measured if gate.confidence else Interval(measured.mean, measured.mean, measured.mean)
    reason = (
        f"{gate.metric} is {percent(measured.mean)} {_within(measured, confidence, percent)}; "
        f"{_side_told(gate)} {gate.bound * 100:g}% required of the "
        f"{'whole interval' if gate.confidence else 'measured mean'}"
    )
    extra = {"metric": gate.metric, "confidence": rounded(confidence)}
    return _finding(gate, _side(gate, judged), measured, reason, extra)


def _whole(gate: Whole, evidence: Evidence) -> GateFinding:
    rows = evidence.labelled.get((evidence.candidate, gate.metric))
    if rows is None:
        raise Inconclusive(f"the evaluation keeps no labels by {gate.metric!r}: name a scorer with `label`")
    check_groups("test rows", evidence.columns[evidence.candidate, gate.metric].groups)
    confidence = evidence.confidence(gate.confidence)
    measured = _rounded(_FIGURES[gate.figure](rows, confidence, evidence.seed))
    reason = (
        f"{gate.figure} of {gate.metric} is {measured.mean:.3f} {_within(measured, confidence, '{:.3f}'.format)}; "
        f"{_side_told(gate)} {gate.bound:g} required of the whole interval"
    )
    extra = {"figure": gate.figure, "metric": gate.metric, "confidence": rounded(confidence)}
    return _finding(gate, _side(gate, measured), measured, reason, extra)


def _policy(gate: PolicyGate, evidence: Evidence) -> GateFinding:
    name = evidence.candidate
    if name in evidence.no_policy:
        raise Inconclusive(evidence.no_policy[name])
    known = [check for of, check in evidence.policy if of == name]
    checks = gate.chosen(known)
    missing = next((check for check in checks if check not in known), None)
    if missing is not None or not checks:
        which = f"the policy check {missing!r}" if missing else "policy checks"
        raise Inconclusive(f"the evaluation does not hold {which}: evaluate again with this gate in the project file")
    findings = {check: _check(check, gate, evidence, len(checks)) for check in checks}
    order = {"fail": 0, "inconclusive": 1, "pass": 2}
    worst = min(findings, key=lambda check: (order[findings[check].outcome], -(findings[check].high or 0.0), check))
    others = [check for check, each in findings.items() if each.outcome != "pass" and check != worst]
    found = findings[worst]
    reason = found.reason + (f"; the worst of {len(checks)} checks" if len(checks) > 1 else "")
    reason += f"; not passed either: {', '.join(others)}" if others else ""
    counts = {check: evidence.policy[name, check].counts for check in checks}
    return replace(found, reason=reason, extra={"check": worst, "checks": counts, **found.extra})


def _check(check: str, gate: PolicyGate, evidence: Evidence, among: int) -> GateFinding:
    """The finding about one check. among: how many checks share the gate's error probability."""
    tally = evidence.policy[evidence.candidate, check]
    confidence = 0.95
    if gate.confidence is not None:
        confidence = 1.0 - (1.0 - evidence.confidence(gate.confidence)) / among
    try:
        if gate.confidence is not None:
            check_groups(f"requests of {check}", tally.evidence[0])
        shown = _rounded(tally.share(confidence, evidence.seed))
    except Inconclusive as error:
        return not_judged(gate, f"{check}: {error.what}")
    counts = tally.counts
    # Without confidence every request is required: what decides nothing counts as kept for a failure, and as broken for
    # a pass. So does a kept answer to a request that the candidate has seen.
    asked = counts["n"] + counts["leaked"]
    doubtful = counts["broke"] + counts["undecided"] + counts["leaked"]
    required = Interval(shown.mean, rounded(counts["broke"] / asked), rounded(doubtful / asked))
    judged = shown if gate.confidence is not None else required
    said = f"{check}: {counts['broke']} of {counts['n']} answers broke it"
    said += f", {counts['undecided']} decide nothing" if counts["undecided"] else ""
    seen = "requests that stand in what it learned from or shows are no evidence"
    said += f"; {counts['leaked']} {seen}" if counts["leaked"] else ""
    held = "the requests asked" if gate.confidence is None else "the whole interval"
    reason = f"{said} {_within(shown, confidence, percent)}; at most {gate.bound * 100:g}% allowed of {held}"
    extra = {"confidence": rounded(confidence)}
    return _finding(gate, _below(judged, gate.bound), shown, reason, extra, rows_needed=False)


def _style(gate: Style, evidence: Evidence) -> GateFinding:
    if evidence.style is None:
        raise Inconclusive(evidence.no_style or "style was not measured: evaluate again with this gate")
    confidence = evidence.confidence(gate.confidence)
    measured = _rounded(evidence.style.share(evidence.candidate, confidence, evidence.seed))
    taken, right, wrong = (
        float(flags.mean())
        for flags in (evidence.style.candidates[evidence.candidate], evidence.style.reference, evidence.style.base)
    )
    count = evidence.style.cut.get(evidence.candidate, 0)
    cut = f"; {count} of the answers were cut off at max_tokens, and count as not in style" if count else ""
    reason = (
        f"{percent(measured.mean)} of the answers are in the references' style "
        f"{_within(measured, confidence, percent)}; a classifier takes {percent(taken)} of them for references, "
        f"{percent(right)} of the references and {percent(wrong)} of the bare base model's answers{cut}; "
        f"{_side_told(gate)} {gate.bound * 100:g}% required of the whole interval"
    )
    return _finding(gate, _side(gate, measured), measured, reason, {"confidence": rounded(confidence)})


def _forgetting(gate: Forgetting, evidence: Evidence) -> GateFinding:
    extra: dict[str, Any] = {"metric": GENERAL, "over": BASE}
    _check_weights(evidence)
    if not evidence.tuned[evidence.candidate]:
        return _untouched(gate, evidence, extra)
    before, after = evidence.columns.get((BASE, GENERAL)), evidence.columns.get((evidence.candidate, GENERAL))
    if before is None or after is None:
        raise Inconclusive("general ability was not measured before and after tuning")
    confidence = evidence.confidence(gate.confidence)
    fall = drop(before, after, confidence=confidence, seed=evidence.seed)
    return _limited(gate, fall, "tuning changed general ability", confidence, extra, rows_needed=False)


def _gone(gate: Gone, evidence: Evidence) -> GateFinding:
    """The finding of then, as the verdict's record states it."""
    return GateFinding(gate.outcome, gate.stated.value, gate.stated.low, gate.stated.high, gate.bound, "")


def _limited(
    gate: Retain | Forgetting,
    fall: Interval,
    what: str,
    confidence: float,
    extra: Mapping[str, Any],
    *,
    rows_needed: bool = True,
) -> GateFinding:
    """The finding of a gate that limits a drop. fall: the drop, positive for a loss. what: the change, in words."""
    measured = _rounded(fall)
    rise = Interval(-measured.mean, -measured.high, -measured.low)
    reason = (
        f"{what} by {points(-measured.mean)} points {_within(rise, confidence, points)}; "
        f"a drop of at most {gate.bound * 100:g} points allowed"
    )
    extra = {**extra, "confidence": rounded(confidence)}
    return _finding(gate, _below(measured, gate.bound), measured, reason, extra, rows_needed=rows_needed)


# Kind of gate -> its judge, which takes a gate of this kind.
JUDGES: Mapping[type[GateSettings], Callable[[Any, Evidence], GateFinding]] = {
    Lift: _lift,
    Retain: _retain,
    Forgetting: _forgetting,
    Probe: _probe,
    Whole: _whole,
    PolicyGate: _policy,
    Style: _style,
    Threshold: _threshold,
    Gone: _gone,
}


def _finding(
    gate: Gate,
    outcome: Outcome,
    measured: Interval,
    reason: str,
    extra: Mapping[str, Any],
    *,
    rows_needed: bool = True,
) -> GateFinding:
    """rows_needed: whether an inconclusive gate's reason says how many more test rows would decide."""
    if outcome == "inconclusive" and rows_needed:
        reason += _rows_needed(measured, gate.bound)
    return GateFinding(outcome, measured.mean, measured.low, measured.high, gate.bound, reason, extra)


def _check_weights(evidence: Evidence) -> None:
    """Raise Inconclusive where an endpoint answers."""
    if evidence.kind == "endpoint":
        raise Inconclusive("an endpoint answers, of whose weights nothing is known and to which no probe is sent")


def _untouched(gate: Gate, evidence: Evidence, extra: Mapping[str, Any]) -> GateFinding:
    """The finding where nothing was trained that a probe could measure."""
    reason = "the candidate answers with the base model's own weights, which no tuning changed"
    if evidence.kind == "baseline":
        reason = "the candidate is a baseline, which answers without a language model"
    return GateFinding("pass", 0.0, 0.0, 0.0, gate.bound, reason, extra)


def _side(gate: Threshold | Whole | Style, measured: Interval) -> Outcome:
    return _above(measured, gate.bound) if gate.at_least is not None else _below(measured, gate.bound)


def _above(measured: Interval, bound: float) -> Outcome:
    return "pass" if measured.low >= bound else "fail" if measured.high < bound else "inconclusive"


def _below(measured: Interval, bound: float) -> Outcome:
    return "pass" if measured.high <= bound else "fail" if measured.low > bound else "inconclusive"


def _rounded(measured: Interval) -> Interval:
    """The interval as the record states it, so that a reader who compares the record's numbers gets the outcome."""
    return Interval(rounded(measured.mean), rounded(measured.low), rounded(measured.high))


def _rows_needed(measured: Interval, bound: float) -> str:
    """How many times as many rows would decide if the mean stayed: an interval shrinks with the rows' square root."""
    gap = measured.mean - bound
    if gap == 0.0:
        return "; the mean equals the bound, so more rows may not decide"
    reach = measured.mean - measured.low if gap > 0 else measured.high - measured.mean
    return f"; if the mean stays, about {max(1.1, (reach / gap) ** 2):.1f} times as many test rows would decide"


def _side_told(gate: Threshold | Whole | Style) -> str:
    return "at least" if gate.at_least is not None else "at most"


def _within(measured: Interval, confidence: float, written: Callable[[float], str]) -> str:
    return f"({_level(confidence)} interval {written(measured.low)} to {written(measured.high)})"


def _level(confidence: float) -> str:
    """0.95 as 95%. Confidences that were raised for further uses of the test rows keep four digits."""
    return f"{confidence * 100:.4g}%"
