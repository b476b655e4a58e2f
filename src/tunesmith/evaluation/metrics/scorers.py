"""Scorers: functions that compare an answer with its reference and return a number from 0 to 1.

Scores of running text are those of the libraries that papers report: rouge-score and sacrebleu.

To add a scorer, write a function and add a line to SCORERS.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Collection, Mapping
from functools import cache
from typing import Any

from tunesmith.core.errors import UsageError
from tunesmith.core.reading.strict_json import NotJson, parse_json, values_in

Schema = Mapping[str, Any] | None
Scorer = Callable[[str, str, Schema], float]
_TEXT_EXTRA = "pip install 'tunesmith[text]'"


def json_valid(answer: str, _reference: str, schema: Schema) -> float:
    """1 where the answer is one JSON value, valid under the schema if there is one."""
    from tunesmith.core.reading.answer_schema import satisfies  # not every command reads it: it loads jsonschema

    try:
        value = parse_json(answer)
    except NotJson:
        return 0.0
    return float(schema is None or satisfies(value, schema))


def exact_match(answer: str, reference: str, _schema: Schema) -> float:
    """1 where answer and reference are the same JSON value, ignoring the order of keys and white space.

    A reference that is not JSON is compared as text, ignoring differences in white space.
    """
    try:
        expected = parse_json(reference)
    except NotJson:
        return float(answer.split() == reference.split())
    try:
        return float(_same(parse_json(answer), expected))
    except NotJson:
        return 0.0


def field_f1(answer: str, reference: str, _schema: Schema) -> float:
    """F1 over the leaf fields of the two JSON values: a field is right where its path and value are equal.

    Positions in an array are part of the path, and an empty object or array is a leaf. So only an
    exact match scores 1. An answer that is not JSON scores 0. Raises UsageError where the reference is not JSON.
    """
    right, given, expected = _fields("field_f1", answer, reference)
    return 2.0 * right / (given + expected)


def field_precision(answer: str, reference: str, _schema: Schema) -> float:
    """Share of the answer's leaf fields that are right; 0 where the answer is not JSON."""
    right, given, _ = _fields("field_precision", answer, reference)
    return right / given if given else 0.0


def field_recall(answer: str, reference: str, _schema: Schema) -> float:
    """Share of the reference's leaf fields that the answer has right; 0 where the answer is not JSON."""
    right, _, expected = _fields("field_recall", answer, reference)
    return right / expected


def _rouge(kind: str) -> Scorer:
    def scored(answer: str, reference: str, _schema: Schema) -> float:
        return float(_rouge_scorer(kind).score(reference, answer)[kind].fmeasure)

    scored.__doc__ = f"F-measure of {kind} with Porter stemming (Lin 2004), as rouge-score computes it."
    return scored


def chrf(answer: str, reference: str, _schema: Schema) -> float:
    """Character n-gram F-score (Popovic 2015) of the sentence, as sacrebleu computes it, over 100."""
    return _share(_sacrebleu("CHRF").sentence_score(answer, [reference]).score)


def bleu(answer: str, reference: str, _schema: Schema) -> float:
    """BLEU (Papineni et al. 2002) of the sentence with effective order, as sacrebleu computes it, over 100.

    A mean of sentences, so that each example has its score; it is not the corpus BLEU.
    """
    return _share(_sacrebleu("BLEU", effective_order=True).sentence_score(answer, [reference]).score)


SCORERS: dict[str, Scorer] = {
    "json_valid": json_valid,
    "exact_match": exact_match,
    "field_precision": field_precision,
    "field_recall": field_recall,
    "field_f1": field_f1,
    "rouge1": _rouge("rouge1"),
    "rouge2": _rouge("rouge2"),
    "rougeL": _rouge("rougeL"),
    "chrf": chrf,
    "bleu": bleu,
}
# Scorers of how much of a sentence is right.
OF_SENTENCES = frozenset({"rouge1", "rouge2", "rougeL", "chrf", "bleu"})
# Scorers that an answer which is not JSON cannot be the reference of.
NEED_JSON = frozenset({"json_valid", "field_precision", "field_recall", "field_f1"})


def nearest(name: str, known: Collection[str]) -> str:
    """`; did you mean 'x'?` with the most similar known name; empty where none is similar."""
    similar = difflib.get_close_matches(name, list(known), n=1)
    return f"; did you mean {similar[0]!r}?" if similar else ""


def _share(hundredths: float) -> float:
    # A perfect sentence comes out at 100.00000000000004.
    return min(max(hundredths / 100.0, 0.0), 1.0)


@cache
def _rouge_scorer(kind: str) -> Any:
    try:
        from rouge_score.rouge_scorer import RougeScorer
    except ImportError as error:
        raise UsageError(f"{kind} needs rouge-score", where="task.scorers", fix=_TEXT_EXTRA) from error
    return RougeScorer([kind], use_stemmer=True)


@cache
def _sacrebleu(kind: str, **options: Any) -> Any:
    from sacrebleu import metrics

    return getattr(metrics, kind)(**options)


def _fields(scorer: str, answer: str, reference: str) -> tuple[int, int, int]:
    """How many leaf fields are right, given and expected. An answer that is not JSON gives none."""
    try:
        expected = _leaves(reference)
    except NotJson as error:
        raise UsageError(
            f"{scorer} needs references that are JSON: {error}", fix="remove it from task.scorers"
        ) from error
    try:
        given = _leaves(answer)
    except NotJson:
        return 0, 0, len(expected)
    wanted = dict(expected)
    return sum(path in wanted and _same(value, wanted[path]) for path, value in given), len(given), len(expected)


def _same(left: Any, right: Any) -> bool:
    """Whether two JSON values are equal: 1 and 1.0 are, true and 1 are not."""
    if isinstance(left, bool) or isinstance(right, bool) or left is None or right is None:
        return left is right
    if isinstance(left, dict) and isinstance(right, dict):
        return left.keys() == right.keys() and all(_same(value, right[key]) for key, value in left.items())
    if isinstance(left, list) and isinstance(right, list):
        return len(left) == len(right) and all(map(_same, left, right))
    return bool(left == right)


def _leaves(text: str) -> list[tuple[tuple[str | int, ...], Any]]:
    """The values of JSON that hold no others, each with the keys and places that lead to it. Raises NotJson."""
    inner = values_in(parse_json(text))
    return [(path, value) for path, value in inner if not value or not isinstance(value, dict | list)]
