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
from itertools import chain
from typing import Any, NamedTuple

from tunesmith.candidates.candidate import Kind
from tunesmith.core.errors import Inconclusive
from tunesmith.core.text.wording import percent, points
from tunesmith.evaluation.answers import BASE, before_tuning
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
    compared_metrics,
)
from tunesmith.evaluation.metrics.classification import (
    Labelled,
    brier_interval,
    calibration_error_interval,
    macro_f1_interval,
)
from tunesmith.evaluation.policy.outcomes import Tally
from tunesmith.evaluation.policy.settings import chosen_checks
from tunesmith.evaluation.probes.catalog import suite_of
from tunesmith.evaluation.probes.measuring import Measured
from tunesmith.evaluation.probes.numbers import check_groups
from tunesmith.evaluation.probes.suites import Case
from tunesmith.evaluation.scores import CONFIDENCE, GENERAL, Column, check_paired, drop, metric_interval, rounded
from tunesmith.evaluation.stats.statistics import GAPS, SHARES, Interval, Level, confidence_at_use, interval
from tunesmith.evaluation.style.shares import Classified
from tunesmith.records.evaluation import EvaluationBody, JudgedGate, MetricInterval, NoStyle, Outcome, RiskResults

_FIGURES = {
    "macro_f1": macro_f1_interval,
    "calibration_error": calibration_error_interval,
    "brier": brier_interval,
}
_NOTHING = MetricInterval(mean=0.0, low=0.0, high=0.0)  # of weights that no tuning changed


class Evidence(NamedTuple):
    """What gates judge: one evaluation, and which candidate is judged.

    body: what the evaluation's record states. candidate: the one that is judged; kind: what answers for it. use: how
    many candidates have used these test rows, with this one. columns: (candidate, metric) -> scores. measured: (suite,
    candidate) -> a risk probe's measurements. labelled: (candidate, metric) -> labels. policy: (candidate, check) ->
    outcomes of a policy check. style: which answers are taken for references.
    """

    body: EvaluationBody
    candidate: str
    kind: Kind
    use: int
    columns: Mapping[tuple[str, str], Column]
    measured: Mapping[tuple[str, str], Measured] = {}
    labelled: Mapping[tuple[str, str], Labelled] = {}
    policy: Mapping[tuple[str, str], Tally] = {}
    style: Classified | None = None

    def level(self, confidence: float) -> Level:
        """What an interval needs for this confidence at this use of the test rows. Raises Inconclusive for too many."""
        return Level(confidence_at_use(confidence, self.use), self.body.seed)

    def own(self, metric: str) -> Column:
        """The candidate's scores. Raises Inconclusive for too few groups of rows."""
        scores = self.columns[self.candidate, metric]
        check_groups("test rows", scores.groups)
        return scores

    def untouched(self) -> str | None:
        """Why there is nothing that a probe of trained weights could measure; None where there is.

        Raises Inconclusive where an endpoint answers.
        """
        if self.kind == "endpoint":
            raise Inconclusive("an endpoint answers, of whose weights nothing is known and to which no probe is sent")
        if self.body.candidates[self.candidate].tuned:
            return None
        if self.kind == "baseline":
            return "the candidate is a baseline, which answers without a language model"
        return "the candidate answers with the base model's own weights, which no tuning changed"


def judge_gate(name: str, gate: Gate, evidence: Evidence) -> JudgedGate:
    """The outcome of one gate. Unusable evidence never raises: it makes the gate inconclusive."""
    try:
        return JUDGES[type(gate)](gate, evidence).model_copy(update={"name": name})
    except Inconclusive as error:
        return not_judged(name, gate, error.what)


def not_judged(name: str, gate: Gate, reason: str) -> JudgedGate:
    """The outcome of a gate without usable evidence."""
    return _judged(gate, "inconclusive", None, reason, name=name)


def _judged(
    gate: Gate, outcome: Outcome, measured: MetricInterval | None, reason: str, *, name: str = "", **more: Any
) -> JudgedGate:
    """more: further keys of the record."""
    ends = (measured.mean, measured.low, measured.high) if measured else (None, None, None)
    stated: dict[str, Any] = dict(zip(("value", "low", "high"), ends, strict=True))
    return JudgedGate(name=name, outcome=outcome, bound=gate.bound, reason=reason, settings=gate.rule, **stated, **more)


def best_untuned(evidence: Evidence, metric: str) -> str:
    """The untuned candidate with the highest mean, without the judged one; among equals the first by name.

    The rival is chosen on the same rows that it is then compared on. That favours the rival, so the lift over it is
    understated, if anything. Raises Inconclusive where there is no untuned candidate.
    """
    stated = sorted(evidence.body.candidates.items())
    rivals = [name for name, each in stated if not each.tuned and name != evidence.candidate]
    if not rivals:
        raise Inconclusive("no untuned candidate was measured, so there is nothing to compare with")
    return max(rivals, key=lambda name: rounded(evidence.columns[name, metric].values.mean()))


def _rivals(gate: Lift | Retain, metric: str, evidence: Evidence) -> tuple[str, Column, Column]:
    """The rival's name, the candidate's scores, the rival's scores. Raises Inconclusive where they do not compare."""
    over = gate.over if isinstance(gate, Lift) else gate.not_below
    rival = best_untuned(evidence, metric) if over == BEST_UNTUNED else over
    if rival == evidence.candidate:
        raise Inconclusive("a candidate cannot be compared with itself")
    own, other = evidence.columns[evidence.candidate, metric], evidence.columns[rival, metric]
    check_paired(own, other)
    check_groups("test rows", own.groups)
    return rival, own, other


def _lift(gate: Lift, evidence: Evidence) -> JudgedGate:
    findings = [_lift_of(metric, confidence, gate, evidence) for metric, confidence in compared_metrics(gate).items()]
    lost = (each for each in findings if each.high is not None and each.high < 0.0)
    decided = (each for outcome in ("pass", "inconclusive") for each in findings if each.outcome == outcome)
    shown = next(chain(lost, decided), findings[0])
    others = (each.reason for each in findings if each is not shown)
    return shown.model_copy(update={"reason": "; or: ".join([shown.reason, *others])})


def _lift_of(metric: str, confidence: float, gate: Lift, evidence: Evidence) -> JudgedGate:
    """The finding about one of the gate's metrics."""
    rival, own, other = _rivals(gate, metric, evidence)
    level = evidence.level(confidence)
    measured = interval(own.values - other.values, own.groups, GAPS, level)
    reason = (
        f"{metric} differs from {rival} by {points(measured.mean)} points "
        f"{_within(measured, level, points)}; at least {points(gate.bound)} points required"
    )
    return _finding(gate, measured, level, reason, metric=metric, over=rival)


def _retain(gate: Retain, evidence: Evidence) -> JudgedGate:
    rival, own, other = _rivals(gate, gate.metric, evidence)
    level = evidence.level(gate.confidence)
    fall = interval(other.values - own.values, own.groups, GAPS, level)
    reason = f"{gate.metric} differs from {rival} by {_change(gate, fall, level)}"
    return _finding(gate, fall, level, reason, metric=gate.metric, not_below=rival)


def _forgetting(gate: Forgetting, evidence: Evidence) -> JudgedGate:
    stated: dict[str, Any] = {"metric": GENERAL, "over": BASE}
    if (reason := evidence.untouched()) is not None:
        return _judged(gate, "pass", _NOTHING, reason, **stated)
    suite = {name: each for (name, metric), each in evidence.columns.items() if metric == GENERAL}
    before, after = suite.get(before_tuning(evidence.candidate, suite)), suite.get(evidence.candidate)
    if before is None or after is None:
        raise Inconclusive("general ability was not measured before and after tuning")
    level = evidence.level(gate.confidence)
    fall = drop(before, after, level)
    reason = f"tuning changed general ability by {_change(gate, fall, level)}"
    return _finding(gate, fall, level, reason, rows_needed=False, **stated)


def _change(gate: Retain | Forgetting, fall: Interval, level: Level) -> str:
    """A drop (positive for a loss) as a change in words, with what the gate allows."""
    rise = Interval(-fall.mean, -fall.high, -fall.low)
    return (
        f"{points(rise.mean)} points {_within(rise, level, points)}; "
        f"a drop of at most {gate.bound * 100:g} points allowed"
    )


def _probe(gate: Probe, evidence: Evidence) -> JudgedGate:
    suite = suite_of(gate.probe)
    if (reason := evidence.untouched()) is not None and not suite.untuned:
        return _judged(gate, "pass", _NOTHING, reason, probe=gate.probe)
    told = evidence.body.risks.get(gate.suite, {}).get(evidence.candidate, RiskResults())
    if told.unusable is not None:
        raise Inconclusive(told.unusable)
    measured = evidence.measured.get((gate.suite, evidence.candidate))
    if measured is None:
        raise Inconclusive("the evaluation does not hold this probe: evaluate again with this gate in the project file")
    level = evidence.level(gate.confidence)
    test = evidence.columns[evidence.candidate, evidence.body.primary]
    shown = suite.show(Case(measured, test, level, told, gate.repeats))
    reason = f"{shown.sentence} ({_percent(level)} interval); at most {gate.bound:g} allowed"
    more = {"probe": gate.probe, **shown.extra}
    return _finding(gate, shown.interval, level, reason, rows_needed=False, **more)


def _threshold(gate: Threshold, evidence: Evidence) -> JudgedGate:
    own = evidence.own(gate.metric)
    # Without confidence the bound is on the measured rows themselves, which further uses of them do not weaken.
    level = evidence.level(gate.confidence) if gate.confidence else Level(CONFIDENCE, evidence.body.seed)
    measured = interval(own.values, own.groups, SHARES, level)
    judged = None if gate.confidence else Interval(*[rounded(measured.mean)] * 3)
    reason = (
        f"{gate.metric} is {percent(measured.mean)} {_within(measured, level, percent)}; {_required(gate)} of the "
        f"{'whole interval' if gate.confidence else 'measured mean'}"
    )
    return _finding(gate, measured, level, reason, judged=judged, metric=gate.metric)


def _whole(gate: Whole, evidence: Evidence) -> JudgedGate:
    rows = evidence.labelled.get((evidence.candidate, gate.metric))
    if rows is None:
        raise Inconclusive(f"the evaluation keeps no labels by {gate.metric!r}: name a scorer with `label`")
    evidence.own(gate.metric)
    level = evidence.level(gate.confidence)
    measured = _FIGURES[gate.figure](rows, level)
    reason = (
        f"{gate.figure} of {gate.metric} is {measured.mean:.3f} {_within(measured, level, '{:.3f}'.format)}; "
        f"{_required(gate, '')} of the whole interval"
    )
    return _finding(gate, measured, level, reason, figure=gate.figure, metric=gate.metric)


def _policy(gate: PolicyGate, evidence: Evidence) -> JudgedGate:
    name, stated = evidence.candidate, evidence.body.policy
    if stated and name in stated.candidates and (unusable := stated.candidates[name].unusable):
        raise Inconclusive(unusable)
    known = [check for of, check in evidence.policy if of == name]
    checks = chosen_checks(gate.policy, known)
    missing = next((check for check in checks if check not in known), None)
    if missing is not None or not checks:
        which = f"the policy check {missing!r}" if missing else "policy checks"
        raise Inconclusive(f"the evaluation does not hold {which}: evaluate again with this gate in the project file")
    findings = {check: _check(check, gate, evidence, len(checks)) for check in checks}
    order = {"fail": 0, "inconclusive": 1, "pass": 2}
    worst = min(findings, key=lambda check: (order[findings[check].outcome], -(findings[check].high or 0.0), check))
    others = [check for check, each in findings.items() if each.outcome != "pass" and check != worst]
    reason = findings[worst].reason + (f"; the worst of {len(checks)} checks" if len(checks) > 1 else "")
    reason += f"; not passed either: {', '.join(others)}" if others else ""
    counts = {check: evidence.policy[name, check].counts for check in checks}
    return findings[worst].model_copy(update={"reason": reason, "check": worst, "checks": counts})


def _check(check: str, gate: PolicyGate, evidence: Evidence, among: int) -> JudgedGate:
    """The finding about one check. among: how many checks share the gate's error probability."""
    tally = evidence.policy[evidence.candidate, check]
    level = Level(CONFIDENCE, evidence.body.seed)
    if gate.confidence is not None:
        level = level._replace(confidence=1.0 - (1.0 - evidence.level(gate.confidence).confidence) / among)
    try:
        if gate.confidence is not None:
            check_groups(f"requests of {check}", tally.evidence[0])
        shown = tally.share(level)
    except Inconclusive as error:
        return not_judged("", gate, f"{check}: {error.what}")
    counts = tally.counts
    # Without confidence every request is required: what decides nothing counts as kept for a failure, and as broken for
    # a pass. So does a kept answer to a request that the candidate has seen.
    asked = counts["n"] + counts["leaked"]
    doubtful = counts["broke"] + counts["undecided"] + counts["leaked"]
    required = Interval(shown.mean, rounded(counts["broke"] / asked), rounded(doubtful / asked))
    said = f"{check}: {counts['broke']} of {counts['n']} answers broke it"
    said += f", {counts['undecided']} decide nothing" if counts["undecided"] else ""
    seen = "requests that stand in what it learned from or shows are no evidence"
    said += f"; {counts['leaked']} {seen}" if counts["leaked"] else ""
    held = "the requests asked" if gate.confidence is None else "the whole interval"
    reason = f"{said} {_within(shown, level, percent)}; at most {gate.bound * 100:g}% allowed of {held}"
    judged = required if gate.confidence is None else None
    return _finding(gate, shown, level, reason, judged=judged, rows_needed=False)


def _style(gate: Style, evidence: Evidence) -> JudgedGate:
    style, stated, name = evidence.style, evidence.body.style, evidence.candidate
    if style is None:
        unusable = stated.unusable if isinstance(stated, NoStyle) else ""
        raise Inconclusive(unusable or "style was not measured: evaluate again with this gate")
    level = evidence.level(gate.confidence)
    measured = style.share(name, level)
    taken, right, wrong = (
        percent(float(flags.mean())) for flags in (style.candidates[name], style.reference, style.base)
    )
    count = style.cut.get(name, 0)
    cut = f"; {count} of the answers were cut off at max_tokens, and count as not in style" if count else ""
    reason = (
        f"{percent(measured.mean)} of the answers are in the references' style "
        f"{_within(measured, level, percent)}; a classifier takes {taken} of them for references, "
        f"{right} of the references and {wrong} of the bare base model's answers{cut}; "
        f"{_required(gate)} of the whole interval"
    )
    return _finding(gate, measured, level, reason)


# Kind of gate -> its judge, which takes a gate of this kind. A gate that is gone keeps what the record states of it.
JUDGES: Mapping[type[GateSettings], Callable[[Any, Evidence], JudgedGate]] = {
    Lift: _lift,
    Retain: _retain,
    Forgetting: _forgetting,
    Probe: _probe,
    Whole: _whole,
    PolicyGate: _policy,
    Style: _style,
    Threshold: _threshold,
    Gone: lambda gate, _: gate.stated,
}


def _finding(
    gate: Gate,
    measured: Interval,
    level: Level,
    reason: str,
    *,
    judged: Interval | None = None,
    rows_needed: bool = True,
    **more: Any,
) -> JudgedGate:
    """What follows from the interval as the record states it, so that its readers come to the same outcome.

    judged: what is compared with the bound instead. rows_needed: whether an inconclusive gate's reason says how many
    more test rows would decide. more: further keys of the record.
    """
    stated = metric_interval(measured)
    low, high = (judged.low, judged.high) if judged else (stated.low, stated.high)
    if gate.bounds_below:
        outcome: Outcome = "pass" if low >= gate.bound else "fail" if high < gate.bound else "inconclusive"
    else:
        outcome = "pass" if high <= gate.bound else "fail" if low > gate.bound else "inconclusive"
    if outcome == "inconclusive" and rows_needed:
        reason += _rows_needed(stated, gate.bound)
    return _judged(gate, outcome, stated, reason, confidence=rounded(level.confidence), **more)


def _rows_needed(measured: MetricInterval, bound: float) -> str:
    """How many times as many rows would decide if the mean stayed: an interval shrinks with the rows' square root."""
    gap = measured.mean - bound
    if gap == 0.0:
        return "; the mean equals the bound, so more rows may not decide"
    reach = measured.mean - measured.low if gap > 0 else measured.high - measured.mean
    return f"; if the mean stays, about {max(1.1, (reach / gap) ** 2):.1f} times as many test rows would decide"


def _required(gate: Threshold | Whole | Style, unit: str = "%") -> str:
    side = "at least" if gate.bounds_below else "at most"
    return f"{side} {gate.bound * (100 if unit else 1):g}{unit} required"


def _within(measured: Interval, level: Level, written: Callable[[float], str]) -> str:
    return f"({_percent(level)} interval {written(measured.low)} to {written(measured.high)})"


def _percent(level: Level) -> str:
    """0.95 as 95%. Confidences that were raised for further uses of the test rows keep four digits."""
    return f"{level.confidence * 100:.4g}%"
