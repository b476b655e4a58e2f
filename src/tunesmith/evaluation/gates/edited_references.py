"""Test references that were changed after an evaluation of the same requests.

Whoever knows what the candidates answered can change the references to it. Honest corrections look the same, so the
verdict counts them, names the reviewers whom the log knows, and states the score without them.
"""

from __future__ import annotations

import contextlib
from collections import defaultdict

from tunesmith.core.errors import Inconclusive, Refused
from tunesmith.core.text.folding import fold
from tunesmith.data.dataset import Dataset, load_dataset
from tunesmith.data.duplicates import answer_key
from tunesmith.data.governance.withdrawn import content_key
from tunesmith.evaluation.scores import read_scores
from tunesmith.records.evaluation import EvaluationBody
from tunesmith.records.verdict import EditedReferences
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
    reviewers = _reviewers(dataset)
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


def _reviewers(dataset: Dataset) -> dict[str, tuple[str, ...]]:
    """Content key of an edited row -> who edited it, where the audit log knows."""
    by, edits = dataset.body.reviewers, dataset.body.edits
    return {key: by[row] for row, keys in edits.items() if row in by for key in keys}


def _changed(store: Store, dataset: Dataset) -> dict[str, str]:
    """Test rows whose request an earlier evaluation had with other answers only: id -> content key."""
    now = {example.wording: example for example in dataset.examples("test")}
    found: dict[str, str] = {}
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
                    found[now[wording].id] = content_key(now[wording])
    return found
