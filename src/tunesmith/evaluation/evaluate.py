"""Scores all candidates' answers and writes the evaluation record: scores, means with intervals, costs, probes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from tunesmith.candidates.composing import count_prompts
from tunesmith.candidates.settings import TokenPrice
from tunesmith.core.digests import short
from tunesmith.core.errors import Inconclusive, UsageError
from tunesmith.data.dataset import Example, load_dataset
from tunesmith.evaluation.answers import BASE, Answers, check_held_out, read_answers, read_probe, seen_answers
from tunesmith.evaluation.lines import encode_lines
from tunesmith.evaluation.metrics.answer_judge import read_judged
from tunesmith.evaluation.metrics.classification import calibration, classes
from tunesmith.evaluation.metrics.declared import (
    CONTEXT_SCORERS,
    Answered,
    JudgeScorer,
    Scoring,
    checked,
    function_digests,
    make_scoring,
    metric_of,
    scorer_digests,
)
from tunesmith.evaluation.metrics.labels import LABELS, Labelled, encode_labels, label_rows
from tunesmith.evaluation.policy.outcomes import POLICY, PolicyAnswers, measure_policy
from tunesmith.evaluation.prices import price_of
from tunesmith.evaluation.probes.items import MEASUREMENTS
from tunesmith.evaluation.probes.measuring import Risk, measure
from tunesmith.evaluation.probes.numbers import general_digest, general_questions
from tunesmith.evaluation.scores import GENERAL, SCORES, Column, column, drop, encode_scores, metric_interval, rounded
from tunesmith.evaluation.settings import PriceSettings, TaskSettings
from tunesmith.evaluation.stats.statistics import effective_groups, interval, intervals
from tunesmith.evaluation.style.shares import STYLE, measure_style
from tunesmith.records.evaluation import (
    EvaluationBody,
    GeneralSuite,
    JudgeResults,
    MeasuredCandidate,
    MetricInterval,
    NoStyle,
    PolicyAccount,
    Prices,
    RiskResults,
    StyleAccount,
    TrainingCost,
)
from tunesmith.records.training import TrainingBody
from tunesmith.store.store import Store

# Of every interval in the record. A gate may use another.
CONFIDENCE = 0.95


@dataclass(frozen=True, slots=True)
class Costs:
    """Prices. tokens: candidate -> the price of its endpoint's tokens."""

    prices: PriceSettings | None = None
    tokens: Mapping[str, TokenPrice] = field(default_factory=dict)


def evaluate(
    store: Store,
    *,
    dataset: str,
    answers: Mapping[str, str],
    probes: Mapping[str, str],
    task: TaskSettings,
    answer_schema: dict[str, Any] | None,
    seed: int = 0,
    risks: Mapping[str, Mapping[str, Risk]] | None = None,
    root: Path = Path(),
    judged: Mapping[tuple[str, str], str] | None = None,
    costs: Costs | None = None,
    policy: PolicyAnswers | None = None,
    style: str | None = None,
) -> str:
    """Score answers and store an evaluation record; returns its digest. The same arguments give the same digest.

    dataset: digest of the dataset version whose test rows were answered.
    answers: candidate -> digest of its answers record.
    probes: "base" and the names of tuned candidates -> digest of their answers to the general suite. Where it is empty,
        a forgetting gate is inconclusive.
    seed: of the resampling.
    risks: suite -> candidate -> answers to the risk probe. A probe gate without them is inconclusive.
    root: the project's folder, for the files of function scorers.
    judged: (candidate, metric) -> digest of the judge's record.
    policy: the policy checks with the candidates' answers to their requests. A policy gate without them is
        inconclusive.
    style: digest of the bare base model's answers to the test rows. A style gate without them is inconclusive.

    Raises Inconclusive for answers that do not match the test rows, and UsageError for names that do not match.
    Raises Refused where a candidate was trained on test rows or shows them in its prompt.
    """
    judged, risks, costs = judged or {}, risks or {}, costs or Costs()
    test, given, seen = _answered(store, dataset, answers)
    scoring = {
        metric_of(scorer): make_scoring(scorer, answer_schema, root)
        for scorer in task.scorers
        if not isinstance(scorer, JudgeScorer)
    }
    columns, judges = _columns(store, task, given, seen, scoring, judged, test)
    general, stated_probes = _probed(store, probes, given, seed)
    measurements, stated_risks = _measured(store, risks, given, dataset, _scoring_of_probes(task, scoring))
    held, stated_policy = _held_to_policy(store, policy, given, seed)
    classified: list[dict[str, Any]] = []
    stated_style: StyleAccount | NoStyle | None = None
    if style is not None:
        lines = {name: those.lines for name, those in given.items()}
        classified, stated_style = measure_style(store, style, dataset, test, lines, CONFIDENCE, seed)
    labelled = {
        (name, scorer.name): label_rows(scorer, those.lines, seen[name], test)
        for name, those in given.items()
        for scorer in task.labels
    }
    stated = _stated(store, given, columns, labelled, test, seed, costs)
    groups = tuple(example.group for example in test)
    body = EvaluationBody(
        n=len(test),
        groups=len(set(groups)),
        effective_groups=rounded(effective_groups(groups)),
        primary=task.leading,
        metrics=tuple(task.metrics),
        confidence=CONFIDENCE,
        seed=seed,
        candidates=stated,
        probes=stated_probes,
        functions=function_digests(task.scorers, root),
        scorers=scorer_digests(task.scorers, answer_schema, root),
        judges=judges,
        prices=Prices(**costs.prices.model_dump()) if costs.prices else None,
        risks=stated_risks,
        policy=stated_policy,
        style=stated_style,
    )
    blobs = {SCORES: store.put_bytes(encode_scores([*columns, *general]))}
    kept = {MEASUREMENTS: measurements, POLICY: held, STYLE: classified}
    blobs |= {name: store.put_bytes(encode_lines(lines)) for name, lines in kept.items() if lines}
    if labelled:
        blobs[LABELS] = store.put_bytes(encode_labels(labelled))
    parents = {"dataset": dataset}
    parents |= {f"answers:{name}": digest for name, digest in answers.items()}
    parents |= {f"probe:{name}": digest for name, digest in probes.items()}
    for suite, names in risks.items():
        for name, risk in names.items():
            parents[f"risk:{suite}:{name}"] = risk.after
            if risk.before is not None:
                parents[f"before:{suite}:{name}"] = risk.before
    parents |= {f"judged:{metric}:{name}": digest for (name, metric), digest in judged.items()}
    parents |= {**(policy.parents if policy else {}), **({"style": style} if style else {})}
    return store.put_record(body.record(parents, blobs))


def _answered(
    store: Store, dataset: str, answers: Mapping[str, str]
) -> tuple[list[Example], dict[str, Answers], dict[str, dict[str, Answered]]]:
    """The test rows; each candidate's answers record; and its answers as scorers see them, by row id."""
    if not answers:
        raise UsageError("no candidate to evaluate", fix="name at least one candidate")
    rows = load_dataset(store, dataset)
    test = rows.examples("test")
    if not test:
        raise Inconclusive("the dataset has no test rows", where=short(dataset), fix="raise data.split.test")
    if len({example.id for example in test}) != len(test):
        raise Inconclusive("two test rows have the same id", where=short(dataset))
    given = {name: read_answers(store, digest, name, rows, test) for name, digest in sorted(answers.items())}
    for name, those in given.items():
        check_held_out(store, rows, test, name, those.candidate)
    seen = {name: seen_answers(store, rows, those.candidate, those.lines, test) for name, those in given.items()}
    return test, given, seen


def _columns(
    store: Store,
    task: TaskSettings,
    given: Mapping[str, Answers],
    seen: Mapping[str, Mapping[str, Answered]],
    scoring: Mapping[str, Scoring],
    judged: Mapping[tuple[str, str], str],
    test: Sequence[Example],
) -> tuple[list[Column], dict[str, dict[str, JudgeResults]]]:
    """Each candidate's scores by each metric, and the record's account of judges: metric -> candidate -> account."""
    columns: list[Column] = []
    judges: dict[str, dict[str, JudgeResults]] = {}
    for name, those in given.items():
        for metric in task.metrics:
            if metric in scoring:
                columns.append(_scored(name, metric, scoring[metric], seen[name], test))
                continue
            if (name, metric) not in judged:
                raise Inconclusive(f"the judge {metric!r} has no judgements of {name!r}", fix="evaluate again")
            values, stated = read_judged(store, judged[name, metric], metric, those.digest, test)
            judges.setdefault(metric, {})[name] = stated
            columns.append(column(name, metric, {each.id: (each.group, values[each.id]) for each in test}))
    return columns, judges


def _scoring_of_probes(task: TaskSettings, scoring: Mapping[str, Scoring]) -> Scoring:
    """The scorer for answers to risk probes: the primary metric, where it needs only the answer and the reference."""
    if task.leading in scoring and task.leading not in CONTEXT_SCORERS:
        return scoring[task.leading]

    def cannot(_answered: Answered) -> float:
        raise Inconclusive(f"this probe cannot be scored by {task.leading!r}, which needs a judge or retrieved texts")

    return cannot


def _measured(
    store: Store,
    risks: Mapping[str, Mapping[str, Risk]],
    given: Mapping[str, Answers],
    dataset: str,
    scoring: Scoring,
) -> tuple[list[dict[str, Any]], dict[str, dict[str, RiskResults]]]:
    """The risk probes' measurements, and the record's account of them: suite -> candidate -> account."""
    lines: list[dict[str, Any]] = []
    told: dict[str, dict[str, RiskResults]] = {}
    for suite, names in sorted(risks.items()):
        for name, risk in sorted(names.items()):
            if name not in given:
                raise UsageError(f"there are answers of {name!r} to the probe {suite!r}, but {name!r} is not evaluated")
            found, said = measure(store, suite, given[name].candidate, risk, dataset, scoring)
            lines += found
            told.setdefault(suite, {})[name] = said
    return lines, told


def _held_to_policy(
    store: Store, policy: PolicyAnswers | None, given: Mapping[str, Answers], seed: int
) -> tuple[list[dict[str, Any]], PolicyAccount | None]:
    """The outcomes of the policy checks, and the record's account of them."""
    if policy is None:
        return [], None
    if unknown := sorted(policy.answers.keys() - given.keys()):
        raise UsageError(f"there are answers of {unknown[0]!r} to the policy, but {unknown[0]!r} is not evaluated")
    candidates = {name: (those.candidate_digest, those.candidate) for name, those in given.items()}
    return measure_policy(store, policy, candidates, CONFIDENCE, seed)


def _scored(name: str, metric: str, scoring: Scoring, seen: Mapping[str, Answered], test: Sequence[Example]) -> Column:
    cells = {}
    for example in test:
        where = f"test row {example.id}"
        try:
            value = checked(scoring(seen[example.id]), metric, where)
        except UsageError as error:
            raise UsageError(error.what, where=where, fix=error.fix) from error
        cells[example.id] = (example.group, value)
    return column(name, metric, cells)


def _stated(
    store: Store,
    given: Mapping[str, Answers],
    columns: Sequence[Column],
    labelled: Mapping[tuple[str, str], Labelled],
    test: Sequence[Example],
    seed: int,
    costs: Costs,
) -> dict[str, MeasuredCandidate]:
    values = np.stack([item.values for item in columns], axis=1)
    found = intervals(values, columns[0].groups, ends=(0.0, 1.0), confidence=CONFIDENCE, seed=seed)
    metrics: dict[str, dict[str, MetricInterval]] = {name: {} for name in given}
    for item, measured in zip(columns, found, strict=True):
        metrics[item.candidate][item.metric] = metric_interval(measured)
    stated = {}
    for name, answers in given.items():
        labels = {metric: rows for (of, metric), rows in labelled.items() if of == name}
        stated[name] = _stated_candidate(store, answers, metrics[name], labels, test, seed, costs)
    return stated


def _stated_candidate(
    store: Store,
    answers: Answers,
    metrics: Mapping[str, MetricInterval],
    labels: Mapping[str, Labelled],
    test: Sequence[Example],
    seed: int,
    costs: Costs,
) -> MeasuredCandidate:
    lines = list(answers.lines.values())
    prompt, completion = (sum(int(line[key]) for line in lines) for key in ("prompt_tokens", "completion_tokens"))
    candidate, training = answers.candidate, None
    remote, token = candidate.endpoint is not None, costs.tokens.get(candidate.name)
    if candidate.training is not None and costs.prices is not None:
        spent = TrainingBody.read(store, candidate.training).seconds
        training = TrainingCost(seconds=spent, money=rounded(spent / 3600.0 * costs.prices.machine_hour))
    sure = {metric: (rows.confidences, rows.right.tolist()) for metric, rows in labels.items()}
    return MeasuredCandidate(
        candidate=answers.candidate_digest,
        tuned=candidate.tuned,
        system_prompts=count_prompts(candidate, (example.request for example in test)),
        metrics=metrics,
        seconds=answers.seconds,
        prompt_tokens=prompt,
        completion_tokens=completion,
        cut=sum(line["finish"] == "length" for line in lines),
        price=price_of(len(lines), prompt, completion, answers.seconds, costs.prices, token, remote=remote),
        training=training,
        classes={
            metric: classes(rows.given, rows.wanted, rows.groups, CONFIDENCE, seed) for metric, rows in labels.items()
        }
        or None,
        calibration={metric: calibration(given, right) for metric, (given, right) in sure.items() if given} or None,
    )


def _probed(
    store: Store, probes: Mapping[str, str], given: Mapping[str, Answers], seed: int
) -> tuple[list[Column], dict[str, GeneralSuite]]:
    """The general suite's columns (the base first), and the record's account of them."""
    if not probes:
        return [], {}
    tuned = {name for name, answers in given.items() if answers.candidate.tuned}
    if BASE not in probes or not set(probes) - {BASE} <= tuned or BASE in tuned:
        raise UsageError(
            f"the general suite needs answers of {BASE!r} and of tuned candidates, not of {', '.join(sorted(probes))}",
            fix=f"ask the base weights too, and name no tuned candidate {BASE!r}",
        )
    questions = {question.id: question for question in general_questions()}
    names = [BASE, *sorted(set(probes) - {BASE})]
    columns = {name: read_probe(store, probes[name], name, questions, given) for name in names}
    before = columns[BASE]
    scores, drops = {}, {}
    for name, after in columns.items():
        share = interval(after.values, after.groups, ends=(0.0, 1.0), confidence=CONFIDENCE, seed=seed)
        scores[name] = metric_interval(share)
        if name != BASE:
            drops[name] = metric_interval(drop(before, after, confidence=CONFIDENCE, seed=seed))
    stated = GeneralSuite(suite=general_digest(), n=len(questions), scores=scores, drops=drops)
    return list(columns.values()), {GENERAL: stated}
