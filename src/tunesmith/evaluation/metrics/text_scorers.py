"""Scorers of running text, by the libraries that papers report: rouge-score and sacrebleu. One answer, 0 to 1."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cache
from typing import Any

from tunesmith.core.errors import UsageError

_EXTRA = "pip install 'tunesmith[text]'"


def _rouge(kind: str) -> Callable[[str, str, Any], float]:
    def scored(answer: str, reference: str, _schema: Any) -> float:
        return float(_rouge_scorer(kind).score(reference, answer)[kind].fmeasure)

    scored.__doc__ = f"F-measure of {kind} with Porter stemming (Lin 2004), as rouge-score computes it."
    return scored


def chrf(answer: str, reference: str, _schema: Any) -> float:
    """Character n-gram F-score (Popovic 2015) of the sentence, as sacrebleu computes it, over 100."""
    return _share(_sacrebleu("CHRF").sentence_score(answer, [reference]).score)


def bleu(answer: str, reference: str, _schema: Any) -> float:
    """BLEU (Papineni et al. 2002) of the sentence with effective order, as sacrebleu computes it, over 100.

    A mean of sentences, so that each example has its score; it is not the corpus BLEU.
    """
    return _share(_sacrebleu("BLEU", effective_order=True).sentence_score(answer, [reference]).score)


TEXT_SCORERS: Mapping[str, Callable[[str, str, Any], float]] = {
    "rouge1": _rouge("rouge1"),
    "rouge2": _rouge("rouge2"),
    "rougeL": _rouge("rougeL"),
    "chrf": chrf,
    "bleu": bleu,
}


def _share(hundredths: float) -> float:
    # A perfect sentence comes out at 100.00000000000004.
    return min(max(hundredths / 100.0, 0.0), 1.0)


@cache
def _rouge_scorer(kind: str) -> Any:
    try:
        from rouge_score.rouge_scorer import RougeScorer
    except ImportError as error:
        raise UsageError(f"{kind} needs rouge-score", where="task.scorers", fix=_EXTRA) from error
    return RougeScorer([kind], use_stemmer=True)


@cache
def _sacrebleu(kind: str, **options: Any) -> Any:
    from sacrebleu import metrics

    return getattr(metrics, kind)(**options)
