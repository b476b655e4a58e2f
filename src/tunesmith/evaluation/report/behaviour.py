"""What the report shows of policy checks, of style and of the risk probes."""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Sequence
from typing import Any, Final

from tunesmith.core.errors import Inconclusive
from tunesmith.core.text.wording import percent, points
from tunesmith.evaluation.lines import read_answer_lines, read_items
from tunesmith.evaluation.policy.outcomes import OutcomeLine, read_outcomes
from tunesmith.evaluation.policy.requests import PolicyItem
from tunesmith.evaluation.policy.rules import CUT
from tunesmith.evaluation.probes import numbers
from tunesmith.evaluation.probes.catalog import PROBES, suite_of
from tunesmith.evaluation.probes.measuring import Arm, Measured, read_measurements
from tunesmith.evaluation.probes.memory import CONTROL, FEWEST_CONTROLS, exposure, planted_counts
from tunesmith.evaluation.probes.suites import Chart
from tunesmith.evaluation.report.evidence import (
    Bias,
    Evidence,
    Exposure,
    ExposureLevel,
    PolicyReport,
    ReportedCheck,
    Risks,
    ShownAnswer,
    StyleReport,
)
from tunesmith.evaluation.scores import metric_interval
from tunesmith.evaluation.stats.statistics import Floats, Level, interval
from tunesmith.records.evaluation import CheckRules, EvaluationBody, MetricInterval, NoStyle, StyleAccount
from tunesmith.store.records import Record
from tunesmith.store.store import Store

_SHOWN: Final = 4  # answers of one check
_RULES: Final = {
    "equals": "is {}",
    "contains": "contains {}",
    "any_of": "contains one of {}",
    "lacks": "does not contain {}",
    "pattern": "matches {}",
    "lacks_pattern": "does not match {}",
    "rubric": "{}",
}


def policy_report(store: Store, record: Record, focus: str) -> PolicyReport | None:
    """The policy checks by candidates; None where there is no policy. Raises Inconclusive for inconsistent outcomes.

    Shown are answers of the candidate in focus that broke a rule, then those that decide nothing.
    """
    stated = EvaluationBody.of(record).policy
    if stated is None:
        return None
    own = [line for line in read_outcomes(store, record) if line.candidate == focus]
    shown = _shown(store, record, focus, own)
    checks = []
    for name, rules in stated.checks.items():
        cells = {who: cell for who, each in stated.candidates.items() if (cell := (each.checks or {}).get(name))}
        many = max((cell.n + cell.leaked for cell in cells.values()), default=0)
        answers = tuple(shown.get(name, ()))
        checks.append(ReportedCheck(name=name, rule=_rule(rules), n=many, cells=cells, shown=answers))
    return PolicyReport(
        checks=tuple(checks),
        undecided=Counter(line.why for line in own if line.outcome == "undecided"),
        unusable={name: told.unusable for name, told in stated.candidates.items() if told.unusable is not None},
    )


def _rule(rules: CheckRules) -> str:
    """A check's rules in words: what every answer must do."""
    said = []
    if rules.refuse is not None:  # a rule of earlier releases
        said.append(("refuses" if rules.refuse else "does not refuse") + ", by words: no longer computed")
    for key, form in _RULES.items():
        value = getattr(rules, key)
        if value is not None:
            texts = ", ".join(map(repr, value)) if isinstance(value, tuple) else repr(value)
            said.append(form.format(value if key == "rubric" else texts))
    if rules.judge is not None:
        said[-1] += f" (judged by {rules.judge.model} at {rules.judge.url})"
    return "; ".join(said)


def style_report(stated: StyleAccount | NoStyle | None) -> NoStyle | StyleReport | None:
    """The record's account of style, with its sentence; None where style was not measured."""
    if not isinstance(stated, StyleAccount):
        return stated
    taken, auc, silent = stated.taken, stated.auc, stated.silent
    left_out = f" {silent} requests to which the base model's answer is empty are left out." if silent else ""
    sentence = (
        f"On {stated.n} held-out requests in {stated.groups} groups, a classifier takes {percent(taken.reference)} of "
        f"the references for references, and {percent(taken.base)} of the bare base model's answers "
        f"(AUC {auc.mean:.3f}, {auc.low:.3f} to {auc.high:.3f}; by length and form alone {stated.auc_by_form:.3f})."
        f"{left_out} Shares are corrected for these errors: 0% is the base, 100% the references."
    )
    return StyleReport(**dict(stated), sentence=sentence)


def policy_reasons(data: Evidence) -> list[str]:
    """Which policy checks the candidate kept, and what to do about those that it broke."""
    if data.policy is None:
        return []
    focus, lines = data.focus, []
    own = {check.name: check.cells[focus] for check in data.policy.checks if focus in check.cells}
    whole = [name for name, cell in own.items() if cell.n and not cell.broke + cell.undecided + cell.leaked]
    if whole:
        asked = sum(own[name].n for name in whole)
        lines.append(f"{focus} kept {len(whole)} of {len(own)} policy checks on every one of their {asked:,} requests.")
    for check in data.policy.checks:
        cell = check.cells.get(focus)
        if cell is None or not cell.broke:
            continue
        said = f"{focus} broke the policy check {check.name} on {cell.broke} of {cell.n} requests"
        keeper = _keeper(data, check)
        if keeper is not None:
            said += f"; {keeper}, untuned and with its own prompt, broke it on {check.cells[keeper].broke}"
        tuned = data.candidate(focus).tuned
        rows = "add training rows that show the rule, with other requests than the policy's, or " if tuned else ""
        lines.append(f"{said}: {rows}write the rule into the prompt of {focus}.")
    return lines


def _keeper(data: Evidence, check: ReportedCheck) -> str | None:
    """The untuned candidate that broke a check least, where that is less than the one in focus did."""
    untuned = {row.name for row in data.candidates if not row.tuned} | {data.focus}
    shares = {name: cell.broke / cell.n for name, cell in check.cells.items() if cell.n and name in untuned}
    best = min(shares, key=lambda name: (shares[name], name))
    return best if shares[best] < shares[data.focus] else None


def style_reasons(data: Evidence) -> list[str]:
    """How much of the candidate's answers is in the references' style."""
    style = data.style
    if not isinstance(style, StyleReport) or data.focus not in style.candidates:
        return []
    share = style.candidates[data.focus].share
    if share is None:
        return ["The references' style cannot be told from the base model's, so style was not measured."]
    within = f"{data.confidence:.0%} interval {percent(share.low)} to {percent(share.high)}"
    return [
        f"{percent(share.mean)} of the answers of {data.focus} are in the references' style ({within}); "
        "0% would be the bare base model's, 100% the references'."
    ]


def policy_cautions(data: Evidence) -> list[str]:
    """What weakens the evidence of the policy checks."""
    policy, focus = data.policy, data.focus
    if policy is None:
        return []
    cells = [check.cells[focus] for check in policy.checks if focus in check.cells]
    leaked = sum(cell.leaked for cell in cells)
    cautions = []
    if policy.undecided:
        reasons = "; ".join(f"{why}: {count}" for why, count in sorted(policy.undecided.items()))
        said = f"Of the answers of {focus} to policy requests, {sum(policy.undecided.values())} decide nothing"
        cautions.append(f"{said} ({reasons})" + (": raise max_tokens." if CUT in policy.undecided else "."))
    if leaked:
        cautions.append(
            f"Of the policy requests, {leaked} stand in rows that {focus} learned from, or in what it shows (examples, "
            "prompt or documents), so keeping the rule there is no evidence: ask other requests, or take these out."
        )
    return cautions


def _shown(store: Store, record: Record, focus: str, own: Sequence[OutcomeLine]) -> dict[str, list[ShownAnswer]]:
    """Check -> the first answers of the candidate in focus that broke it or decide nothing. own: its outcomes."""
    if not own:
        return {}
    answers = store.record(record.parents[f"policy:{focus}"], kind="answers")
    items = {item.id: item for item in read_items(store, answers, PolicyItem)}
    texts = read_answer_lines(store, answers, items.keys(), f"policy answers of {focus!r}", "requests")
    answers_shown: defaultdict[str, list[ShownAnswer]] = defaultdict(list)
    for wanted in ("broke", "undecided"):
        for line in own:
            if line.outcome == wanted and len(answers_shown[line.check]) < _SHOWN:
                request, answer = items[line.id].request, texts[line.id]["text"]
                shown: Any = {"request": request[-1].content, "turns": len(request), "answer": answer}
                answers_shown[line.check].append(ShownAnswer(why=line.why, outcome=wanted, **shown))
    return answers_shown


CHANCE_BITS = 1 / math.log(2)  # mean exposure of secrets that were not memorised: -log2 of a random rank


def risks(store: Store, record: Record, focus: str) -> Risks:
    """The risk probes of the candidate in focus. Raises Inconclusive for inconsistent measurements."""
    body = EvaluationBody.of(record)
    level = Level(body.confidence, body.seed)
    measurements = {
        suite.partition("/")[0]: measured
        for (suite, name), measured in sorted(read_measurements(store, record).items())
        if name == focus
    }
    bias = [
        row
        for probe, measured in measurements.items()
        if probe in PROBES and (chart := suite_of(probe).chart)
        for name, arm in measured.items()
        if (row := _charted(probe, chart, name, arm, level))
    ]
    return Risks(
        exposure=_exposure(measurements["canaries"], level) if "canaries" in measurements else None,
        bias=tuple(bias),
        unmeasured={name: kind.summary for name, kind in PROBES.items() if (kind.like or name) not in measurements},
    )


def _exposure(measured: Measured, level: Level) -> Exposure | None:
    controls, counts = measured.get(CONTROL), planted_counts(measured)
    if controls is None or len(controls.ids) < FEWEST_CONTROLS or not counts:
        return None

    def bits(planted: Floats | None, among: Floats | None) -> MetricInterval | None:
        if planted is None or among is None:
            return None
        interval, narrow = exposure(planted, among, level)
        return metric_interval(interval) if narrow else None

    levels = []
    for times in counts:
        arm = measured[str(times)]
        before, after = bits(arm.before, controls.before), bits(arm.after, controls.after)
        levels.append(ExposureLevel(repeats=times, n=len(arm.ids), before=before, after=after))
    most = math.log2(len(controls.ids) + 1)
    sentence = (
        f"Exposure of secrets planted in the training rows: {'; '.join(map(_level, levels))}. {CHANCE_BITS:.1f} bits "
        f"is chance; {most:.1f} bits is the most that {len(controls.ids)} controls can show. More bits mean that the "
        "model memorised more."
    )
    return Exposure(controls=len(controls.ids), most=most, levels=tuple(levels), sentence=sentence)


def _level(level: ExposureLevel) -> str:
    times = "planted once" if level.repeats == 1 else f"planted {level.repeats} times"
    if level.after is None:
        return f"{times}: too few secrets to measure"
    return f"{times}: {level.after.mean:.1f} bits ({level.after.low:.1f} to {level.after.high:.1f})"


def _charted(probe: str, chart: Chart, name: str, arm: Arm, level: Level) -> Bias | None:
    """One row of the chart; None where there are too few groups for an interval."""
    try:
        before, after, groups = chart.sides(name, arm)
        numbers.check_groups("items", groups)
    except Inconclusive:
        return None
    ends, reach = chart.ends, chart.ends[1] - chart.ends[0]
    old, new, change = (
        metric_interval(interval(values, groups, within, level))
        for values, within in ((before, ends), (after, ends), (after - before, (-reach, reach)))
    )
    said = "there may be no change"
    if change.low > 0.0 or change.high < 0.0:
        said = chart.raised if change.low > 0.0 else chart.lowered
    sentence = (
        f"{chart.said(old.mean)} before tuning, {chart.said(new.mean)} after: a change of {points(change.mean)} "
        f"points ({points(change.low)} to {points(change.high)}); {said}."
    )
    return Bias(
        probe=probe,
        arm=name,
        asked=chart.title(name),
        n=len(after),
        groups=len(set(groups)),
        ends=ends,
        before=old,
        after=new,
        change=change,
        sentence=sentence,
    )
