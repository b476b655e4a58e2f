"""The verdict: every gate of the project held against one candidate of an evaluation.

A verdict is a function of the evaluation's scores, the gates and the look it states, and of nothing else: `replay`
makes it again offline, and it must come out the same, its sentences aside.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tunesmith.core.digests import canonical
from tunesmith.core.errors import Inconclusive, UsageError
from tunesmith.evaluation.gates import Evidence, Finding, Outcome, judge_gate, not_judged
from tunesmith.evaluation.scorers import nearest
from tunesmith.evaluation.scores import read_scores
from tunesmith.evaluation.settings import GATES, Gates, check_gates
from tunesmith.store.records import Record
from tunesmith.store.store import Store

NO_GATES = "no gates are set, and nothing passes unmeasured"


def judge(store: Store, *, evaluation: str, candidate: str, gates: Gates) -> str:
    """Judge a candidate by name and keep the verdict record; returns its digest.

    Fails where any gate fails, else is inconclusive where any gate is or there is none, else passes. Raises UsageError
    for a candidate, metric or rival the evaluation does not hold.
    """
    record = store.record(evaluation, kind="evaluation")
    digest = _candidate_digest(record, candidate)
    look = _look(store, record.parents["dataset"], digest)
    return store.put_record(verdict_record(store, evaluation, candidate, gates, look))


def verdict_record(store: Store, evaluation: str, candidate: str, gates: Gates, look: int) -> Record:
    """The verdict on a candidate, not kept. Reads files only, so that it can be made again without the database."""
    record = store.record(evaluation, kind="evaluation")
    digest = _candidate_digest(record, candidate)
    check_gates(gates, record.body["metrics"], record.body["candidates"])
    findings = _findings(store, record, candidate, gates, look)
    outcomes = [finding.outcome for finding in findings.values()]
    verdict: Outcome = "fail" if "fail" in outcomes else "inconclusive" if "inconclusive" in outcomes else "pass"
    body: dict[str, Any] = {
        "name": candidate,
        "verdict": verdict if outcomes else "inconclusive",
        "look": look,
        "gates": [_stated(name, findings[name], gates) for name in gates],
    }
    if not outcomes:
        body["reason"] = NO_GATES
    return Record(kind="verdict", parents={"evaluation": evaluation, "candidate": digest}, body=body)


def replay(store: Store, digest: str) -> bool:
    """Whether a verdict follows from its evaluation's scores: made again, it is the same but for its prose."""
    kept = store.record(digest, kind="verdict")
    gates = GATES.validate_python({gate["name"]: gate["settings"] for gate in kept.body["gates"]})
    again = verdict_record(store, kept.parents["evaluation"], kept.body["name"], gates, kept.body["look"])
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


def _findings(store: Store, record: Record, candidate: str, gates: Gates, look: int) -> dict[str, Finding]:
    try:
        columns = read_scores(store, record)
    except Inconclusive as error:
        reason = f"{error.what} ({error.where})" if error.where else error.what
        return {name: not_judged(gate, reason) for name, gate in gates.items()}
    tuned = {name: bool(stated["tuned"]) for name, stated in record.body["candidates"].items()}
    evidence = Evidence(columns, tuned, candidate, look, record.body["seed"])
    return {name: judge_gate(gate, evidence) for name, gate in gates.items()}


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


def _look(store: Store, dataset: str, candidate: str) -> int:
    """How many candidates have been judged on this dataset's test rows, this one included.

    A candidate that was judged before keeps its number: asking again about the same answers is not another look.
    """
    looks: dict[str, int] = {}
    for _, kind, evaluation in store.children(dataset):
        for _, child_kind, child in store.children(evaluation) if kind == "evaluation" else ():
            if child_kind == "verdict":
                verdict = store.record(child, kind="verdict")
                looks[verdict.parents["candidate"]] = int(verdict.body["look"])
    return looks.get(candidate, 1 + len(looks))
