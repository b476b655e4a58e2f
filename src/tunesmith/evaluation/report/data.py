"""Collects what the report shows from the records."""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

from tunesmith.candidates.candidate import Candidate, load_candidate
from tunesmith.candidates.composing import describe_prompts
from tunesmith.data.building.summary import dataset_summary
from tunesmith.data.dataset import load_dataset
from tunesmith.evaluation.answers import BASE
from tunesmith.evaluation.compare import compare, side_of_candidate
from tunesmith.evaluation.lines import read_answer_lines
from tunesmith.evaluation.prices import break_even
from tunesmith.evaluation.report.advice import advise
from tunesmith.evaluation.report.approach_ladder import approach_ladder, lift_by_group
from tunesmith.evaluation.report.behaviour import policy_report, style_report
from tunesmith.evaluation.report.evidence import (
    AreaScores,
    Evidence,
    EvidenceReport,
    ExampleRow,
    Examples,
    ExampleSide,
    Forgetting,
    LineageNode,
    ReportedCandidate,
    ReportedVersion,
    ScoredAnswer,
    TrailEntry,
)
from tunesmith.evaluation.report.risks import risks
from tunesmith.evaluation.scores import GENERAL, Column, read_scores
from tunesmith.evaluation.summary import EvaluationSummary, evaluation_summary, rival_of, verdict_summary
from tunesmith.records.evaluation import EvaluationBody
from tunesmith.records.training import TrainingBody
from tunesmith.store.records import Record
from tunesmith.store.store import Store
from tunesmith.training.estimates.more_time import more_time

_SHOWN_EXAMPLES = 6
_BASELINES = {"nearest": "the answer of the most similar training example", "classifier": "TF-IDF, logistic regression"}


def report_data(
    store: Store,
    evaluation: str,
    verdict: str | None = None,
    version: str | None = None,
    trail: Sequence[TrailEntry] = (),
) -> EvidenceReport:
    """Everything that the report shows. evaluation, verdict, version: digests.

    The candidate in focus is the verdict's; without a verdict it is the best by the primary metric, tuned candidates
    first. Raises Inconclusive for inconsistent scores.
    """
    record = store.record(evaluation, kind="evaluation")
    columns = read_scores(store, record)
    measured = evaluation_summary(store, evaluation)
    judged = verdict_summary(store, verdict) if verdict is not None else None
    focus = judged.candidate if judged else _leader(measured)
    rival, rival_gate = rival_of(measured, judged, focus)
    stated = EvaluationBody.of(record).candidates
    trained = stated[focus].training
    lift, by_group, repaid, primary = None, None, None, measured.primary
    if rival is not None:
        lift = compare(store, *(side_of_candidate(store, evaluation, name) for name in (rival, focus)))
        by_group = lift_by_group(columns[focus, primary], columns[rival, primary])
        repaid = break_even(stated[focus].price, trained.money if trained else 0.0, stated[rival].price)
    found = Evidence(
        evaluation=evaluation,
        verdict=judged,
        version=_version(store, version),
        n=measured.n,
        groups=measured.groups,
        confidence=measured.confidence,
        seed=record.body["seed"],
        primary=primary,
        metrics=tuple(record.body["metrics"]),
        focus=focus,
        rival=rival,
        rival_gate=rival_gate,
        candidates=tuple(_candidates(store, record, measured, focus, rival)),
        lift=lift,
        training=_training(store, load_candidate(store, stated[focus].candidate)),
        currency=measured.currency,
        break_even=repaid,
        ladder=approach_ladder(store, record, columns, measured.confidence),
        by_group=by_group,
        classes=measured.classes,
        calibration=measured.calibration,
        judges=measured.judges,
        forgetting=_forgetting(columns, measured, focus),
        risks=risks(store, record, focus, measured.confidence),
        policy=policy_report(store, record, focus),
        style=style_report(record),
        dataset=dataset_summary(store, record.parents["dataset"]),
        examples=_examples(store, record, columns, focus, rival),
        lineage=tuple(_lineage(store, record, evaluation, focus, verdict, version)),
        trail=tuple(trail),
    )
    return EvidenceReport.of(found, advice=advise(found))


def _leader(measured: EvaluationSummary) -> str:
    names = sorted(measured.candidates)
    return max(names, key=lambda name: (measured.tuned[name], measured.mean(name)))


def _version(store: Store, version: str | None) -> ReportedVersion | None:
    if version is None:
        return None
    body = store.record(version, kind="version").body
    risk, kept = body.get("risk"), ("tenant", "region", "override", "created_at", "signer")
    return ReportedVersion(
        digest=version,
        label=f"{body['name']}@v{body['number']}",
        name=body["name"],
        number=body["number"],
        takes=None if risk is None else _takes(risk),
        **{key: body.get(key) for key in kept},
    )


def _takes(risk: Mapping[str, Any]) -> str:
    """What a version's risk class takes, in one sentence."""
    people = f"{risk['approvers']} approver{'s' if risk['approvers'] > 1 else ''}"
    also = f", among them one for each of these roles: {', '.join(risk['roles'])}" if risk["roles"] else ""
    return f"Risk class {risk['risk_class']}: it serves once {people} approved it{also}."


def _candidates(
    store: Store, record: Record, measured: EvaluationSummary, focus: str, rival: str | None
) -> list[ReportedCandidate]:
    """One row for each candidate, the best by the primary metric first."""
    rows = []
    for name, stated in record.body["candidates"].items():
        candidate = load_candidate(store, stated["candidate"])
        rows.append(
            ReportedCandidate(
                name=name,
                kind=candidate.kind,
                how=_how(store, candidate, stated["system_prompts"]),
                system_prompts=stated["system_prompts"],
                role="focus" if name == focus else "rival" if name == rival else "",
                tuned=stated["tuned"],
                candidate=stated["candidate"],
                metrics=measured.candidates[name],
                price=measured.prices[name],
                cut=stated["cut"],
            )
        )
    return sorted(rows, key=lambda row: (-row.metrics[measured.primary].mean, row.name))


def _how(store: Store, candidate: Candidate, system_prompts: Mapping[str, int]) -> str:
    """How a candidate answers, in words."""
    if candidate.method != "model":
        return f"baseline without a language model: {_BASELINES[candidate.method]}"
    parts = [describe_prompts(system_prompts)]
    if candidate.endpoint is not None:
        parts.append(f"endpoint, {candidate.endpoint.model} (cannot be released)")
    if candidate.search is not None:
        found = store.record(candidate.search, kind="search").body
        parts.append(f"best of {len(found['tries'])} combinations on {found['rows']} validation rows")
    if candidate.training is not None:
        settings = store.record(candidate.training, kind="training").body.get("settings", {})
        rank = settings.get("rank")
        parts.append("tuned weights" + (f" (LoRA, rank {rank})" if rank else ""))
        if settings.get("permute_answers"):
            parts.append("control that was trained on shuffled answers")
    if candidate.shots:
        parts.append(f"{len(candidate.shots)} fixed examples in the prompt")
    if candidate.retrieve is not None:
        what = "passages of documents" if candidate.documents is not None else "examples"
        by = "" if candidate.retrieve.by == "bm25" else f" ({candidate.retrieve.by})"
        parts.append(f"{candidate.retrieve.k} retrieved {what} in the prompt{by}")
    if candidate.answer_grammar is not None:
        parts.append("answers constrained to the grammar")
    if candidate.answer_schema is not None:
        copied = f", {', '.join(candidate.copied)} to words of the request" if candidate.copied else ""
        parts.append(f"answers constrained to the schema{copied}")
    return ", ".join(parts)


def _training(store: Store, candidate: Candidate) -> dict[str, Any] | None:
    if candidate.training is None:
        return None
    body = store.record(candidate.training, kind="training").body
    shown = ("settings", "rows", "rehearsed", "tokens", "labels", "steps", "seconds", "examples_per_second",
             "tokens_per_second", "peak_memory_bytes", "estimate", "final_loss", "curve",
             "validation", "overfitting", "kept", "threads", "epochs", "score", "decisions",
             "notices")  # fmt: skip
    told = {"training": candidate.training, **{key: body[key] for key in shown if key in body}}
    found = more_time(TrainingBody.read(store, candidate.training))
    return told | {"more_time": None if found is None else found.document()}


def _forgetting(
    columns: Mapping[tuple[str, str], Column], measured: EvaluationSummary, focus: str
) -> Forgetting | None:
    """General ability before and after tuning, overall and by area; None where it was not measured."""
    stated = measured.probes.get(GENERAL)
    if stated is None or focus not in stated.drops:
        return None
    before, after = columns[BASE, GENERAL], columns[focus, GENERAL]
    by_area: dict[str, list[tuple[float, float]]] = defaultdict(list)
    for identifier, old, new in zip(before.ids, before.values.tolist(), after.values.tolist(), strict=True):
        by_area[identifier.rpartition("-")[0]].append((old, new))
    areas = {
        area: AreaScores(
            n=len(pairs), before=sum(p[0] for p in pairs) / len(pairs), after=sum(p[1] for p in pairs) / len(pairs)
        )
        for area, pairs in sorted(by_area.items())
    }
    return Forgetting(
        n=stated.n, before=stated.scores[BASE], after=stated.scores[focus], drop=stated.drops[focus], areas=areas
    )


def _examples(
    store: Store, record: Record, columns: Mapping[tuple[str, str], Column], focus: str, rival: str | None
) -> Examples | None:
    """Test rows where the candidate and its rival differ most; among equals chosen by hash, not by hand."""
    if rival is None:
        return None
    primary = record.body["primary"]
    own, other = columns[focus, primary], columns[rival, primary]
    lines = {
        name: read_answer_lines(store, store.record(record.parents[f"answers:{name}"]), own.ids, f"answers of {name!r}")
        for name in (focus, rival)
    }
    rows = {row.id: row for row in load_dataset(store, record.parents["dataset"]).examples("test")}
    gaps = own.values - other.values

    def side(sign: float) -> ExampleSide:
        candidates = [index for index in range(len(gaps)) if gaps[index] * sign > 0]
        chosen = _one_a_group(own, sorted(candidates, key=lambda i: (-abs(float(gaps[i])), _mixed(own.ids[i]))))
        return ExampleSide(n=len(candidates), shown=tuple(map(example, chosen)))

    def example(i: int) -> ExampleRow:
        row = rows[own.ids[i]]
        return ExampleRow(
            id=row.id,
            group=own.groups[i],
            turns=len(row.messages),
            request=row.messages[-2].content,
            reference=row.answer,
            rival=ScoredAnswer(text=lines[rival][row.id]["text"], score=float(other.values[i])),
            focus=ScoredAnswer(text=lines[focus][row.id]["text"], score=float(own.values[i])),
        )

    return Examples(metric=primary, wins=side(1.0), losses=side(-1.0))


def _one_a_group(column: Column, ranked: Sequence[int]) -> list[int]:
    """The first few rows, from different groups as far as possible."""
    seen: set[str] = set()
    first: list[int] = []
    again: list[int] = []
    for index in ranked:
        (again if column.groups[index] in seen else first).append(index)
        seen.add(column.groups[index])
    return [*first, *again][:_SHOWN_EXAMPLES]


def _mixed(identifier: str) -> str:
    return hashlib.sha256(identifier.encode()).hexdigest()


def _lineage(
    store: Store, record: Record, evaluation: str, focus: str, verdict: str | None, version: str | None
) -> list[LineageNode]:
    """The records behind the result, oldest first: {digest, kind, label, parents: positions in this list}."""
    candidate = record.body["candidates"][focus]["candidate"]
    made = store.record(candidate, kind="candidate")
    training = made.parents.get("training")
    base_body = store.record(made.parents["base"], kind="base").body
    others = len(record.body["candidates"]) - 1
    nodes: list[tuple[str, str, str]] = [
        ("base", made.parents["base"], str(base_body.get("spec", ""))),
        ("dataset", record.parents["dataset"], f"{record.body['n']} test rows held out"),
    ]
    if training is not None:
        nodes.append(("training", training, f"{store.record(training).body.get('steps', '?')} steps"))
    nodes.append(("candidate", candidate, focus))
    nodes.append(("answers", record.parents[f"answers:{focus}"], f"of {focus} to the test rows"))
    nodes.append(("evaluation", evaluation, f"{focus} and {others} other{'s' if others != 1 else ''} on the same rows"))
    if verdict is not None:
        nodes.append(("verdict", verdict, store.record(verdict).body["verdict"]))
    if version is not None:
        body = store.record(version).body
        nodes.append(("version", version, f"{body['name']}@v{body['number']}"))
        for _, kind, child in store.children(version):
            if kind == "approval":
                said = store.record(child).body
                nodes.append(("approval", child, f"{said.get('decision', 'decided')} by {said.get('approver', '?')}"))
    position = {digest: index for index, (_, digest, _) in enumerate(nodes)}
    return [
        LineageNode(
            kind=kind,
            digest=digest,
            label=label,
            parents=tuple(sorted({position[p] for p in store.record(digest).parents.values() if p in position})),
        )
        for kind, digest, label in nodes
    ]
