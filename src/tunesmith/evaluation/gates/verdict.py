"""The verdict: all gates of the project applied to one candidate of an evaluation.

A verdict depends only on the evaluation's scores, the gates' settings and the use of the test set that it states.
`replay` computes it again offline and compares everything but the reasons: their wording may change between releases.

Test references that were changed after an evaluation of the same requests are stated, too. Whoever knows what the
candidates answered can change the references to it. Honest corrections look the same, so the verdict counts them, names
the reviewers whom the log knows, and states the score without them.
"""

from __future__ import annotations

import contextlib
from collections import defaultdict
from typing import Any

from tunesmith.candidates.candidate import load_candidate
from tunesmith.core.digests import canonical
from tunesmith.core.errors import Inconclusive, Refused, UsageError
from tunesmith.core.text.folding import fold
from tunesmith.data.dataset import Dataset, load_dataset
from tunesmith.data.duplicates import answer_key
from tunesmith.data.governance.withdrawn import content_key
from tunesmith.evaluation.gates.judging import Evidence, judge_gate, not_judged
from tunesmith.evaluation.gates.settings import Gates, Gone, check_gates, recorded_gates
from tunesmith.evaluation.gates.test_set_uses import use_test_set
from tunesmith.evaluation.metrics.classification import read_labels
from tunesmith.evaluation.metrics.scorers import nearest
from tunesmith.evaluation.policy.outcomes import read_policy
from tunesmith.evaluation.probes.measuring import read_measurements
from tunesmith.evaluation.scores import read_scores
from tunesmith.evaluation.stats.statistics import step_down
from tunesmith.evaluation.style.shares import read_style
from tunesmith.records.evaluation import (
    EditedReferences,
    EvaluationBody,
    JudgedGate,
    MeasuredCandidate,
    Outcome,
    VerdictBody,
)
from tunesmith.store.people.identities import acting
from tunesmith.store.records import Record
from tunesmith.store.store import Store

_TEST = "test.jsonl"


def edited_references(store: Store, evaluation: str, candidate: str) -> EditedReferences | None:
    """How many test references differ from what an earlier evaluation of these requests was scored against; None where
    no reference was changed."""
    record = store.record(evaluation, kind="evaluation")
    dataset = load_dataset(store, record.parents["dataset"])
    changed = _changed(store, dataset)
    if not changed:
        return None
    # Content key of an edited row -> who edited it, where the audit log knows.
    by, edits = dataset.body.reviewers, dataset.body.edits
    reviewers = {key: by[row] for row, keys in edits.items() if row in by for key in keys}
    named = {row: reviewers[key] for row, key in changed.items() if key in reviewers}
    metric = EvaluationBody.of(record).primary
    try:
        column = read_scores(store, record)[candidate, metric]
    except Inconclusive:  # the verdict says so
        return None
    cells = dict(zip(column.ids, map(float, column.values), strict=True))
    others = [score for row, score in cells.items() if row not in changed]
    return EditedReferences(
        rows=len(changed),
        of=len(cells),
        by=tuple(sorted({who for row in changed for who in named.get(row, ())})),
        unnamed=sum(row not in named for row in changed),
        metric=metric,
        mean=sum(cells.values()) / len(cells),
        without=sum(others) / len(others) if others else None,
    )


def edited_sentence(stated: EditedReferences) -> str:
    """What an approver reads of the record's `edited`."""
    without = "none is left" if stated.without is None else f"it is {stated.without:.1%}"
    by = ", ".join([*stated.by, *(["nobody whom the log names"] if stated.unnamed else [])])
    return (
        f"{stated.rows} of {stated.of} test references were changed after an evaluation of the same requests, by "
        f"{by}. {stated.metric} is {stated.mean:.1%}; without these rows {without}."
    )


def _changed(store: Store, dataset: Dataset) -> dict[str, str]:
    """Test rows whose request an earlier evaluation had with other answers only: id -> content key."""
    now = {example.wording: example for example in dataset.examples("test")}
    changed: dict[str, str] = {}
    seen = {dataset.record.blobs.get(_TEST)}
    earlier = {store.record(each, kind="evaluation").parents["dataset"] for each in store.records_of("evaluation")}
    for digest in sorted(earlier - {dataset.digest}):
        with contextlib.suppress(Refused):  # rows that are damaged or gone say nothing
            before = load_dataset(store, digest)
            rows = before.record.blobs.get(_TEST)
            if before.scope != dataset.scope or rows in seen:
                continue
            seen.add(rows)
            answers: defaultdict[str, set[str]] = defaultdict(set)
            for example in before.examples("test"):
                answers[example.wording].add(fold(answer_key(example.answer)))
            for wording, known in answers.items():
                if wording in now and fold(answer_key(now[wording].answer)) not in known:
                    changed[now[wording].id] = content_key(now[wording])
    return changed


NO_GATES = "the project file sets no gates, and a candidate that meets no requirement cannot pass"


def judge(store: Store, *, evaluation: str, candidate: str, gates: Gates, actor: str | None = None) -> str:
    """Judge a candidate by name and store the verdict record; returns its digest.

    The audit log records the use of the test set first, by actor (default: the store's owner). The verdict is "fail"
    where any gate fails, else "inconclusive" where any gate is inconclusive or there are no gates, else "pass".
    Raises UsageError for a candidate, metric or rival that the evaluation does not hold.
    """
    digest = measured_candidate(EvaluationBody.read(store, evaluation), candidate).candidate
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
    digest = measured_candidate(measured, candidate).candidate
    check_gates(gates, measured.metrics, measured.candidates)
    findings = _findings(store, record, measured, candidate, gates, use)
    outcomes = [finding.outcome for finding in findings.values()]
    verdict: Outcome = "fail" if "fail" in outcomes else "inconclusive" if "inconclusive" in outcomes else "pass"
    body = VerdictBody(
        name=candidate,
        verdict=verdict if outcomes else "inconclusive",
        test_set_use=use,
        gates=tuple(findings[name] for name in gates),
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
) -> dict[str, JudgedGate]:
    try:
        columns = read_scores(store, record)
        evidence = Evidence(
            body=measured,
            candidate=candidate,
            kind=load_candidate(store, measured.candidates[candidate].candidate).kind,
            use=use,
            columns=columns,
            measured=read_measurements(store, record),
            labelled=read_labels(store, record, columns),
            policy=read_policy(store, record),
            style=read_style(store, record),
        )
    except Inconclusive as error:
        return {
            name: gate.stated if isinstance(gate, Gone) else not_judged(name, gate, error.reason)
            for name, gate in gates.items()
        }
    return _corrected(gates, {name: judge_gate(name, gate, evidence) for name, gate in gates.items()}, evidence)


def _corrected(gates: Gates, findings: dict[str, JudgedGate], evidence: Evidence) -> dict[str, JudgedGate]:
    """The findings with failures that chance explains made inconclusive (Holm 1979), never a pass.

    A pass needs every gate, so each gate keeps its own error rate. A failure needs only one gate, and among many gates
    a sound candidate would fail one by chance. So a failure must hold at the level that Holm's procedure leaves it.
    """
    family = [name for name, gate in gates.items() if gate.confidence is not None]
    claimed = {name for name in family if findings[name].outcome == "fail"}

    def fails(name: str, among: int) -> bool:
        confidence = gates[name].confidence
        assert confidence is not None
        stricter = gates[name].model_copy(update={"confidence": 1.0 - (1.0 - confidence) / among})
        return judge_gate(name, stricter, evidence).outcome == "fail"

    upheld = step_down(claimed, len(family), fails)
    for name in claimed - upheld:
        reason = f"{findings[name].reason}; with {len(family)} gates, chance alone could explain this failure"
        findings[name] = findings[name].model_copy(update={"outcome": "inconclusive", "reason": reason})
    return findings


def measured_candidate(measured: EvaluationBody, name: str) -> MeasuredCandidate:
    """What an evaluation states of a candidate. Raises UsageError where it holds none of this name."""
    known = measured.candidates
    if name not in known:
        raise UsageError(
            f"the evaluation has no candidate {name!r}{nearest(name, known)}", fix=f"name one of: {', '.join(known)}"
        )
    return known[name]
