"""Which approach moves the metric: what each more elaborate approach adds to the simpler one, on the same rows."""

from __future__ import annotations

from collections import defaultdict

import numpy as np

from tunesmith.candidates.candidate import Candidate, load_candidate
from tunesmith.evaluation.report.evidence import GroupLift, Ladder, LadderStep, LiftByGroup, Rung
from tunesmith.evaluation.scores import Column, Columns, difference
from tunesmith.evaluation.stats.statistics import Level, by_group
from tunesmith.records.evaluation import EvaluationBody
from tunesmith.records.training import TrainingBody
from tunesmith.store.store import Store

# From the least effort to the most. A more elaborate approach must show that it adds something.
LADDER = ("baseline", "prompting", "examples in the prompt", "retrieval", "tuning", "tuning with retrieval")
ENDPOINT, CONTROL = "endpoint", "control"
_SHOWN_GROUPS = 8


def approach_of(store: Store, candidate: Candidate) -> str:
    """A candidate's approach: one of LADDER, ENDPOINT or CONTROL."""
    if candidate.method != "model":
        return "baseline"
    if candidate.endpoint is not None:
        return ENDPOINT
    if candidate.training is not None:
        if TrainingBody.read(store, candidate.training).settings.permute_answers:
            return CONTROL
        return "tuning with retrieval" if candidate.retrieve is not None else "tuning"
    if candidate.retrieve is not None:
        return "retrieval"
    return "examples in the prompt" if candidate.shots else "prompting"


def approach_ladder(store: Store, body: EvaluationBody, columns: Columns) -> Ladder:
    """The approaches from simple to elaborate, and what each adds on the same rows.

    Rungs are the best candidates of each measured approach, by the primary metric; each is compared with the rung
    chosen so far. Chosen is the highest rung whose whole interval over the rung chosen before is above zero. An
    endpoint is compared with the chosen rung, but never chosen.
    """
    primary, level = body.primary, Level(body.confidence, body.seed)
    by_approach: defaultdict[str, list[str]] = defaultdict(list)
    for name, each in body.candidates.items():
        by_approach[approach_of(store, load_candidate(store, each.candidate))].append(name)
    best = {approach: max(sorted(names), key=body.mean) for approach, names in by_approach.items()}
    rungs = [
        Rung(approach=approach, candidate=best[approach], mean=body.mean(best[approach]))
        for approach in (*LADDER, ENDPOINT)
        if approach in best
    ]
    chosen, steps = next(iter(rungs), None), []
    for rung in rungs[1:]:
        assert chosen is not None
        own, other = columns[rung.candidate, primary], columns[chosen.candidate, primary]
        gap = difference(own, other, level).difference
        steps.append(LadderStep.of(rung, over=chosen.candidate, over_approach=chosen.approach, difference=gap))
        if gap.low > 0.0 and rung.approach != ENDPOINT:
            chosen = rung
    return Ladder(rungs=tuple(rungs), steps=tuple(steps), chosen=chosen)


def lift_by_group(own: Column, other: Column) -> LiftByGroup:
    """Mean differences by group. Shown are those that changed the overall mean most in either direction, best first."""
    index, sizes = by_group(own.groups)
    means = ((np.bincount(index, weights=each.values) / sizes).tolist() for each in (own, other))
    lifts = [
        GroupLift(group=group, n=n, own=mine, other=theirs, difference=mine - theirs)
        for group, n, mine, theirs in zip(sorted(set(own.groups)), sizes.tolist(), *means, strict=True)
    ]
    lifts.sort(key=lambda one: (-one.difference * one.n, one.group))
    better = [one for one in lifts if one.difference > 0]
    worse = [one for one in lifts if one.difference < 0]
    return LiftByGroup(
        groups=len(lifts),
        better=len(better),
        worse=len(worse),
        alike=len(lifts) - len(better) - len(worse),
        shown=(*better[:_SHOWN_GROUPS], *worse[-_SHOWN_GROUPS:]),
    )
