"""Collects what the report shows from the records."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence

import numpy as np

from tunesmith.candidates.candidate import Candidate, load_candidate
from tunesmith.candidates.composing import describe_prompts
from tunesmith.core.digests import digest_bytes
from tunesmith.data.dataset import dataset_summary, load_dataset
from tunesmith.evaluation.answers import before_tuning
from tunesmith.evaluation.compare import compare, side_of_candidate
from tunesmith.evaluation.lines import read_answer_lines
from tunesmith.evaluation.prices import break_even
from tunesmith.evaluation.report.advice import advise
from tunesmith.evaluation.report.approach_ladder import approach_ladder, lift_by_group
from tunesmith.evaluation.report.bases import compared_bases
from tunesmith.evaluation.report.behaviour import policy_report, risks, style_report
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
    ReportedTraining,
    ReportedVersion,
    ScoredAnswer,
    TrailEntry,
)
from tunesmith.evaluation.scores import GENERAL, Column, Columns, read_scores
from tunesmith.evaluation.summary import evaluation_summary, leading_metric, rival_of, verdict_summary
from tunesmith.records.candidate import BaseBody
from tunesmith.records.evaluation import EvaluationBody, VerdictBody
from tunesmith.records.training import SearchBody, TrainingBody
from tunesmith.records.version import ApprovalBody, PaperBody, Requirement, VersionBody
from tunesmith.store.records import Record
from tunesmith.store.store import Store
from tunesmith.training.schedule import more_time

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
    columns, body = read_scores(store, record), EvaluationBody.of(record)
    judged = verdict_summary(store, verdict) if verdict is not None else None
    body = body.model_copy(update={"primary": leading_metric(judged, body.primary)})
    leading = max(sorted(body.candidates), key=lambda name: (body.candidates[name].tuned, body.mean(name)))
    focus = judged.candidate if judged else leading
    rival, rival_gate = rival_of(evaluation_summary(store, evaluation), judged, focus)
    own = body.candidates[focus]
    lift, by_group, repaid, primary = None, None, None, body.primary
    if rival is not None:
        lift = compare(store, *(side_of_candidate(store, evaluation, name) for name in (rival, focus)))
        by_group = lift_by_group(columns[focus, primary], columns[rival, primary])
        repaid = break_even(own.price, own.training.money if own.training else 0.0, body.candidates[rival].price)
    evidence = Evidence.of(
        body,
        evaluation=evaluation,
        verdict=judged,
        version=_version(store, version),
        focus=focus,
        rival=rival,
        rival_gate=rival_gate,
        candidates=_candidates(store, body, focus, rival),
        lift=lift,
        training=_training(store, load_candidate(store, own.candidate)),
        currency=body.prices.currency if body.prices else None,
        break_even=repaid,
        bases=compared_bases(store, body, columns),
        ladder=approach_ladder(store, body, columns),
        by_group=by_group,
        classes=body.by_candidate("classes"),
        calibration=body.by_candidate("calibration"),
        forgetting=_forgetting(columns, body, focus),
        risks=risks(store, record, focus),
        policy=policy_report(store, record, focus),
        style=style_report(body.style),
        dataset=dataset_summary(store, record.parents["dataset"]),
        examples=_examples(store, record, primary, columns, focus, rival),
        lineage=_lineage(store, record, body, focus, verdict, version),
        trail=tuple(trail),
    )
    return EvidenceReport.of(evidence, advice=advise(evidence))


def _version(store: Store, version: str | None) -> ReportedVersion | None:
    if version is None:
        return None
    body = VersionBody.read(store, version)
    return ReportedVersion.of(body, digest=version, label=body.line, takes=_takes(body.risk) if body.risk else None)


def _takes(risk: Requirement) -> str:
    """What a version's risk class takes, in one sentence."""
    people = f"{risk.approvers} approver{'s' if risk.approvers > 1 else ''}"
    also = f", among them one for each of these roles: {', '.join(risk.roles)}" if risk.roles else ""
    return f"Risk class {risk.risk_class}: it serves once {people} approved it{also}."


def _candidates(store: Store, body: EvaluationBody, focus: str, rival: str | None) -> tuple[ReportedCandidate, ...]:
    """One row for each candidate, the best by the primary metric first."""
    rows, candidates = [], {name: load_candidate(store, stated.candidate) for name, stated in body.candidates.items()}
    several = len({candidate.base for candidate in candidates.values() if candidate.asks_base}) > 1
    for name, stated in sorted(body.candidates.items(), key=lambda one: (-body.mean(one[0]), one[0])):
        candidate = candidates[name]
        how, role = _how(store, candidate, stated.system_prompts), {focus: "focus", rival: "rival"}.get(name, "")
        if several and candidate.asks_base:
            how = f"{BaseBody.read(store, candidate.base).title}, {how}"
        rows.append(ReportedCandidate.of(stated, name=name, kind=candidate.kind, how=how, role=role))
    return tuple(rows)


def _how(store: Store, candidate: Candidate, system_prompts: Mapping[str, int]) -> str:
    """How a candidate answers, in words."""
    if candidate.method != "model":
        return f"baseline without a language model: {_BASELINES[candidate.method]}"
    parts = [describe_prompts(system_prompts)]
    if candidate.endpoint is not None:
        parts.append(f"endpoint, {candidate.endpoint.model} (cannot be released)")
    if candidate.search is not None:
        search = SearchBody.read(store, candidate.search)
        what = "prompt of the best" if candidate.tuned else "best"
        parts.append(f"{what} of {len(search.tries)} combinations on {search.rows} validation rows")
    if candidate.training is not None:
        settings = TrainingBody.read(store, candidate.training).settings
        parts.append("tuned weights" + (f" (LoRA, rank {settings.rank})" if settings.rank else ""))
        if settings.permute_answers:
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


def _training(store: Store, candidate: Candidate) -> ReportedTraining | None:
    if candidate.training is None:
        return None
    body = TrainingBody.read(store, candidate.training)
    return ReportedTraining.of(body, training=candidate.training, more_time=more_time(body))


def _forgetting(columns: Columns, body: EvaluationBody, focus: str) -> Forgetting | None:
    """General ability before and after tuning, overall and by area; None where it was not measured."""
    stated = body.probes.get(GENERAL)
    if stated is None or focus not in stated.drops:
        return None
    bare = before_tuning(focus, stated.scores)
    before, after = columns[bare, GENERAL], columns[focus, GENERAL]
    places: defaultdict[str, list[int]] = defaultdict(list)
    for place, identifier in enumerate(before.ids):
        places[identifier.rpartition("-")[0]].append(place)
    areas = {
        area: AreaScores(n=len(own), before=before.values[own].mean(), after=after.values[own].mean())
        for area, own in sorted(places.items())
    }
    scores = {"before": stated.scores[bare], "after": stated.scores[focus]}
    return Forgetting(n=stated.n, drop=stated.drops[focus], areas=areas, **scores)


def _examples(
    store: Store,
    record: Record,
    primary: str,
    columns: Columns,
    focus: str,
    rival: str | None,
) -> Examples | None:
    """Test rows where the candidate and its rival differ most; among equals chosen by hash, not by hand."""
    if rival is None:
        return None
    own, other = columns[focus, primary], columns[rival, primary]
    lines = {
        name: read_answer_lines(store, store.record(record.parents[f"answers:{name}"]), own.ids, f"answers of {name!r}")
        for name in (focus, rival)
    }
    rows = {row.id: row for row in load_dataset(store, record.parents["dataset"]).examples("test")}
    gaps = own.values - other.values

    def side(sign: float) -> ExampleSide:
        candidates: list[int] = np.flatnonzero(gaps * sign > 0).tolist()
        ranked = sorted(candidates, key=lambda i: (-abs(gaps[i]), digest_bytes(own.ids[i].encode())))
        chosen = _one_a_group(own, ranked)
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
    first = set({column.groups[index]: index for index in reversed(ranked)}.values())
    return sorted(ranked, key=lambda index: index not in first)[:_SHOWN_EXAMPLES]


def _lineage(
    store: Store, record: Record, body: EvaluationBody, focus: str, verdict: str | None, version: str | None
) -> tuple[LineageNode, ...]:
    """The records behind the result, oldest first."""
    candidate, others = body.candidates[focus].candidate, len(body.candidates) - 1
    made = store.record(candidate, kind="candidate").parents
    training = made.get("training")
    labels: dict[str | None, str] = {
        made["base"]: BaseBody.read(store, made["base"]).line,
        record.parents["dataset"]: f"{body.n} test rows held out",
        training: f"{TrainingBody.read(store, training).steps} steps" if training else "",
        candidate: focus,
        record.parents[f"answers:{focus}"]: f"of {focus} to the test rows",
        record.digest: f"{focus} and {others} other{'s' if others != 1 else ''} on the same rows",
        verdict: VerdictBody.read(store, verdict).verdict if verdict else "",
        version: VersionBody.read(store, version).line if version else "",
    }
    for _, kind, child in store.children(version) if version else ():
        if kind == "approval":
            labels[child] = ApprovalBody.read(store, child).line
        elif kind == "paper":
            labels[child] = PaperBody.read(store, child).line
    records = {digest: store.record(digest) for digest in labels if digest is not None}
    position = {digest: place for place, digest in enumerate(records)}
    return tuple(
        LineageNode(
            kind=each.kind,
            digest=digest,
            label=labels[digest],
            parents=tuple(sorted({position[parent] for parent in each.parents.values() if parent in position})),
        )
        for digest, each in records.items()
    )
