"""Rows that a person should look at, with the reason. None is dropped for it: a flag is a question, not a verdict."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Sequence
from statistics import median
from typing import Any

from tunesmith.core.digests import canonical
from tunesmith.core.errors import UsageError
from tunesmith.data.dataset import SPLITS, Dataset, Example
from tunesmith.data.duplicates import answer_key, request_text
from tunesmith.store.records import Record
from tunesmith.store.store import Store

FLAGS = "flags.jsonl"
REFUSING = "refusing answer"
LONG = "answer much longer than the others"
LONG_REQUEST = "request much longer than the others"
NOISE = "label that the other rows speak against"

_REFUSAL = re.compile(
    r"^\W*(?:i['’]?m sorry|i am sorry|sorry,? but|i apologi[sz]e|unfortunately,? i|as an ai\b"
    r"|i(?:['’]m| am) (?:unable|not able)"
    r"|i (?:cannot|can['’]?t|can not|won['’]?t|do not|don['’]t) (?:help|assist|do that|provide|answer|comply|fulfil))",
    re.IGNORECASE,
)
_TIMES = 10  # that many times the median is much longer
_LEAST_LONG = 200  # characters: a short text is not long beside a shorter one
_ROWS_A_LABEL = 5  # as many folds as the cross-validation has
_MOST_LABELS = 1000
_FOLDS = 5


def examine_quality(store: Store, dataset: Dataset, *, label_noise: bool = False) -> str:
    """Flag a dataset version's rows; returns the digest of a record of kind "quality" with the dataset as its parent.

    label_noise: also look for wrong labels, where the task is classification: confident learning (Northcutt, Jiang,
    Chuang, JAIR 70, 2021) by cleanlab, on out-of-fold probabilities of a linear model of the requests' words.
    Raises UsageError where the extra `quality` is not installed or the answers are no labels.
    """
    rows = [(name, example) for name in SPLITS for example in dataset.examples(name)]
    flags = [*_plain_flags(rows), *(_noisy(rows) if label_noise else ())]
    flags.sort(key=lambda flag: (flag["flag"], flag["id"]))
    body = {
        "rows": len(rows),
        "flags": dict(sorted(Counter(flag["flag"] for flag in flags).items())),
        "looked_for": sorted([REFUSING, LONG, LONG_REQUEST, *([NOISE] if label_noise else ())]),
        "balance": {
            name: dict(sorted(Counter(str(getattr(one, name) or "") for _, one in rows).items()))
            for name in ("licence", "source", "tenant", "region")
        },
    }
    blob = store.put_bytes(b"".join(canonical(flag) + b"\n" for flag in flags))
    return store.put_record(Record(kind="quality", parents={"dataset": dataset.digest}, blobs={FLAGS: blob}, body=body))


def _plain_flags(rows: Sequence[tuple[str, Example]]) -> Iterator[dict[str, Any]]:
    answers = [len(example.answer) for _, example in rows]
    requests = [len(request_text(example.messages)) for _, example in rows]
    longest = [max(_LEAST_LONG, _TIMES * median(lengths)) for lengths in (answers, requests)]
    for (split, example), answer, request in zip(rows, answers, requests, strict=True):
        if _REFUSAL.match(example.answer):
            yield _flag(split, example, REFUSING, example.answer[:80])
        if answer > longest[0]:
            yield _flag(split, example, LONG, f"{answer} characters")
        if request > longest[1]:
            yield _flag(split, example, LONG_REQUEST, f"{request} characters")


def _flag(split: str, example: Example, flag: str, detail: str) -> dict[str, Any]:
    return {"id": example.id, "split": split, "flag": flag, "detail": detail}


def _noisy(rows: Sequence[tuple[str, Example]]) -> Iterator[dict[str, Any]]:
    try:
        from cleanlab.filter import find_label_issues
        from sklearn.feature_extraction.text import TfidfVectorizer
        from sklearn.linear_model import LogisticRegression
        from sklearn.model_selection import StratifiedKFold, cross_val_predict
        from sklearn.pipeline import make_pipeline
    except ImportError as error:
        raise UsageError(
            f"looking for wrong labels needs {error.name}", fix='pip install "tunesmith[quality]"'
        ) from error
    keys = [answer_key(example.answer) for _, example in rows]
    many = Counter(keys)
    # A label of fewer rows than folds cannot be told by the others.
    judged = [place for place, key in enumerate(keys) if many[key] >= _ROWS_A_LABEL]
    names = sorted({keys[place] for place in judged})
    if not 2 <= len(names) <= _MOST_LABELS or len(judged) < len(rows) / 2:
        raise UsageError(
            f"the answers are not labels: {len(many)} different ones in {len(rows)} rows",
            fix="look for wrong labels only where the task is classification",
        )
    number = {name: place for place, name in enumerate(names)}
    labels = [number[keys[place]] for place in judged]
    texts = [request_text(rows[place][1].messages) for place in judged]
    model = make_pipeline(
        TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True), LogisticRegression(C=10, max_iter=300)
    )
    folds = StratifiedKFold(_FOLDS, shuffle=True, random_state=0)
    chances = cross_val_predict(model, texts, labels, cv=folds, method="predict_proba")
    issues = find_label_issues(labels, chances, return_indices_ranked_by="self_confidence", n_jobs=1)
    for place in issues.tolist():
        split, example = rows[judged[place]]
        likely = names[int(chances[place].argmax())]
        yield _flag(split, example, NOISE, f"{keys[judged[place]][:60]}, perhaps {likely[:60]}")
