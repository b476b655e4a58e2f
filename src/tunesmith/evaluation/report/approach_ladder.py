"""Which lever moves the metric: what each more elaborate way to answer adds to the simpler one, on the same rows."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from typing import Any

from tunesmith.candidates.candidate import Candidate, load_candidate
from tunesmith.evaluation.scores import Column, as_body, difference
from tunesmith.store.records import Record
from tunesmith.store.store import Store

# From the least effort to the most. What is further down has to show that it adds something.
LADDER = ("floor", "prompting", "examples in the prompt", "retrieval", "tuning", "tuning with retrieval")
ENDPOINT, CONTROL = "an outside endpoint", "a control"
_SHOWN_GROUPS = 8


def lever_of(store: Store, candidate: Candidate) -> str:
    """What a candidate answers by: a rung of LADDER, ENDPOINT or CONTROL."""
    if candidate.method != "model":
        return "floor"
    if candidate.endpoint is not None:
        return ENDPOINT
    if candidate.training is not None:
        settings = store.record(candidate.training, kind="training").body.get("settings", {})
        if settings.get("permute_answers"):
            return CONTROL
        return "tuning with retrieval" if candidate.retrieve is not None else "tuning"
    if candidate.retrieve is not None:
        return "retrieval"
    return "examples in the prompt" if candidate.shots else "prompting"


def levers(
    store: Store, record: Record, columns: Mapping[tuple[str, str], Column], confidence: float
) -> dict[str, Any]:
    """{"rungs": [{lever, candidate, mean}], "steps": [{lever, candidate, over, over_lever, difference}], "chosen"}.

    rungs: the best candidate of each lever that was measured, by the primary metric. steps: each rung against the one
    that was chosen below it. chosen: the highest rung whose whole interval over the one chosen before lies above zero;
    what adds nothing that these rows show is not chosen. The endpoint stands as a step against the chosen one.
    """
    primary = record.body["primary"]
    stated = record.body["candidates"]
    by_lever: defaultdict[str, list[str]] = defaultdict(list)
    for name, each in stated.items():
        by_lever[lever_of(store, load_candidate(store, each["candidate"]))].append(name)
    best = {
        lever: max(sorted(names), key=lambda name: stated[name]["metrics"][primary]["mean"])
        for lever, names in by_lever.items()
    }
    rungs = [
        {"lever": lever, "candidate": best[lever], "mean": stated[best[lever]]["metrics"][primary]["mean"]}
        for lever in (*LADDER, ENDPOINT)
        if lever in best
    ]
    chosen: dict[str, Any] | None = None
    steps = []
    for rung in rungs:
        if chosen is None:
            chosen = rung
            continue
        own, other = columns[rung["candidate"], primary], columns[chosen["candidate"], primary]
        gap = as_body(difference(own, other, confidence=confidence, seed=record.body["seed"]).interval)
        over = {"over": chosen["candidate"], "over_lever": chosen["lever"]}
        steps.append({**rung, **over, "difference": gap})
        if gap["low"] > 0.0 and rung["lever"] != ENDPOINT:
            chosen = rung
    return {"rungs": rungs, "steps": steps, "chosen": chosen}


def lift_by_group(own: Column, other: Column) -> dict[str, Any]:
    """Mean difference by group: {"groups", "better", "worse", "alike", "shown": [{group, n, own, other, difference}]}.

    shown: the groups that moved the mean most, up and down, the best first.
    """
    rows: defaultdict[str, list[tuple[float, float]]] = defaultdict(list)
    for group, mine, theirs in zip(own.groups, own.values.tolist(), other.values.tolist(), strict=True):
        rows[group].append((mine, theirs))
    found: list[dict[str, Any]] = []
    for group, pairs in rows.items():
        mine, theirs = (sum(pair[side] for pair in pairs) / len(pairs) for side in (0, 1))
        found.append({"group": group, "n": len(pairs), "own": mine, "other": theirs, "difference": mine - theirs})
    found.sort(key=lambda one: (-one["difference"] * one["n"], one["group"]))
    better = [one for one in found if one["difference"] > 0]
    worse = [one for one in found if one["difference"] < 0]
    return {
        "groups": len(found),
        "better": len(better),
        "worse": len(worse),
        "alike": len(found) - len(better) - len(worse),
        "shown": [*better[:_SHOWN_GROUPS], *worse[-_SHOWN_GROUPS:]],
    }
