"""The verdict: all gates of the project applied to one candidate of an evaluation.

A verdict depends only on the evaluation's scores, the gates' settings and the use of the test set that it states.
`replay` computes it again offline and compares everything but the reasons: their wording may change between releases.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from tunesmith.candidates.candidate import load_candidate
from tunesmith.core.digests import canonical
from tunesmith.core.errors import Inconclusive, UsageError
from tunesmith.evaluation.gates.edited_references import edited_references
from tunesmith.evaluation.gates.judging import Evidence, GateFinding, judge_gate, not_judged
from tunesmith.evaluation.gates.settings import Gate, Gates, Gone, check_gates, recorded_gates
from tunesmith.evaluation.gates.test_set_uses import use_test_set
from tunesmith.evaluation.metrics.labels import read_labels
from tunesmith.evaluation.metrics.scorers import nearest
from tunesmith.evaluation.policy.outcomes import read_policy
from tunesmith.evaluation.probes.items import read_measurements
from tunesmith.evaluation.scores import read_scores
from tunesmith.evaluation.stats.statistics import step_down
from tunesmith.evaluation.style.shares import read_style
from tunesmith.records.evaluation import EvaluationBody, NoStyle
from tunesmith.records.verdict import EditedReferences, JudgedGate, Outcome, VerdictBody
from tunesmith.store.people.identities import acting
from tunesmith.store.records import Record
from tunesmith.store.store import Store

NO_GATES = "the project file sets no gates, and a candidate that meets no requirement cannot pass"


def judge(store: Store, *, evaluation: str, candidate: str, gates: Gates, actor: str | None = None) -> str:
    """Judge a candidate by name and store the verdict record; returns its digest.

    The audit log records the use of the test set first, by actor (default: the store's owner). The verdict is "fail"
    where any gate fails, else "inconclusive" where any gate is inconclusive or there are no gates, else "pass".
    Raises UsageError for a candidate, metric or rival that the evaluation does not hold.
    """
    digest = _candidate_digest(EvaluationBody.read(store, evaluation), candidate)
    use = use_test_set(store, evaluation, digest, acting(store, actor))
    edited = edited_references(store, evaluation, candidate)
    return store.put_record(verdict_record(store, evaluation, candidate, gates, use, edited))


def verdict_record(
    store: Store, evaluation: str, candidate: str, gates: Gates, use: int, edited: EditedReferences | None
) -> Record:
    """The verdict on a candidate, not stored. Reads records and blobs only, so it needs no database.

    use: how many candidates the test rows have judged, with this one. edited: as `edited_references` found it.
    """
    record = store.record(evaluation, kind="evaluation")
    measured = EvaluationBody.of(record)
    digest = _candidate_digest(measured, candidate)
    check_gates(gates, measured.metrics, measured.candidates)
    findings = _findings(store, record, measured, candidate, gates, use)
    outcomes = [finding.outcome for finding in findings.values()]
    verdict: Outcome = "fail" if "fail" in outcomes else "inconclusive" if "inconclusive" in outcomes else "pass"
    body = VerdictBody(
        name=candidate,
        verdict=verdict if outcomes else "inconclusive",
        test_set_use=use,
        gates=tuple(_judged(name, findings[name], gate) for name, gate in gates.items()),
        reason=None if outcomes else NO_GATES,
        edited=edited,
    )
    return body.record({"evaluation": evaluation, "candidate": digest})


def replay(store: Store, digest: str) -> bool:
    """Whether a verdict follows from its evaluation's scores. Computes it again; differing reasons do not count.

    Gates that are gone count with the outcome of then.
    """
    kept = store.record(digest, kind="verdict")
    body = VerdictBody.of(kept)
    parts = (body.name, recorded_gates(body.gates), body.test_set_use, body.edited)
    again = verdict_record(store, kept.parents["evaluation"], *parts)
    return canonical(_without_reasons(again)) == canonical(_without_reasons(kept))


def _without_reasons(record: Record) -> dict[str, Any]:
    stated = record.model_dump(mode="json")
    for part in (stated["body"], *stated["body"]["gates"]):
        part.pop("reason", None)
    return stated


def _findings(
    store: Store, record: Record, measured: EvaluationBody, candidate: str, gates: Gates, use: int
) -> dict[str, GateFinding]:
    try:
        columns = read_scores(store, record)
        measurements = read_measurements(store, record)
        labelled = read_labels(store, record, columns)
        policy, style = read_policy(store, record), read_style(store, record)
    except Inconclusive as error:
        reason = f"{error.what} ({error.where})" if error.where else error.what
        return {name: not_judged(gate, reason) for name, gate in gates.items()}
    held = measured.policy.candidates if measured.policy else {}
    evidence = Evidence(
        columns=columns,
        tuned={name: stated.tuned for name, stated in measured.candidates.items()},
        candidate=candidate,
        test_set_use=use,
        seed=measured.seed,
        measured=measurements,
        told={(suite, name): stated for suite, each in measured.risks.items() for name, stated in each.items()},
        primary=measured.primary,
        labelled=labelled,
        policy=policy,
        style=style,
        no_policy={name: each.unusable for name, each in held.items() if each.unusable},
        no_style=measured.style.unusable if isinstance(measured.style, NoStyle) else "",
        kind=load_candidate(store, _candidate_digest(measured, candidate)).kind,
    )
    return _corrected(gates, {name: judge_gate(gate, evidence) for name, gate in gates.items()}, evidence)


def _corrected(gates: Gates, findings: dict[str, GateFinding], evidence: Evidence) -> dict[str, GateFinding]:
    """The findings with failures that chance explains made inconclusive (Holm 1979), never a pass.

    A pass needs every gate, so each gate keeps its own error rate. A failure needs only one gate, and among many gates
    a sound candidate would fail one by chance. So a failure must hold at the level that Holm's procedure leaves it.
    """
    family = [name for name, gate in gates.items() if gate.confidence is not None]
    claimed = {name for name in family if findings[name].outcome == "fail"}
    upheld = step_down(claimed, len(family), lambda name, among: _fails(gates[name], among, evidence))
    for name in claimed - upheld:
        reason = f"{findings[name].reason}; with {len(family)} gates, chance alone could explain this failure"
        findings[name] = replace(findings[name], outcome="inconclusive", reason=reason)
    return findings


def _fails(gate: Gate, among: int, evidence: Evidence) -> bool:
    assert gate.confidence is not None
    stricter = gate.model_copy(update={"confidence": 1.0 - (1.0 - gate.confidence) / among})
    return judge_gate(stricter, evidence).outcome == "fail"


def _judged(name: str, finding: GateFinding, gate: Gate) -> JudgedGate:
    if isinstance(gate, Gone):
        return gate.stated
    return JudgedGate(
        name=name,
        outcome=finding.outcome,
        value=finding.value,
        low=finding.low,
        high=finding.high,
        bound=finding.bound,
        reason=finding.reason,
        settings=gate.rule,
        **finding.extra,
    )


def _candidate_digest(measured: EvaluationBody, candidate: str) -> str:
    known = measured.candidates
    if candidate not in known:
        raise UsageError(
            f"the evaluation has no candidate {candidate!r}{nearest(candidate, known)}",
            fix=f"name one of: {', '.join(known)}",
        )
    return known[candidate].candidate
