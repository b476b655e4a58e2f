"""Plans gates: how large a difference the test rows can detect, computed before anything is trained."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from tunesmith.candidates.candidate import load_candidate
from tunesmith.core.errors import Inconclusive
from tunesmith.core.text.wording import points
from tunesmith.core.view import View
from tunesmith.data.dataset import Dataset
from tunesmith.evaluation.answers import read_lines, seen_answers
from tunesmith.evaluation.gates.settings import Gates, Lift, Retain
from tunesmith.evaluation.metrics.declared import Scoring, checked
from tunesmith.evaluation.scores import rounded
from tunesmith.evaluation.stats.power import ASSUMED_DIFFERING, POWER, Grouping, grouping_of, plan_lift, smallest_lift
from tunesmith.evaluation.stats.statistics import Floats, effective_groups
from tunesmith.store.store import Store


@dataclass(frozen=True, slots=True)
class Assumed:
    """What a plan assumes. differing: the share of rows on which two candidates differ.

    differences, groups: of the validation rows, where measured; they give the correlation within groups. Without them
    the rows of a group count as one row.
    """

    differing: float = ASSUMED_DIFFERING
    differences: Floats | None = None
    groups: Sequence[str] = ()


def measured_on_validation(
    store: Store, answers: Sequence[str], dataset: Dataset, scorings: Mapping[str, Scoring]
) -> dict[str, Assumed]:
    """The assumptions that two candidates' answers to the validation rows give, for each metric. answers: digests.

    Raises Inconclusive where there are no validation rows.
    """
    rows = dataset.examples("validation")
    if not rows:
        raise Inconclusive("the dataset has no validation rows", fix="raise data.split.validation, or say what differs")
    seen = []
    for digest in answers:
        lines = read_lines(store, digest, "validation", [row.id for row in rows])
        candidate = load_candidate(store, store.record(digest).parents["candidate"])
        seen.append(seen_answers(store, dataset, candidate, lines, rows))
    found = {}
    for metric, scoring in scorings.items():
        first, second = (np.array([checked(scoring(one[row.id]), metric, row.id) for row in rows]) for one in seen)
        differences = second - first
        # One more differing row is added: if none of a few rows differ, some of many still may.
        differing = (float((differences != 0).sum()) + 1.0) / (len(rows) + 1.0)
        found[metric] = Assumed(differing, differences, [row.group for row in rows])
    return found


class GatePlan(View):
    """What the test rows can show to one gate. differing: share of rows on which the two candidates differ.

    correlation: of their differences, within groups; measured: whether both come from validation rows, or are assumed.
    lift: the true difference hoped for; power: the probability that it passes; needed: rows that would pass it with
    the wanted power, None if no number would; sees: the smallest true difference that passes with that power, or None.
    """

    name: str
    metric: str
    bound: float
    differing: float
    correlation: float
    measured: bool
    lift: float
    power: float
    needed: int | None
    sees: float | None


class Plan(View):
    """What the test rows can show, for each gate that compares two candidates.

    measured: whether answers to validation rows were compared. test_set_uses: how many candidates have used the test
    rows so far; test_set_use: the number that the gates will go by, with the trained candidates that the next
    evaluation adds.
    """

    rows: int
    groups: int
    effective_groups: float
    measured: bool
    test_set_uses: int
    test_set_use: int
    wanted_power: float
    gates: tuple[GatePlan, ...]


def plan_gates(
    dataset: Dataset,
    gates: Gates,
    *,
    uses: int,
    assumed: Assumed,
    measured: Mapping[str, Assumed] | None = None,
    new: int = 1,
    lift: float | None = None,
) -> Plan:
    """What the test rows can show to each gate that compares two candidates.

    uses: how many candidates have used the test rows so far. new: how many the next evaluation adds, which all get the
    number of the last. measured: by metric, instead of what is assumed. lift: the true difference hoped for, by default
    five points above the gate's bound. A gate for what must not drop is planned for candidates that are equal.
    """
    groups = [row.group for row in dataset.examples("test")]
    found = []
    for name, gate in gates.items():
        if not isinstance(gate, Lift | Retain):
            continue
        bound = gate.at_least if isinstance(gate, Lift) else -gate.drop_at_most
        hoped = 0.0
        if isinstance(gate, Lift):
            hoped = lift if lift is not None else min(1.0, bound + 0.05)
        known, own = (measured or {}).get(gate.metric, assumed), grouping_of(groups)
        if known.differences is not None:
            own = Grouping(own.size, grouping_of(known.groups, known.differences).correlation)
        setting: dict[str, Any] = {"confidence": gate.confidence, "use": uses + new, "grouping": own}
        differing = max(known.differing, abs(hoped))
        plan = plan_lift(len(groups), lift=hoped, differing=differing, at_least=bound, **setting)
        sees = smallest_lift(len(groups), differing=differing, at_least=bound, **setting)
        found.append(
            GatePlan(
                name=name,
                metric=gate.metric,
                bound=bound,
                differing=rounded(differing),
                correlation=rounded(own.correlation),
                measured=known.differences is not None,
                lift=hoped,
                power=rounded(plan.power),
                needed=plan.needed,
                sees=None if sees is None else rounded(sees),
            )
        )
    return Plan(
        rows=len(groups),
        groups=len(set(groups)),
        effective_groups=rounded(effective_groups(groups)),
        measured=measured is not None,
        test_set_uses=uses,
        test_set_use=uses + new,
        wanted_power=POWER,
        gates=tuple(found),
    )


def plan_sentence(plan: Plan, gate: GatePlan) -> str:
    """One gate's plan in words, for a progress line."""
    rows = f"{plan.rows} test rows in {plan.groups} groups"
    basis = f"if the two candidates differ on {gate.differing:.0%} of rows"
    if plan.test_set_use > 1:
        basis += f"; {plan.test_set_use} candidates will have used these rows, which widens the intervals"
    if gate.sees is None:
        return f"gate {gate.name}: {rows} are too few to pass it with {POWER:.0%} power, {basis}"
    return (
        f"gate {gate.name}: {rows} pass it with {POWER:.0%} power if the true difference is at least "
        f"{points(gate.sees)} points of {gate.metric}, {basis}"
    )
