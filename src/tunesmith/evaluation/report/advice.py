"""Writes the report's advice: what to release, and why. Each sentence rests on numbers that the report shows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from tunesmith.core.text.wording import money, percent, points
from tunesmith.evaluation.gates.settings import PROBES
from tunesmith.evaluation.report.approach_ladder import ENDPOINT
from tunesmith.evaluation.report.behaviour import policy_cautions, policy_reasons, style_reasons

# A judge that agrees with itself on fewer rows, when the two answers change places, gets a caution.
_TRUSTED_AGREEMENT = 0.8
_PHRASES = {
    "exact_match": "answers {share} requests exactly right",
    "json_valid": "gives valid JSON for {share} requests",
}


def advise(data: Mapping[str, Any]) -> dict[str, Any]:
    """{"headline", "release": a candidate's name or None, "summary", "reasons": [sentence], "cautions": [sentence]}.

    summary: one paragraph on the scores, their difference, costs and risks. data: as report_data returns it.
    """
    verdict, focus = data["verdict"]["verdict"] if data["verdict"] else None, data["focus"]
    own = [row["name"] for row in data["candidates"] if row["kind"] != "endpoint"]
    return {
        "headline": _headline(data, verdict, focus in own),
        "release": focus if verdict == "pass" and focus in own else None,
        "summary": " ".join([_measured(data), _difference(data), _costs(data), _risked(data)]),
        "reasons": [
            *_gates(data),
            *_ladder(data),
            *_price(data),
            *_forgotten(data),
            *policy_reasons(data),
            *style_reasons(data),
            *_next(data, verdict, own),
        ],
        "cautions": _cautions(data),
    }


def _headline(data: Mapping[str, Any], verdict: str | None, ours: bool) -> str:
    """ours: whether the candidate in focus answers here, so that it can be released."""
    focus = data["focus"]
    if verdict is None:
        return f"{focus} was measured, but no gates have judged it."
    if not ours:
        passed = "passed its gates" if verdict == "pass" else "was judged"
        return f"{focus} {passed}, but an endpoint cannot be released."
    best = _best(data, [row["name"] for row in data["candidates"]])
    return {
        "pass": f"Release {focus}." if best == focus else f"{focus} may be released, but {best} scored higher.",
        "fail": f"Do not release {focus}.",
        "inconclusive": f"There is not enough evidence to release {focus}.",
    }[verdict]


def _best(data: Mapping[str, Any], names: Sequence[str]) -> str:
    """The candidate with the highest mean; among equals the one in focus."""
    return max(names, key=lambda name: (_mean(data, name), name == data["focus"]))


def _says(metric: str, mean: float) -> str:
    if metric in _PHRASES:
        of_100 = mean * 100
        whole = of_100 in (0.0, 100.0) or 1.0 <= of_100 <= 99.0
        number = f"{of_100:.0f}" if whole else f"{min(max(of_100, 0.1), 99.9):.1f}"
        return _PHRASES[metric].format(share=f"{number} of 100")
    return f"scores {percent(mean)} on {metric}"


def _row(data: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    found: Mapping[str, Any] = next(row for row in data["candidates"] if row["name"] == name)
    return found


def _mean(data: Mapping[str, Any], name: str) -> float:
    return float(_row(data, name)["metrics"][data["primary"]]["mean"])


def _measured(data: Mapping[str, Any]) -> str:
    sentence = f"{data['focus']} {_says(data['primary'], _mean(data, data['focus']))}"
    if data["rival"] is not None:
        sentence += f"; {data['rival']} {_says(data['primary'], _mean(data, data['rival']))}"
    return f"On {data['n']} held-out requests, {sentence}."


def _difference(data: Mapping[str, Any]) -> str:
    if data["lift"] is None:
        if not _row(data, data["focus"])["tuned"]:
            return f"Besides {data['focus']}, 0 untuned candidates were measured, so it is compared with none."
        return "0 untuned candidates were measured, so the report cannot say what tuning adds."
    found = data["lift"]["metrics"][data["primary"]]
    gap, confidence = found["difference"], f"{data['confidence']:.0%}"
    sentence = (
        f"The difference on the same requests is {points(gap['mean'])} points "
        f"({confidence} interval {points(gap['low'])} to {points(gap['high'])}): "
        f"{data['focus']} did better on {found['wins']} of {data['n']} requests and worse on {found['losses']}; "
        f"{found['ties']} were equal."
    )
    if gap["low"] <= 0.0 <= gap["high"]:
        sentence += " The interval contains 0, so there may be no difference."
    return sentence


def _costs(data: Mapping[str, Any]) -> str:
    """The costs in money where they are known, else in time."""
    if data["break_even"] is not None:
        return _money(data, data["break_even"])
    focus, priced = _row(data, data["focus"]), any("money_per_1000" in row["price"] for row in data["candidates"])
    if "money_per_1000" in focus["price"]:
        cost = f"{money(focus['price']['money_per_1000'])} {data['currency'] or ''}".rstrip()
        return f"1,000 requests cost {cost} with {focus['name']}."
    unset = "" if priced else " (no prices are set)"
    if focus["kind"] == "endpoint":
        return f"What 1,000 requests to the endpoint {focus['name']} cost is not stated{unset}."
    return f"1,000 requests take {focus['price']['seconds_per_1000']:,.0f} seconds of this machine{unset}."


def _money(data: Mapping[str, Any], found: Mapping[str, Any]) -> str:
    """What the two compared candidates cost, and when a training is repaid. found: as break_even returns it."""
    focus, rival, currency = data["focus"], data["rival"], data["currency"] or ""
    own, other = (money(_row(data, name)["price"]["money_per_1000"]) for name in (focus, rival))
    sentence = f"1,000 requests cost {own} {currency} with {focus} and {other} {currency} with {rival}"
    if not found["training"]:
        return f"{sentence}."
    sentence += f". The training cost {money(found['training'])} {currency}"
    if found["requests"] is None:
        return f"{sentence}; lower running costs never repay it."
    return f"{sentence}; it is repaid after {found['requests']:,} requests."


def _risked(data: Mapping[str, Any]) -> str:
    """The outcomes of the risk gates, and how many risk probes were not measured."""
    gates = data["verdict"]["gates"] if data["verdict"] else []
    risky = [gate for gate in gates if {"probe", "suite"} & gate["settings"].keys()]
    unmeasured = len(data["risks"]["unmeasured"])
    rest = (
        f"{unmeasured} of {len(PROBES)} risk probes were not measured"
        if unmeasured
        else "all risk probes were measured"
    )
    if not risky:
        return f"0 gates limit the risks of tuning; {rest}."
    bad = [f"{gate['name']} ({gate['outcome']})" for gate in risky if gate["outcome"] != "pass"]
    passed = f"{len(risky) - len(bad)} of {len(risky)} risk gates passed"
    others = f", all but {', '.join(bad)}" if bad else ""
    return f"{passed}{others}; {rest}."


def _ladder(data: Mapping[str, Any]) -> list[str]:
    """The best approach, what it adds to the simpler one, and the approaches that were not shown to add anything."""
    found, confidence = data["ladder"], f"{data['confidence']:.0%}"
    if not found["steps"]:
        return []
    chosen = found["chosen"]
    sentence = f"The best approach is {chosen['approach']} ({chosen['candidate']}, {percent(chosen['mean'])})"
    over = next((step for step in found["steps"] if step["candidate"] == chosen["candidate"]), None)
    if over is None:
        sentence += ": no more elaborate approach was shown to beat it"
    else:
        sentence += f": {_gap(over, confidence)} over {over['over_approach']} ({over['over']})"
        sentence += ", and no more elaborate approach was shown to beat it"
    sentences = [f"{sentence}."]
    idle = [step for step in found["steps"] if step["difference"]["low"] <= 0.0 and step["approach"] != ENDPOINT]
    if idle:
        said = "; ".join(f"{step['approach']} ({step['candidate']}) {_gap(step, confidence)}" for step in idle)
        sentences.append(f"Not shown to add anything to a simpler approach: {said}.")
    for step in found["steps"]:
        if step["approach"] == ENDPOINT:
            gap = f"{_gap(step, confidence)} from {step['over']}"
            sentences.append(
                f"The endpoint ({step['candidate']}) differs by {gap}; it can be measured, but not released."
            )
    return sentences


def _gap(step: Mapping[str, Any], confidence: str) -> str:
    gap = step["difference"]
    return f"{points(gap['mean'])} points ({confidence} interval {points(gap['low'])} to {points(gap['high'])})"


def _gates(data: Mapping[str, Any]) -> list[str]:
    if data["verdict"] is None:
        return []
    if data["verdict"]["reason"]:
        return [f"{len(data['verdict']['gates'])} gates judged it: {data['verdict']['reason']}."]
    if data["verdict"]["verdict"] == "pass":
        names = [gate["name"] for gate in data["verdict"]["gates"]]
        return [f"It passed {'its 1 gate' if len(names) == 1 else f'all {len(names)} gates'}: {', '.join(names)}."]
    return [
        f"The gate {gate['name']} {'failed' if gate['outcome'] == 'fail' else 'is inconclusive'}: {gate['reason']}."
        for gate in data["verdict"]["gates"]
        if gate["outcome"] != "pass"
    ]


def _price(data: Mapping[str, Any]) -> list[str]:
    if data["rival"] is None:
        return []
    rows = [_row(data, name) for name in (data["focus"], data["rival"])]
    own, other = (row["price"] for row in rows)
    compared = {"prompt_tokens_per_1000": "prompt tokens"}
    if all(row["kind"] != "endpoint" for row in rows):  # whose seconds are time spent waiting for another machine
        compared["seconds_per_1000"] = "seconds of this machine"
    mine, theirs = [], []
    for key, what in compared.items():
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
    said = f"On {found['n']} general questions, tuning changed the score by {points(-drop['mean'])} points ({within})."
    gates = data["verdict"]["gates"] if data["verdict"] else []
    trained = data["training"] is not None and data["training"].get("settings")
    if trained and any("suite" in gate["settings"] and gate["outcome"] != "pass" for gate in gates):
        share = min(1.0, 2 * trained.get("rehearse", 0.0) or 0.02)
        if share == trained.get("rehearse"):
            return [said]
        said += f" With `train: {{rehearse: {share:g}}}` it keeps more of what the base can do."
    return [said]


def _next(data: Mapping[str, Any], verdict: str | None, own: Sequence[str]) -> list[str]:
    """What to do now. own: all candidates but endpoints, which cannot be released."""
    focus, here = data["focus"], "" if len(own) == len(data["candidates"]) else " that answer here"
    if verdict is None:
        return ["0 gates have judged it: set `gates:` and run `tunesmith gate` before a release."]
    if not own:
        return []
    if verdict == "inconclusive" and focus in own:
        return [_undecided(data)]
    if (best := _best(data, own)) != focus:
        return [
            f"{best} scored highest of {len(own)} candidates{here} ({percent(_mean(data, best))} {data['primary']}): "
            f"judge it with `tunesmith gate {best}`."
        ]
    if verdict == "pass":
        return []
    return [
        f"With {percent(_mean(data, focus))}, it is still the best of {len(own)} candidates{here}: fix what failed, or "
        "judge another one with `tunesmith gate NAME`."
    ]


def _undecided(data: Mapping[str, Any]) -> str:
    """What to do about an inconclusive verdict."""
    gates = data["verdict"]["gates"]
    if not gates:
        return "0 gates are set: add `gates:` to the project file and run `tunesmith gate` again."
    unusable = [gate["name"] for gate in gates if gate["value"] is None]
    if unusable:
        return (
            f"{len(unusable)} of {len(gates)} gates have no usable evidence ({', '.join(unusable)}). Do not release on "
            "this evidence: correct what the reasons name and evaluate again."
        )
    open_gates = [gate for gate in gates if gate["outcome"] == "inconclusive"]
    asked = [gate["name"] for gate in open_gates if {"policy", "probe", "suite"} & gate["settings"].keys()]
    said = f"More test rows may not decide {', '.join(asked)}: see why in the reason of each gate."
    if len(asked) == len(open_gates):
        return f"Do not release on this evidence. {said}"
    return (
        f"{data['n']} test rows in {data['groups']} groups are not enough to decide. Do not release on this evidence: "
        "collect more rows in more groups and evaluate again."
    ) + (f" {said}" if asked else "")


def _cautions(data: Mapping[str, Any]) -> list[str]:
    found = []
    uses = data["verdict"]["test_set_use"] if data["verdict"] else 1
    if uses > 1:
        found.append(f"{uses} candidates have used these test rows, so the gates' intervals are wider.")
    for row in data["candidates"]:
        if row["cut"] and row["role"]:
            said = "answer" if row["cut"] == 1 else "answers"
            found.append(f"{row['cut']} {said} of {row['name']} reached max_tokens and ended there.")
    if data["version"] and data["version"]["override"]:
        found.append(f"{data['version']['label']} was registered by an override: {data['version']['override']}.")
    for metric, by_name in data["judges"].items():
        weak = {name: one for name, one in by_name.items() if one["agreement"] < _TRUSTED_AGREEMENT}
        if weak:
            shares = ", ".join(f"{name} {percent(one['agreement'])}" for name, one in sorted(weak.items()))
            found.append(
                f"The judge of {metric} often changed its verdict with the order of the answers. "
                f"It gave the same verdict in both orders for: {shares}."
            )
    more = (data["training"] or {}).get("more_time")
    if more is not None and more["gain"] is not None and more["gain"]["low"] > 0:
        found.append(f"{data['focus']} was not trained to the end. {more['text']}")
    found += policy_cautions(data)
    found += data["verdict"]["cautions"] if data["verdict"] else []
    conflicts = data["dataset"].get("conflicts", {}).get("requests", 0)
    if conflicts:
        found.append(f"{conflicts} requests in the data have different answers: a candidate cannot give both.")
    return found
