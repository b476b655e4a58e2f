"""The outcomes of policy checks: made from answers, written to `policy.jsonl`, read back with checks, and counted."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from operator import attrgetter
from typing import Final, get_args

import numpy as np

from tunesmith.candidates.candidate import Candidate
from tunesmith.core.digests import short
from tunesmith.core.errors import Inconclusive
from tunesmith.evaluation.lines import ITEMS, Line, Name, answers_to, read_answer_lines, read_items
from tunesmith.evaluation.policy.leaks import leaked
from tunesmith.evaluation.policy.requests import PolicyItem
from tunesmith.evaluation.policy.rubric_judge import Said, read_said
from tunesmith.evaluation.policy.rules import Outcome, hold
from tunesmith.evaluation.policy.settings import Policy
from tunesmith.evaluation.scores import metric_interval
from tunesmith.evaluation.stats.statistics import Floats, Interval, interval
from tunesmith.records.evaluation import CheckResults, CheckRules, EvaluationBody, PolicyAccount, PolicyResults
from tunesmith.store.records import Record
from tunesmith.store.store import Store

_OUTCOMES: Final = get_args(Outcome)
SUITE: Final = "policy"


class OutcomeLine(Line):
    """What came of one answer under one check. why: the reason, in a few words."""

    file = "policy.jsonl"
    unique = ("candidate", "check", "id")
    candidate: Name
    check: Name
    id: Name
    group: Name
    outcome: Outcome
    why: str


@dataclass(frozen=True, slots=True)
class PolicyAnswers:
    """The policy, and digests. answers: candidate -> its answers. judged: (candidate, check) -> a judge's replies."""

    policy: Policy
    answers: Mapping[str, str]
    judged: Mapping[tuple[str, str], str] = field(default_factory=dict)

    @property
    def rules(self) -> dict[str, CheckRules]:
        """The rules of each check, as the record states them."""
        return {name: check.rules for name, check in self.policy.items()}

    @property
    def parents(self) -> dict[str, str]:
        """The evaluation's parent records: role -> digest."""
        found = {f"policy:{name}": digest for name, digest in self.answers.items()}
        return found | {f"policy-judged:{check}:{name}": digest for (name, check), digest in self.judged.items()}


@dataclass(frozen=True, slots=True)
class Tally:
    """One candidate's outcomes of one check. groups and outcomes have one entry per request, in the order of ids."""

    groups: tuple[str, ...]
    outcomes: tuple[str, ...]

    @property
    def counts(self) -> dict[str, int]:
        """How many requests had each outcome, and n: how many are evidence. Leaked requests are none."""
        found = Counter(self.outcomes)
        return {"n": len(self.outcomes) - found["leaked"], **{name: found[name] for name in _OUTCOMES}}

    @property
    def evidence(self) -> tuple[list[str], list[str]]:
        """The groups and the outcomes of the requests that are evidence."""
        kept = [place for place, outcome in enumerate(self.outcomes) if outcome != "leaked"]
        return [self.groups[place] for place in kept], [self.outcomes[place] for place in kept]

    def share(self, confidence: float, seed: int) -> Interval:
        """The share of answers that broke the rule. Low: as if the undecided kept it; high: as if they broke it.

        Raises Inconclusive where no request is evidence.
        """
        groups, found = self.evidence
        if not found:
            raise Inconclusive("every request stands in what the candidate learned from or shows")
        broke = np.array([outcome == "broke" for outcome in found], dtype=np.float64)
        doubtful: Floats = broke + np.array([outcome == "undecided" for outcome in found], dtype=np.float64)
        least, most = (
            interval(each, groups, ends=(0.0, 1.0), confidence=confidence, seed=seed) for each in (broke, doubtful)
        )
        return Interval(least.mean, least.low, most.high)


def measure_policy(
    store: Store, given: PolicyAnswers, candidates: Mapping[str, tuple[str, Candidate]], confidence: float, seed: int
) -> tuple[list[OutcomeLine], PolicyAccount]:
    """The lines of policy.jsonl, and the evaluation record's account of the policy.

    candidates: name -> (digest, candidate). A candidate whose answers cannot be used gets an account with the
    reason only, so that only its gates are inconclusive.
    """
    lines: list[OutcomeLine] = []
    stated: dict[str, PolicyResults] = {}
    requests: set[str] = set()
    for name, digest in sorted(given.answers.items()):
        try:
            record, items = _answered(store, digest, candidates[name][0], given.policy)
            requests.add(record.blobs[ITEMS])
            own = _outcomes(store, given, name, record, items, candidates[name][1])
        except Inconclusive as error:
            stated[name] = PolicyResults(unusable=error.reason)
            continue
        lines += own
        checks = {check: _account(tally, confidence, seed) for (_, check), tally in _tallies(own).items()}
        stated[name] = PolicyResults(checks=checks)
    if len(requests) > 1:
        raise Inconclusive("the candidates were not asked the same policy requests", fix="evaluate again")
    return lines, PolicyAccount(requests=next(iter(requests), None), checks=given.rules, candidates=stated)


def read_policy(store: Store, evaluation: Record) -> dict[tuple[str, str], Tally]:
    """(candidate, check) -> outcomes. Raises Inconclusive for outcomes that are not valid, as `read_outcomes` does."""
    return _tallies(read_outcomes(store, evaluation))


def read_outcomes(store: Store, evaluation: Record) -> list[OutcomeLine]:
    """The lines of policy.jsonl. Raises Inconclusive, naming the line, for lines that are not valid.

    That is: a line that is no OutcomeLine; a request judged twice; counts that differ from the record's account.
    """
    found = OutcomeLine.read(store, evaluation)
    counts = {key: tally.counts for key, tally in _tallies(found).items()}
    policy = EvaluationBody.of(evaluation).policy
    stated = {
        (name, check): {outcome: getattr(account, outcome) for outcome in ("n", *_OUTCOMES)}
        for name, told in (policy.candidates if policy else {}).items()
        for check, account in (told.checks or {}).items()
    }
    if stated != counts:
        raise Inconclusive("the evaluation record contradicts the outcomes of its policy checks")
    return found


def _answered(store: Store, digest: str, candidate: str, policy: Policy) -> tuple[Record, list[PolicyItem]]:
    """The answers record and its items. Raises Inconclusive where they are not this candidate's to this policy."""
    record, _ = answers_to(store, digest, SUITE, short(digest), candidate=candidate)
    items = read_items(store, record, PolicyItem)
    if {item.check for item in items} != set(policy):
        raise Inconclusive("the requests are those of other checks", where=short(digest), fix="evaluate again")
    return record, items


def _outcomes(
    store: Store, given: PolicyAnswers, name: str, record: Record, items: Sequence[PolicyItem], candidate: Candidate
) -> list[OutcomeLine]:
    """What came of each answer of the candidate `name`."""
    lines = read_answer_lines(store, record, [item.id for item in items], f"policy answers of {name!r}", "requests")
    seen = leaked(store, candidate, items)
    said: dict[str, Said] = {}
    for check, settings in given.policy.items():
        if settings.rubric is not None:
            own = [item for item in items if item.check == check]
            said |= read_said(store, given.judged.get((name, check)), check, settings.rubric, record.digest, own)
    found = []
    for item in items:
        line = lines[item.id]
        if not isinstance(line.get("text"), str) or line.get("finish") not in ("stop", "length"):
            raise Inconclusive("an answer has no text or no finish reason", where=item.id)
        cut = line["finish"] == "length"
        held = hold(given.policy[item.check], line["text"], cut=cut, said=said.get(item.id))
        came: Outcome = "leaked" if held.outcome == "held" and item.id in seen else held.outcome
        found.append(
            OutcomeLine(candidate=name, check=item.check, id=item.id, group=item.group, outcome=came, why=held.why)
        )
    return found


def _tallies(lines: Iterable[OutcomeLine]) -> dict[tuple[str, str], Tally]:
    rows: defaultdict[tuple[str, str], list[tuple[str, str]]] = defaultdict(list)
    for line in sorted(lines, key=attrgetter("candidate", "check", "id")):
        rows[line.candidate, line.check].append((line.group, line.outcome))
    return {key: Tally(*zip(*own, strict=True)) for key, own in rows.items()}


def _account(tally: Tally, confidence: float, seed: int) -> CheckResults:
    counts = tally.counts
    return CheckResults(**counts, share=metric_interval(tally.share(confidence, seed)) if counts["n"] else None)
