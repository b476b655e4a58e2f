"""The verdict: every gate of the project held against one candidate of an evaluation.

A verdict is a function of the evaluation's scores, the gates and the look it states, and of nothing else: `replay`
makes it again offline, and it must come out the same, its sentences aside.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from tunesmith.core.digests import canonical
from tunesmith.core.errors import Inconclusive, UsageError
from tunesmith.evaluation.gates.gates import Evidence, Finding, Outcome, judge_gate, not_judged
from tunesmith.evaluation.gates.test_set_uses import take_look
from tunesmith.evaluation.metrics.labels import read_labels
from tunesmith.evaluation.metrics.scorers import nearest
from tunesmith.evaluation.probes.items import read_measurements
from tunesmith.evaluation.scores import read_scores
from tunesmith.evaluation.settings import GATES, Gate, Gates, check_gates
from tunesmith.evaluation.stats.statistics import step_down
from tunesmith.store.identities import acting
from tunesmith.store.records import Record
from tunesmith.store.store import Store

NO_GATES = "no gates are set, and nothing passes unmeasured"
# How gates become a verdict; a verdict states its own and is made again by those. 1: no correction of failures.
_RULES = 2


def judge(store: Store, *, evaluation: str, candidate: str, gates: Gates, actor: str | None = None) -> str:
    """Judge a candidate by name and keep the verdict record; returns its digest.

    The look at the test rows is written down first, as actor's (by default whoever acts for the store).

    Fails where any gate fails, else is inconclusive where any gate is or there is none, else passes. Raises UsageError
    for a candidate, metric or rival the evaluation does not hold.
    """
    record = store.record(evaluation, kind="evaluation")
    digest = _candidate_digest(record, candidate)
    look = take_look(store, evaluation, digest, acting(store, actor))
    return store.put_record(verdict_record(store, evaluation, candidate, gates, look))


def verdict_record(
    store: Store, evaluation: str, candidate: str, gates: Gates, look: int, rules: int = _RULES
) -> Record:
    """The verdict on a candidate, not kept. Reads files only, so that it can be made again without the database."""
    record = store.record(evaluation, kind="evaluation")
    digest = _candidate_digest(record, candidate)
    check_gates(gates, record.body["metrics"], record.body["candidates"])
    findings = _findings(store, record, candidate, gates, look, rules)
    outcomes = [finding.outcome for finding in findings.values()]
    verdict: Outcome = "fail" if "fail" in outcomes else "inconclusive" if "inconclusive" in outcomes else "pass"
    body: dict[str, Any] = {
        "name": candidate,
        "verdict": verdict if outcomes else "inconclusive",
        "look": look,
        "gates": [_stated(name, findings[name], gates) for name in gates],
    }
    if rules > 1:
        body["rules"] = rules
    if not outcomes:
        body["reason"] = NO_GATES
    return Record(kind="verdict", parents={"evaluation": evaluation, "candidate": digest}, body=body)


def replay(store: Store, digest: str) -> bool:
    """Whether a verdict follows from its evaluation's scores: made again, it is the same but for its prose."""
    kept = store.record(digest, kind="verdict")
    gates = GATES.validate_python({gate["name"]: gate["settings"] for gate in kept.body["gates"]})
    look, rules = kept.body["look"], kept.body.get("rules", 1)
    again = verdict_record(store, kept.parents["evaluation"], kept.body["name"], gates, look, rules)
    return canonical(_without_prose(again)) == canonical(_without_prose(kept))


def _without_prose(record: Record) -> dict[str, Any]:
    """What a verdict decides: a sentence may be reworded later, and older verdicts must still replay."""
    stated = record.model_dump(mode="json")
    for part in (stated["body"], *stated["body"]["gates"]):
        part.pop("reason", None)
    return stated


def verdict_document(store: Store, digest: str) -> dict[str, Any]:
    """What `tunesmith gate --json` prints."""
    record = store.record(digest, kind="verdict")
    body = record.body
    document = {"verdict": body["verdict"], "gates": list(body["gates"]), "candidate": body["name"], "digest": digest}
    return {**document, "evaluation": record.parents["evaluation"], "look": body["look"], "reason": body.get("reason")}


def _findings(store: Store, record: Record, candidate: str, gates: Gates, look: int, rules: int) -> dict[str, Finding]:
    try:
        columns = read_scores(store, record)
        measured = read_measurements(store, record)
        labelled = read_labels(store, record, columns)
    except Inconclusive as error:
        reason = f"{error.what} ({error.where})" if error.where else error.what
        return {name: not_judged(gate, reason) for name, gate in gates.items()}
    tuned = {name: bool(stated["tuned"]) for name, stated in record.body["candidates"].items()}
    told = {
        (suite, name): each for suite, names in record.body.get("risks", {}).items() for name, each in names.items()
    }
    primary = str(record.body.get("primary", ""))
    evidence = Evidence(columns, tuned, candidate, look, record.body["seed"], measured, told, primary, labelled)
    findings = {name: judge_gate(gate, evidence) for name, gate in gates.items()}
    return _upheld(gates, findings, evidence) if rules > 1 else findings


def _upheld(gates: Gates, findings: dict[str, Finding], evidence: Evidence) -> dict[str, Finding]:
    """Failures that many gates could show by luck become inconclusive (Holm 1979; never a pass).

    A pass needs every gate, so each keeps its own error rate. A failure needs one: with many gates some sound candidate
    would fail one by chance. So a failure must hold at the level that Holm's step-down procedure leaves it.
    """
    family = [name for name, gate in gates.items() if gate.confidence is not None]
    claimed = {name for name in family if findings[name].outcome == "fail"}
    upheld = step_down(claimed, len(family), lambda name, among: _fails(gates[name], among, evidence))
    for name in claimed - upheld:
        why = f"{findings[name].reason}; among {len(family)} gates chance alone shows this too often to fail it"
        findings[name] = replace(findings[name], outcome="inconclusive", reason=why)
    return findings


def _fails(gate: Gate, among: int, evidence: Evidence) -> bool:
    assert gate.confidence is not None
    stricter = gate.model_copy(update={"confidence": 1.0 - (1.0 - gate.confidence) / among})
    return judge_gate(stricter, evidence).outcome == "fail"


def _stated(name: str, finding: Finding, gates: Gates) -> dict[str, Any]:
    return {
        "name": name,
        "outcome": finding.outcome,
        "value": finding.value,
        "low": finding.low,
        "high": finding.high,
        "bound": finding.bound,
        "reason": finding.reason,
        **finding.extra,
        "settings": gates[name].model_dump(mode="json", exclude_none=True),
    }


def _candidate_digest(record: Record, candidate: str) -> str:
    known: Mapping[str, Any] = record.body["candidates"]
    if candidate not in known:
        raise UsageError(
            f"the evaluation has no candidate {candidate!r}{nearest(candidate, known)}",
            fix=f"name one of: {', '.join(known)}",
        )
    return str(known[candidate]["candidate"])
