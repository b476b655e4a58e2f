"""What to release and why, in plain words: each sentence stands on numbers that the report shows."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tunesmith.evaluation.report.approach_ladder import ENDPOINT
from tunesmith.evaluation.report.wording import money, percent, points
from tunesmith.evaluation.settings import PROBES

# Below this share of rows judged alike in both orders a judge's word is marked as weak.
_TRUSTED_AGREEMENT = 0.8
_PHRASES = {
    "exact_match": "answers {share} exactly right",
    "json_valid": "gives valid JSON for {share}",
}


def advise(data: Mapping[str, Any]) -> dict[str, Any]:
    """{"headline", "release": a candidate's name or None, "summary", "reasons": [sentence], "cautions": [sentence]}.

    summary: one paragraph on the approach, its certainty, cost and risks. data: as report_data returns it.
    """
    verdict = data["verdict"]["verdict"] if data["verdict"] else None
    focus, best = data["focus"], data["candidates"][0]["name"]
    headlines = {
        "pass": f"Release {focus}." if best == focus else f"{focus} may be released; {best} did better.",
        "fail": f"Do not release {focus}.",
        "inconclusive": f"The evidence on {focus} does not decide.",
        None: f"{focus} was measured, not judged.",
    }
    return {
        "headline": headlines[verdict],
        "release": focus if verdict == "pass" else None,
        "summary": " ".join([_approach(data), *_sure(data), *_costs(data), _risked(data)]),
        "reasons": [
            _measured(data),
            *_difference(data),
            *_gates(data),
            *_ladder(data),
            *_price(data),
            *_money(data),
            *_forgotten(data),
            *_next(data, verdict, best),
        ],
        "cautions": _cautions(data),
    }


def _says(metric: str, mean: float) -> str:
    if metric in _PHRASES:
        of_100 = mean * 100
        whole = of_100 in (0.0, 100.0) or 1.0 <= of_100 <= 99.0
        number = f"{of_100:.0f}" if whole else f"{min(max(of_100, 0.1), 99.9):.1f}"
        return _PHRASES[metric].format(share=f"{number} of 100")
    return f"scores {percent(mean)} by {metric}"


def _mean(data: Mapping[str, Any], name: str) -> float:
    row = next(row for row in data["candidates"] if row["name"] == name)
    return float(row["metrics"][data["primary"]]["mean"])


def _measured(data: Mapping[str, Any]) -> str:
    sentence = f"{data['focus']} {_says(data['primary'], _mean(data, data['focus']))}"
    if data["rival"] is not None:
        sentence += f"; {data['rival']} {_says(data['primary'], _mean(data, data['rival']))}"
    return f"On {data['n']} held-out requests, {sentence}."


def _difference(data: Mapping[str, Any]) -> list[str]:
    if data["lift"] is None:
        return ["0 untuned candidates were measured beside it, so nothing shows what tuning adds."]
    found = data["lift"]["metrics"][data["primary"]]
    gap, confidence = found["difference"], f"{data['confidence']:.0%}"
    sentence = (
        f"On the same requests that is a difference of {points(gap['mean'])} points "
        f"({confidence} interval {points(gap['low'])} to {points(gap['high'])}): "
        f"{found['wins']} won, {found['losses']} lost, {found['ties']} alike."
    )
    if gap["low"] <= 0.0 <= gap["high"]:
        sentence += " No difference at all is within that interval."
    return [sentence]


def _approach(data: Mapping[str, Any]) -> str:
    chosen, focus = data["ladder"]["chosen"], data["focus"]
    said = f"{focus} {_says(data['primary'], _mean(data, focus))}"
    if chosen is None or chosen["candidate"] == focus:
        return f"The approach is {chosen['approach']}: {said}." if chosen else f"{said}."
    return f"{said}; the simplest way that nothing was shown to beat is {chosen['approach']} ({chosen['candidate']})."


def _sure(data: Mapping[str, Any]) -> list[str]:
    if data["lift"] is None:
        return []
    gap = data["lift"]["metrics"][data["primary"]]["difference"]
    reach = f"{data['confidence']:.0%} interval {points(gap['low'])} to {points(gap['high'])}"
    likely = "more than chance explains" if gap["low"] > 0 or gap["high"] < 0 else "which chance alone may explain"
    return [f"Against {data['rival']} that is {points(gap['mean'])} points ({reach}; {data['n']} requests), {likely}."]


def _costs(data: Mapping[str, Any]) -> list[str]:
    """In money where prices are stated, else in time."""
    if money_told := _money(data):
        return money_told
    price = next(row["price"] for row in data["candidates"] if row["name"] == data["focus"])
    return [f"1,000 requests take {price['seconds_per_1000']:,.0f} seconds of this machine; no prices are stated."]


def _risked(data: Mapping[str, Any]) -> str:
    """What its risk gates found, and how much of what tuning can break was not looked at."""
    gates = data["verdict"]["gates"] if data["verdict"] else []
    risky = [gate for gate in gates if {"probe", "suite"} & gate["settings"].keys()]
    unmeasured = len(data["risks"]["unmeasured"])
    rest = f"{unmeasured} of {len(PROBES)} risk probes were not made" if unmeasured else "every risk probe was made"
    if not risky:
        return f"No gate holds the risks of tuning to a bound; {rest}."
    bad = [f"{gate['name']} ({gate['outcome']})" for gate in risky if gate["outcome"] != "pass"]
    within = f"{len(risky) - len(bad)} of {len(risky)} risks held to a bound are within it"
    beyond = f", not {', '.join(bad)}" if bad else ""
    return f"{within}{beyond}; {rest}."


def _ladder(data: Mapping[str, Any]) -> list[str]:
    """Which approach to use, what it adds to the simpler one, and what was tried and not shown to add anything."""
    found, confidence = data["ladder"], f"{data['confidence']:.0%}"
    if not found["steps"]:
        return []
    chosen = found["chosen"]
    sentence = f"The approach is {chosen['approach']} ({chosen['candidate']}, {percent(chosen['mean'])})"
    over = next((step for step in found["steps"] if step["candidate"] == chosen["candidate"]), None)
    if over is None:
        sentence += ": nothing more elaborate was shown to beat it"
    else:
        sentence += f": {_gap(over, confidence)} over {over['over_approach']} ({over['over']})"
        sentence += ", and nothing more elaborate was shown to beat it"
    sentences = [f"{sentence}."]
    idle = [step for step in found["steps"] if step["difference"]["low"] <= 0.0 and step["approach"] != ENDPOINT]
    if idle:
        said = "; ".join(f"{step['approach']} ({step['candidate']}) {_gap(step, confidence)}" for step in idle)
        sentences.append(f"Tried, and not shown to add anything to what is simpler: {said}.")
    for step in found["steps"]:
        if step["approach"] == ENDPOINT:
            gap = f"{_gap(step, confidence)} against {step['over']}"
            sentences.append(
                f"The outside endpoint ({step['candidate']}) is at {gap}; it can be measured, not released."
            )
    return sentences


def _gap(step: Mapping[str, Any], confidence: str) -> str:
    gap = step["difference"]
    return f"{points(gap['mean'])} points ({confidence} interval {points(gap['low'])} to {points(gap['high'])})"


def _money(data: Mapping[str, Any]) -> list[str]:
    found = data["break_even"]
    if found is None:
        return []
    focus, rival, currency = data["focus"], data["rival"], data["currency"] or ""
    prices = {
        row["name"]: row["price"]["money_per_1000"] for row in data["candidates"] if row["name"] in (focus, rival)
    }
    sentence = (
        f"1,000 requests cost {money(prices[focus])} {currency} with {focus} and {money(prices[rival])} with {rival}"
    )
    if not found["training"]:
        return [f"{sentence}."]
    if found["requests"] is None:
        return [f"{sentence}; the training ({money(found['training'])}) is not paid back by lower running costs."]
    return [f"{sentence}; the training ({money(found['training'])}) is paid back after {found['requests']:,} requests."]


def _gates(data: Mapping[str, Any]) -> list[str]:
    if data["verdict"] is None:
        return []
    if data["verdict"]["reason"]:
        return [f"It is not judged ({len(data['verdict']['gates'])} gates): {data['verdict']['reason']}."]
    if data["verdict"]["verdict"] == "pass":
        names = [gate["name"] for gate in data["verdict"]["gates"]]
        return [f"It passed {'its 1 gate' if len(names) == 1 else f'all {len(names)} gates'}: {', '.join(names)}."]
    return [
        f"The gate {gate['name']} {'failed' if gate['outcome'] == 'fail' else 'is undecided'}: {gate['reason']}."
        for gate in data["verdict"]["gates"]
        if gate["outcome"] != "pass"
    ]


def _price(data: Mapping[str, Any]) -> list[str]:
    if data["rival"] is None:
        return []
    prices = {row["name"]: row["price"] for row in data["candidates"]}
    own, other = prices[data["focus"]], prices[data["rival"]]
    mine, theirs = [], []
    for key, what in (("prompt_tokens_per_1000", "prompt tokens"), ("seconds_per_1000", "seconds of computing")):
        if own[key] > 0:
            mine.append(f"{own[key]:,.0f} {what}")
            theirs.append(f"{other[key]:,.0f} ({other[key] / own[key]:.1f} times as many)")
    if not mine:
        return []
    return [
        f"For 1,000 requests {data['focus']} takes {' and '.join(mine)}; {data['rival']} takes {' and '.join(theirs)}."
    ]


def _forgotten(data: Mapping[str, Any]) -> list[str]:
    found = data["forgetting"]
    if found is None:
        return []
    drop = found["drop"]
    within = f"{data['confidence']:.0%} interval {points(-drop['high'])} to {points(-drop['low'])}"
    return [
        f"On {found['n']} general questions it changed by {points(-drop['mean'])} points against its base ({within})."
    ]


def _next(data: Mapping[str, Any], verdict: str | None, best: str) -> list[str]:
    focus, rival = data["focus"], data["rival"]
    if verdict is None:
        return ["No gate has judged it (0 of 0): set gates and run `tunesmith gate` before anything is released."]
    if verdict == "inconclusive":
        return [
            f"{data['n']} test rows in {data['groups']} groups do not decide it: collect more, in more groups, and "
            "evaluate again; do not release on this evidence."
        ]
    if best != focus:
        return [
            f"{best} did best on these requests ({percent(_mean(data, best))} {data['primary']}): have it judged with "
            f"`tunesmith gate {best}`."
        ]
    if verdict == "pass":
        return []
    return [
        f"With {percent(_mean(data, focus))} it is still the best of the {len(data['candidates'])} measured: mend what "
        f"failed, or release {rival or 'nothing'} meanwhile."
    ]


def _cautions(data: Mapping[str, Any]) -> list[str]:
    found = []
    look = data["verdict"]["test_set_use"] if data["verdict"] else 1
    if look > 1:
        found.append(
            f"{look} candidates have been judged on these test rows; the intervals of its gates are widened for that."
        )
    for row in data["candidates"]:
        if row["cut"] and row["role"]:
            found.append(f"{row['cut']} answers of {row['name']} were cut off at the longest length allowed.")
    if data["version"] and data["version"]["override"]:
        found.append(f"{data['version']['label']} was let through by an override: {data['version']['override']}.")
    for metric, by_name in data["judges"].items():
        weak = {name: one for name, one in by_name.items() if one["agreement"] < _TRUSTED_AGREEMENT}
        if weak:
            shares = ", ".join(f"{name} {percent(one['agreement'])}" for name, one in sorted(weak.items()))
            found.append(
                f"The judge of {metric} changed its mind with the order of the answers; it agreed on {shares}."
            )
    conflicts = data["dataset"].get("conflicts", {}).get("requests", 0)
    if conflicts:
        found.append(f"{conflicts} requests in the data have more than one answer, which nobody can all get right.")
    return found
