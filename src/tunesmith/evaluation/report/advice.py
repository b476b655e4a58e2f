"""Writes the report's advice: what to release, and why. Each sentence rests on numbers that the report shows."""

from __future__ import annotations

from collections.abc import Sequence

from tunesmith.core.text.wording import money, percent, points
from tunesmith.evaluation.probes.catalog import PROBES
from tunesmith.evaluation.report.approach_ladder import ENDPOINT
from tunesmith.evaluation.report.behaviour import policy_cautions, policy_reasons, style_reasons
from tunesmith.evaluation.report.evidence import Advice, Evidence
from tunesmith.evaluation.summary import GateResult
from tunesmith.records.evaluation import MetricInterval

# A judge that agrees with itself on fewer rows, when the two answers change places, gets a caution.
_TRUSTED_AGREEMENT = 0.8
_PHRASES = {
    "exact_match": "answers {share} requests exactly right",
    "json_valid": "gives valid JSON for {share} requests",
}


def advise(data: Evidence) -> Advice:
    """What to do, and why. The summary is one paragraph on the scores, their difference, costs and risks."""
    verdict, focus = data.verdict.verdict if data.verdict else None, data.focus
    own = [row.name for row in data.candidates if row.kind != "endpoint"]
    return Advice(
        headline=_headline(data, verdict, focus in own),
        release=focus if verdict == "pass" and focus in own else None,
        summary=" ".join([_measured(data), _difference(data), _costs(data), _risked(data)]),
        reasons=(
            *_gates(data),
            *([data.bases.sentence] if data.bases else []),
            *_ladder(data),
            *_price(data),
            *_forgotten(data),
            *policy_reasons(data),
            *style_reasons(data),
            *_next(data, own),
        ),
        cautions=tuple(_cautions(data)),
    )


def _headline(data: Evidence, verdict: str | None, ours: bool) -> str:
    """ours: whether the candidate in focus answers here, so that it can be released."""
    focus = data.focus
    if verdict is None:
        return f"{focus} was measured, but no gates have judged it."
    if not ours:
        passed = "passed its gates" if verdict == "pass" else "was judged"
        return f"{focus} {passed}, but an endpoint cannot be released."
    best = _best(data, [row.name for row in data.candidates])
    return {
        "pass": f"Release {focus}." if best == focus else f"{focus} may be released, but {best} scored higher.",
        "fail": f"Do not release {focus}.",
        "inconclusive": f"There is not enough evidence to release {focus}.",
    }[verdict]


def _best(data: Evidence, names: Sequence[str]) -> str:
    """The candidate with the highest mean; among equals the one in focus."""
    return max(names, key=lambda name: (_mean(data, name), name == data.focus))


def _says(metric: str, mean: float) -> str:
    if metric in _PHRASES:
        of_100 = mean * 100
        whole = of_100 in (0.0, 100.0) or 1.0 <= of_100 <= 99.0
        number = f"{of_100:.0f}" if whole else f"{min(max(of_100, 0.1), 99.9):.1f}"
        return _PHRASES[metric].format(share=f"{number} of 100")
    return f"scores {percent(mean)} on {metric}"


def _mean(data: Evidence, name: str) -> float:
    return data.candidate(name).metrics[data.primary].mean


def _measured(data: Evidence) -> str:
    sentence = f"{data.focus} {_says(data.primary, _mean(data, data.focus))}"
    if data.rival is not None:
        sentence += f"; {data.rival} {_says(data.primary, _mean(data, data.rival))}"
    return f"On {data.n} held-out requests, {sentence}."


def _difference(data: Evidence) -> str:
    if data.lift is None:
        if not data.candidate(data.focus).tuned:
            return f"Besides {data.focus}, 0 untuned candidates were measured, so it is compared with none."
        return "0 untuned candidates were measured, so the report cannot say what tuning adds."
    compared = data.lift.metrics[data.primary]
    gap = compared.difference
    sentence = (
        f"The difference on the same requests is {_gap(gap, data)}: "
        f"{data.focus} did better on {compared.wins} of {data.n} requests and worse on {compared.losses}; "
        f"{compared.ties} were equal."
    )
    if gap.low <= 0.0 <= gap.high:
        sentence += " The interval contains 0, so there may be no difference."
    return sentence


def _costs(data: Evidence) -> str:
    """The costs in money where they are known, with when a training is repaid, else in time."""
    focus, repaid, currency = data.candidate(data.focus), data.break_even, data.currency or ""
    cost = f"{money(focus.price.money_per_1000)} {currency}".rstrip()
    if repaid is not None and data.rival is not None:
        other = money(data.candidate(data.rival).price.money_per_1000)
        said = f"1,000 requests cost {cost} with {focus.name} and {other} {currency} with {data.rival}"
        if not repaid.training:
            return f"{said}."
        when = "lower running costs never repay it"
        if repaid.requests is not None:
            when = f"it is repaid after {repaid.requests:,} requests"
        return f"{said}. The training cost {money(repaid.training)} {currency}; {when}."
    if focus.price.money_per_1000 is not None:
        return f"1,000 requests cost {cost} with {focus.name}."
    priced = any(row.price.money_per_1000 is not None for row in data.candidates)
    unset = "" if priced else " (no prices are set)"
    if focus.kind == "endpoint":
        return f"What 1,000 requests to the endpoint {focus.name} cost is not stated{unset}."
    return f"1,000 requests take {focus.price.seconds_per_1000:,.0f} seconds of this machine{unset}."


def _risked(data: Evidence) -> str:
    """The outcomes of the risk gates, and how many risk probes were not measured."""
    gates, unmeasured = data.verdict.gates if data.verdict else (), len(data.risks.unmeasured)
    risky = [gate for gate in gates if gate.settings.probe or gate.settings.suite]
    bad = [f"{gate.name} ({gate.outcome})" for gate in risky if gate.outcome != "pass"]
    said = "0 gates limit the risks of tuning"
    if risky:
        said = f"{len(risky) - len(bad)} of {len(risky)} risk gates passed"
    said += f", all but {', '.join(bad)}" if bad else ""
    which = f"{unmeasured} of {len(PROBES)} risk probes were not" if unmeasured else "all risk probes were"
    return f"{said}; {which} measured."


def _ladder(data: Evidence) -> list[str]:
    """The best approach, what it adds to the simpler one, and the approaches that were not shown to add anything."""
    ladder, chosen = data.ladder, data.ladder.chosen
    if not ladder.steps or chosen is None:
        return []
    over = next((step for step in ladder.steps if step.candidate == chosen.candidate), None)
    gain = f"{_gap(over.difference, data)} over {over.over_approach} ({over.over}), and " if over else ""
    sentences = [
        f"The best approach is {chosen.approach} ({chosen.candidate}, {percent(chosen.mean)}): {gain}no more elaborate "
        "approach was shown to beat it."
    ]
    idle = [step for step in ladder.steps if step.difference.low <= 0.0 and step.approach != ENDPOINT]
    if idle:
        said = "; ".join(f"{step.approach} ({step.candidate}) {_gap(step.difference, data)}" for step in idle)
        sentences.append(f"Not shown to add anything to a simpler approach: {said}.")
    for step in ladder.steps:
        if step.approach == ENDPOINT:
            gap = f"{_gap(step.difference, data)} from {step.over}"
            sentences.append(f"The endpoint ({step.candidate}) differs by {gap}; it can be measured, but not released.")
    return sentences


def _gap(gap: MetricInterval, data: Evidence) -> str:
    return f"{points(gap.mean)} points ({data.confidence:.0%} interval {points(gap.low)} to {points(gap.high)})"


def _gates(data: Evidence) -> list[str]:
    if data.verdict is None:
        return []
    if data.verdict.reason:
        return [f"{len(data.verdict.gates)} gates judged it: {data.verdict.reason}."]
    if data.verdict.verdict == "pass":
        names = [gate.name for gate in data.verdict.gates]
        return [f"It passed {'its 1 gate' if len(names) == 1 else f'all {len(names)} gates'}: {', '.join(names)}."]
    return [
        f"The gate {gate.name} {'failed' if gate.outcome == 'fail' else 'is inconclusive'}: {gate.reason}."
        for gate in data.verdict.gates
        if gate.outcome != "pass"
    ]


def _price(data: Evidence) -> list[str]:
    if data.rival is None:
        return []
    rows = [data.candidate(name) for name in (data.focus, data.rival)]
    compared = {"prompt tokens": [row.price.prompt_tokens_per_1000 for row in rows]}
    if all(row.kind != "endpoint" for row in rows):  # whose seconds are time spent waiting for another machine
        compared["seconds of this machine"] = [row.price.seconds_per_1000 for row in rows]
    mine, theirs = [], []
    for what, (own, other) in compared.items():
        if own > 0:
            mine.append(f"{own:,.0f} {what}")
            theirs.append(f"{other:,.0f} ({other / own:.1f} times as many)")
    if not mine:
        return []
    return [f"For 1,000 requests {data.focus} takes {' and '.join(mine)}; {data.rival} takes {' and '.join(theirs)}."]


def _forgotten(data: Evidence) -> list[str]:
    forgetting, training = data.forgetting, data.training
    if forgetting is None:
        return []
    change = MetricInterval(mean=-forgetting.drop.mean, low=-forgetting.drop.high, high=-forgetting.drop.low)
    said = f"On {forgetting.n} general questions, tuning changed the score by {_gap(change, data)}."
    gates = data.verdict.gates if data.verdict else ()
    if training is not None and any(gate.settings.suite and gate.outcome != "pass" for gate in gates):
        share = min(1.0, 2 * training.settings.rehearse or 0.02)
        if share != training.settings.rehearse:
            said += f" With `train: {{rehearse: {share:g}}}` it keeps more of what the base can do."
    return [said]


def _next(data: Evidence, own: Sequence[str]) -> list[str]:
    """What to do now. own: all candidates but endpoints, which cannot be released."""
    focus, here = data.focus, "" if len(own) == len(data.candidates) else " that answer here"
    if data.verdict is None:
        return ["0 gates have judged it: set `gates:` and run `tunesmith gate` before a release."]
    if not own:
        return []
    if data.verdict.verdict == "inconclusive" and focus in own:
        return [_undecided(data, data.verdict.gates)]
    if (best := _best(data, own)) != focus:
        return [
            f"{best} scored highest of {len(own)} candidates{here} ({percent(_mean(data, best))} {data.primary}): "
            f"judge it with `tunesmith gate {best}`."
        ]
    if data.verdict.verdict == "pass":
        return []
    return [
        f"With {percent(_mean(data, focus))}, it is still the best of {len(own)} candidates{here}: fix what failed, or "
        "judge another one with `tunesmith gate NAME`."
    ]


def _undecided(data: Evidence, gates: Sequence[GateResult]) -> str:
    """What to do about an inconclusive verdict."""
    if not gates:
        return "0 gates are set: add `gates:` to the project file and run `tunesmith gate` again."
    unusable = [gate.name for gate in gates if gate.value is None]
    if unusable:
        return (
            f"{len(unusable)} of {len(gates)} gates have no usable evidence ({', '.join(unusable)}). Do not release on "
            "this evidence: correct what the reasons name and evaluate again."
        )
    open_gates = [gate for gate in gates if gate.outcome == "inconclusive"]
    asked = [gate.name for gate in open_gates if gate.settings.policy or gate.settings.probe or gate.settings.suite]
    said = f"More test rows may not decide {', '.join(asked)}: see why in the reason of each gate."
    if len(asked) == len(open_gates):
        return f"Do not release on this evidence. {said}"
    return (
        f"{data.n} test rows in {data.groups} groups are not enough to decide. Do not release on this evidence: "
        f"collect more rows in more groups and evaluate again.{' ' + said if asked else ''}"
    )


def _cautions(data: Evidence) -> list[str]:
    cautions = []
    uses = data.verdict.test_set_use if data.verdict else 1
    if uses > 1:
        cautions.append(f"{uses} candidates have used these test rows, so the gates' intervals are wider.")
    for row in data.candidates:
        if row.cut and row.role:
            said = "answer" if row.cut == 1 else "answers"
            cautions.append(f"{row.cut} {said} of {row.name} reached max_tokens and ended there.")
    if data.version and data.version.override:
        cautions.append(f"{data.version.label} was registered by an override: {data.version.override}.")
    for metric, by_name in data.judges.items():
        weak = {name: one for name, one in by_name.items() if one.agreement < _TRUSTED_AGREEMENT}
        if weak:
            shares = ", ".join(f"{name} {percent(one.agreement)}" for name, one in sorted(weak.items()))
            cautions.append(
                f"The judge of {metric} often changed its verdict with the order of the answers. "
                f"It gave the same verdict in both orders for: {shares}."
            )
    if data.training and data.training.more_time:
        cautions.append(f"{data.focus} was not trained to the end. {data.training.more_time}")
    cautions += policy_cautions(data)
    cautions += data.verdict.cautions if data.verdict else ()
    if conflicts := data.dataset.conflicts.requests:
        cautions.append(f"{conflicts} requests in the data have different answers: a candidate cannot give both.")
    return cautions
