"""From candidates' answers to an evaluation record: every answer scored, means with intervals, price, probes."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from tunesmith.core.digests import short
from tunesmith.core.errors import Inconclusive, UsageError
from tunesmith.data.dataset import Example, load_dataset
from tunesmith.evaluation.answers import BASE, Answers, check_held_out, read_answers, read_probe
from tunesmith.evaluation.general import general_digest, general_questions
from tunesmith.evaluation.probes.items import MEASUREMENTS, encode_measurements
from tunesmith.evaluation.probes.measuring import Risk, measure
from tunesmith.evaluation.probes.suites import Marking
from tunesmith.evaluation.scorers import score
from tunesmith.evaluation.scores import GENERAL, SCORES, Column, as_body, column, drop, encode_scores, rounded
from tunesmith.evaluation.settings import TaskSettings
from tunesmith.evaluation.statistics import effective_groups, interval, intervals
from tunesmith.store.records import Record
from tunesmith.store.store import Store

# The confidence of every interval that is shown; a gate may ask for another.
CONFIDENCE = 0.95


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
) -> str:
    """Score answers and keep an evaluation record; returns its digest. The same arguments give the same digest.

    dataset: digest of the dataset version whose test rows were answered. answers: candidate name -> digest of its
    answers record. probes: "base" and tuned candidates' names -> digest of their answers to the general suite (may be
    empty; a forgetting gate is then inconclusive). seed: of the resampling. risks: suite -> candidate name -> answers
    to the risk probes; a probe's gate without them is inconclusive.
    Raises Inconclusive for answers that do not fit the rows, Refused where test rows were learned from, UsageError for
    names that do not fit.
    """
    if not answers:
        raise UsageError("there is nothing to evaluate", fix="name at least one candidate")
    rows = load_dataset(store, dataset)
    test = rows.examples("test")
    if not test:
        raise Inconclusive("the dataset has no test rows", where=short(dataset), fix="raise data.split.test")
    if len({example.id for example in test}) != len(test):
        raise Inconclusive("the test rows are not told apart by their ids", where=short(dataset))
    given = {name: read_answers(store, digest, name, rows, test) for name, digest in sorted(answers.items())}
    for name, those in given.items():
        check_held_out(store, rows, test, name, those.candidate)
    columns = [
        _scored(name, metric, those, test, answer_schema) for name, those in given.items() for metric in task.scorers
    ]
    general, stated_probes = _probed(store, probes, given, seed)
    marking = Marking(task.leading, answer_schema)
    measurements, stated_risks = _measured(store, risks or {}, given, dataset, marking)
    groups = tuple(example.group for example in test)
    body = {
        "n": len(test),
        "groups": len(set(groups)),
        "effective_groups": rounded(effective_groups(groups)),
        "primary": task.leading,
        "metrics": list(task.scorers),
        "confidence": CONFIDENCE,
        "seed": seed,
        "candidates": _stated(given, columns, seed),
        "probes": stated_probes,
    }
    if stated_risks:
        body["risks"] = stated_risks
    parents = {
        "dataset": dataset,
        **{f"answers:{name}": digest for name, digest in answers.items()},
        **{f"probe:{name}": digest for name, digest in probes.items()},
        **_risk_parents(risks or {}),
    }
    blobs = {SCORES: store.put_bytes(encode_scores([*columns, *general]))}
    if measurements:
        blobs[MEASUREMENTS] = store.put_bytes(encode_measurements(measurements))
    return store.put_record(Record(kind="evaluation", parents=parents, blobs=blobs, body=body))


def evaluation_document(store: Store, digest: str) -> dict[str, Any]:
    """What `tunesmith evaluate --json` prints."""
    body = store.record(digest, kind="evaluation").body
    candidates = body["candidates"]
    return {
        "evaluation": digest,
        "n": body["n"],
        "groups": body["groups"],
        "primary": body["primary"],
        "confidence": body["confidence"],
        "candidates": {
            name: {metric: stated["metrics"][metric] for metric in body["metrics"]}
            for name, stated in candidates.items()
        },
        "tuned": {name: stated["tuned"] for name, stated in candidates.items()},
        "prices": {name: dict(stated["price"]) for name, stated in candidates.items()},
        "cut": {name: stated["cut"] for name, stated in candidates.items()},
        "probes": body["probes"],
        "risks": body.get("risks", {}),
    }


def _measured(
    store: Store,
    risks: Mapping[str, Mapping[str, Risk]],
    given: Mapping[str, Answers],
    dataset: str,
    marking: Marking,
) -> tuple[list[dict[str, Any]], dict[str, dict[str, Any]]]:
    """The risk probes' measurements, and what the record says of them by suite and candidate."""
    lines: list[dict[str, Any]] = []
    told: dict[str, dict[str, Any]] = {}
    for suite, names in sorted(risks.items()):
        for name, risk in sorted(names.items()):
            if name not in given:
                raise UsageError(f"the probe {suite!r} is of {name!r}, which is not evaluated")
            found, said = measure(store, suite, given[name].candidate, risk, dataset, marking)
            lines += found
            told.setdefault(suite, {})[name] = said
    return lines, told


def _risk_parents(risks: Mapping[str, Mapping[str, Risk]]) -> dict[str, str]:
    found = {}
    for suite, names in risks.items():
        for name, risk in names.items():
            found[f"risk:{suite}:{name}"] = risk.after
            if risk.before is not None:
                found[f"before:{suite}:{name}"] = risk.before
    return found


def _scored(name: str, metric: str, answers: Answers, test: Sequence[Example], schema: dict[str, Any] | None) -> Column:
    cells = {}
    for example in test:
        try:
            value = score(metric, answers.lines[example.id]["text"], example.answer, schema)
        except UsageError as error:
            raise UsageError(error.what, where=f"test row {example.id}", fix=error.fix) from error
        if not math.isfinite(value) or not 0.0 <= value <= 1.0:
            raise Inconclusive(f"the scorer {metric!r} gave {value!r}, not 0 to 1", where=f"test row {example.id}")
        cells[example.id] = (example.group, value)
    return column(name, metric, cells)


def _stated(given: Mapping[str, Answers], columns: Sequence[Column], seed: int) -> dict[str, Any]:
    values = np.stack([item.values for item in columns], axis=1)
    found = intervals(values, columns[0].groups, ends=(0.0, 1.0), confidence=CONFIDENCE, seed=seed)
    metrics: dict[str, dict[str, Any]] = {name: {} for name in given}
    for item, measured in zip(columns, found, strict=True):
        metrics[item.candidate][item.metric] = as_body(measured)
    return {name: _stated_candidate(answers, metrics[name]) for name, answers in given.items()}


def _stated_candidate(answers: Answers, metrics: Mapping[str, Any]) -> dict[str, Any]:
    lines = list(answers.lines.values())
    prompt, completion = (sum(int(line[key]) for line in lines) for key in ("prompt_tokens", "completion_tokens"))
    per_1000 = 1000.0 / len(lines)
    return {
        "candidate": answers.candidate_digest,
        "tuned": answers.candidate.tuned,
        "metrics": dict(metrics),
        "seconds": answers.seconds,
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "cut": sum(line["finish"] == "length" for line in lines),
        "price": {
            "prompt_tokens_per_1000": rounded(prompt * per_1000),
            "completion_tokens_per_1000": rounded(completion * per_1000),
            "seconds_per_1000": rounded(answers.seconds * per_1000),
        },
    }


def _probed(
    store: Store, probes: Mapping[str, str], given: Mapping[str, Answers], seed: int
) -> tuple[list[Column], dict[str, Any]]:
    """The general suite's columns (the base first), and what the record states of them."""
    if not probes:
        return [], {}
    tuned = {name for name, answers in given.items() if answers.candidate.tuned}
    if BASE not in probes or not set(probes) - {BASE} <= tuned or BASE in tuned:
        raise UsageError(
            f"probes are named {BASE!r} and after tuned candidates, not {', '.join(sorted(probes))}",
            fix=f"probe the base weights too, and call no tuned candidate {BASE!r}",
        )
    questions = {question.id: question for question in general_questions()}
    names = [BASE, *sorted(set(probes) - {BASE})]
    columns = {name: read_probe(store, probes[name], name, questions, given) for name in names}
    before = columns[BASE]
    scores, drops = {}, {}
    for name, after in columns.items():
        scores[name] = as_body(interval(after.values, after.groups, ends=(0.0, 1.0), confidence=CONFIDENCE, seed=seed))
        if name != BASE:
            drops[name] = as_body(drop(before, after, confidence=CONFIDENCE, seed=seed))
    stated = {"suite": general_digest(), "n": len(questions), "scores": scores, "drops": drops}
    return list(columns.values()), {GENERAL: stated}
