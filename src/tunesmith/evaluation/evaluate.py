"""Scores all candidates' answers and writes the evaluation record: scores, means with intervals, costs, probes."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np

from tunesmith.candidates.composing import count_prompts
from tunesmith.candidates.settings import TokenPrice
from tunesmith.core.digests import short
from tunesmith.core.errors import Inconclusive, UsageError
from tunesmith.data.dataset import Example, load_dataset
from tunesmith.evaluation.answers import BASE, Answers, before_tuning, check_held_out, read_answers, read_probe
from tunesmith.evaluation.lines import Line, encode_lines
from tunesmith.evaluation.metrics.answer_judge import read_judged
from tunesmith.evaluation.metrics.classification import Labelled, LabelLine, calibration, classes, label_rows
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
from tunesmith.evaluation.policy.outcomes import measure_policy
from tunesmith.evaluation.policy.settings import Policy
from tunesmith.evaluation.prices import price_of
from tunesmith.evaluation.probes.measuring import Measurement, measure
from tunesmith.evaluation.probes.numbers import general_digest, general_questions
from tunesmith.evaluation.scores import CONFIDENCE, GENERAL, Column, column, drop, metric_interval, rounded, score_lines
from tunesmith.evaluation.settings import PriceSettings, TaskSettings
from tunesmith.evaluation.stats.statistics import SHARES, Level, effective_groups, interval, intervals
from tunesmith.evaluation.style.shares import measure_style
from tunesmith.records.evaluation import (
    EvaluationBody,
    GeneralSuite,
    JudgeResults,
    MeasuredCandidate,
    MetricInterval,
    Prices,
    RiskResults,
    TrainingCost,
)
from tunesmith.records.training import TrainingBody
from tunesmith.store.store import Store


def evaluate(
    store: Store,
    parents: Mapping[str, str],
    *,
    task: TaskSettings,
    answer_schema: dict[str, Any] | None,
    seed: int = 0,
    root: Path = Path(),
    prices: PriceSettings | None = None,
    tokens: Mapping[str, TokenPrice] = {},
    policy: Policy | None = None,
) -> str:
    """Score answers and store an evaluation record; returns its digest. The same arguments give the same digest.

    parents: the record's, role -> digest. A gate without its evidence is inconclusive.
        dataset: the dataset version whose test rows were answered.
        answers:NAME, judged:METRIC:NAME: a candidate's answers to them, and a judge's replies about these.
        probe:NAME: answers to the general suite, of tuned candidates, of "base" and of "base of NAME", where the base
            of NAME is not the project's own.
        risk:SUITE:NAME, before:SUITE:NAME: answers to a risk probe, by the candidate's weights and by the base's.
        policy:NAME, policy-judged:CHECK:NAME: answers to the policy's requests, and a judge's replies about these.
        style: the bare base model's answers to the test rows.
    seed: of the resampling.
    root: the project's folder, for the files of function scorers.
    prices, tokens: of this machine, and of the tokens of candidates' endpoints.
    policy: the checks whose requests were answered.

    Raises Inconclusive for answers that do not match the test rows, and UsageError for names that do not match.
    Raises Refused where a candidate was trained on test rows or shows them in its prompt.
    """
    dataset, level = parents["dataset"], Level(CONFIDENCE, seed)
    test, given = _answered(store, dataset, _of(parents, "answers"))
    risks = sorted(_suite_and_name(role, given) for role in _of(parents, "risk"))
    if unknown := sorted(_of(parents, "policy").keys() - given.keys()):
        raise UsageError(f"there are answers of {unknown[0]!r} to the policy, but {unknown[0]!r} is not evaluated")
    scoring = {
        metric_of(scorer): make_scoring(scorer, answer_schema, root)
        for scorer in task.scorers
        if not isinstance(scorer, JudgeScorer)
    }
    columns, judges = _columns(store, task, given, scoring, parents, test)
    general, stated_probes = _probed(store, _of(parents, "probe"), given, level)
    of_probes, measurements = _scoring_of_probes(task, scoring), list[Measurement]()
    stated_risks: dict[str, dict[str, RiskResults]] = {}
    for suite, name in risks:
        after, before = parents[f"risk:{suite}:{name}"], parents.get(f"before:{suite}:{name}")
        lines, told = measure(store, suite, given[name].candidate, after, before, dataset, of_probes)
        measurements += lines
        stated_risks.setdefault(suite, {})[name] = told
    asked = {name: (those.candidate_digest, those.candidate) for name, those in given.items()}
    held, stated_policy = measure_policy(store, policy, parents, asked, level) if policy else ([], None)
    style, texts = parents.get("style"), {name: those.lines for name, those in given.items()}
    classified, stated_style = measure_style(store, style, dataset, test, texts, level)
    labels = {
        (name, scorer.name): label_rows(name, scorer, those.lines, those.seen, test)
        for name, those in given.items()
        for scorer in task.labels
    }
    groups = [example.group for example in test]
    body = EvaluationBody(
        n=len(test),
        groups=len(set(groups)),
        effective_groups=rounded(effective_groups(groups)),
        primary=task.leading,
        metrics=tuple(task.metrics),
        confidence=CONFIDENCE,
        seed=seed,
        candidates=_stated(store, given, columns, labels, test, level, prices, tokens),
        probes=stated_probes,
        functions=function_digests(task.scorers, root),
        scorers=scorer_digests(task.scorers, answer_schema, root),
        judges=judges,
        prices=Prices(**prices.model_dump()) if prices else None,
        risks=stated_risks,
        policy=stated_policy,
        style=stated_style,
    )
    scores, told_labels = score_lines([*columns, *general]), list(chain(*labels.values()))
    kept: list[Sequence[Line]] = [scores, measurements, held, classified, told_labels]
    blobs = {lines[0].file: store.put_bytes(encode_lines(lines)) for lines in kept if lines}
    return store.put_record(body.record(parents, blobs))


def _answered(store: Store, dataset: str, answers: Mapping[str, str]) -> tuple[list[Example], dict[str, Answers]]:
    """The test rows, and each candidate's answers to them."""
    if not answers:
        raise UsageError("no candidate to evaluate", fix="name at least one candidate")
    rows = load_dataset(store, dataset)
    test = rows.examples("test")
    if not test:
        raise Inconclusive("the dataset has no test rows", where=short(dataset), fix="raise data.split.test")
    if len({example.id for example in test}) != len(test):
        raise Inconclusive("two test rows have the same id", where=short(dataset))
    if not all(example.group for example in test):
        raise Inconclusive("a test row has no group", where=short(dataset))
    given = {name: read_answers(store, digest, rows, test) for name, digest in sorted(answers.items())}
    for name, those in given.items():
        if those.candidate.name != name:
            raise UsageError(f"the answers given for {name!r} are those of {those.candidate.name!r}")
        check_held_out(store, rows, test, name, those.candidate)
    return test, given


def _of(parents: Mapping[str, str], kind: str) -> dict[str, str]:
    """The parents whose role is kind:NAME: NAME -> digest."""
    start = f"{kind}:"
    return {role.removeprefix(start): digest for role, digest in parents.items() if role.startswith(start)}


def _suite_and_name(role: str, known: Iterable[str]) -> tuple[str, str]:
    """The two parts of SUITE:NAME. Both may hold colons: the longest known name counts.

    Raises UsageError where it ends with no known name.
    """
    name = max((name for name in known if role.endswith(f":{name}")), key=len, default=None)
    if name is None:
        raise UsageError(f"there are answers to the probe {role!r}, of a candidate that is not evaluated")
    return role.removesuffix(f":{name}"), name


def _columns(
    store: Store,
    task: TaskSettings,
    given: Mapping[str, Answers],
    scoring: Mapping[str, Scoring],
    parents: Mapping[str, str],
    test: Sequence[Example],
) -> tuple[list[Column], dict[str, dict[str, JudgeResults]]]:
    """Each candidate's scores by each metric, and the record's account of judges: metric -> candidate -> account."""
    columns: list[Column] = []
    judges: defaultdict[str, dict[str, JudgeResults]] = defaultdict(dict)
    for name, those in given.items():
        for metric in task.metrics:
            if metric in scoring:
                values = {row.id: _score(scoring[metric], metric, those.seen[row.id], row.id) for row in test}
            elif judged := parents.get(f"judged:{metric}:{name}"):
                values, judges[metric][name] = read_judged(store, judged, metric, those.digest, test)
            else:
                raise Inconclusive(f"the judge {metric!r} has no judgements of {name!r}", fix="evaluate again")
            columns.append(column(name, metric, {row.id: (row.group, values[row.id]) for row in test}))
    return columns, dict(judges)


def _score(scoring: Scoring, metric: str, answered: Answered, row: str) -> float:
    where = f"test row {row}"
    try:
        return checked(scoring(answered), metric, where)
    except UsageError as error:
        raise UsageError(error.what, where=where, fix=error.fix) from error


def _scoring_of_probes(task: TaskSettings, scoring: Mapping[str, Scoring]) -> Scoring:
    """The scorer for answers to risk probes: the primary metric, where it needs only the answer and the reference."""
    if task.leading in scoring and task.leading not in CONTEXT_SCORERS:
        return scoring[task.leading]

    def cannot(_answered: Answered) -> float:
        raise Inconclusive(f"this probe cannot be scored by {task.leading!r}, which needs a judge or retrieved texts")

    return cannot


def _stated(
    store: Store,
    given: Mapping[str, Answers],
    columns: Sequence[Column],
    labels: Mapping[tuple[str, str], Sequence[LabelLine]],
    test: Sequence[Example],
    level: Level,
    prices: PriceSettings | None,
    tokens: Mapping[str, TokenPrice],
) -> dict[str, MeasuredCandidate]:
    values = np.stack([item.values for item in columns], axis=1)
    means = intervals(values, columns[0].groups, SHARES, level)
    metrics: dict[str, dict[str, MetricInterval]] = {name: {} for name in given}
    for item, measured in zip(columns, means, strict=True):
        metrics[item.candidate][item.metric] = metric_interval(measured)
    stated = {}
    for name, answers in given.items():
        lines, candidate = list(answers.lines.values()), answers.candidate
        prompt, completion = (sum(int(line[key]) for line in lines) for key in ("prompt_tokens", "completion_tokens"))
        took = prompt, completion, answers.seconds
        labelled = {metric: Labelled.of(own) for (of, metric), own in labels.items() if of == name}
        training = None
        if candidate.training is not None and prices is not None:
            spent = TrainingBody.read(store, candidate.training).seconds
            training = TrainingCost(seconds=spent, money=rounded(spent / 3600.0 * prices.machine_hour))
        stated[name] = MeasuredCandidate(
            candidate=answers.candidate_digest,
            tuned=candidate.tuned,
            system_prompts=count_prompts(candidate, (example.request for example in test)),
            metrics=metrics[name],
            seconds=answers.seconds,
            prompt_tokens=prompt,
            completion_tokens=completion,
            cut=sum(line["finish"] == "length" for line in lines),
            price=price_of(len(lines), took, prices, tokens.get(name), remote=candidate.endpoint is not None),
            training=training,
            classes={metric: classes(rows, level) for metric, rows in labelled.items()} or None,
            calibration={metric: calibration(rows) for metric, rows in labelled.items() if rows.confidences} or None,
        )
    return stated


def _probed(
    store: Store, probes: Mapping[str, str], given: Mapping[str, Answers], level: Level
) -> tuple[list[Column], dict[str, GeneralSuite]]:
    """The general suite's columns (a base before its candidates), and the record's account of them."""
    if not probes:
        return [], {}
    tuned = sorted(name for name, answers in given.items() if answers.candidate.tuned and name in probes)
    before = {name: before_tuning(name, probes) for name in tuned}
    if {*tuned, *before.values()} != set(probes) or not before.keys().isdisjoint(before.values()):
        raise UsageError(
            f"the general suite needs answers of {BASE!r} and of tuned candidates, not of {', '.join(sorted(probes))}",
            fix=f"ask the base weights too, and name no tuned candidate {BASE!r}",
        )
    questions = {question.id: question for question in general_questions()}
    columns = dict[str, Column]()
    for name in tuned:
        candidate = given[name].candidate
        for title, training in ((before[name], None), (name, candidate.training)):
            columns[title] = read_probe(store, probes[title], title, questions, candidate.base, training)
    shares = {name: interval(each.values, each.groups, SHARES, level) for name, each in columns.items()}
    scores = {name: metric_interval(share) for name, share in shares.items()}
    drops = {name: metric_interval(drop(columns[before[name]], columns[name], level)) for name in tuned}
    stated = GeneralSuite(suite=general_digest(), n=len(questions), scores=scores, drops=drops)
    return list(columns.values()), {GENERAL: stated}
