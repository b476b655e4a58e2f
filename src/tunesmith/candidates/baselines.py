"""Baselines that answer without a language model: nearest neighbour and classifier. A model must beat them."""

from __future__ import annotations

import re
from abc import abstractmethod
from collections import Counter
from collections.abc import Sequence
from typing import Any

from tunesmith.candidates.retrieval import Index, example_index, last_request
from tunesmith.core.errors import UsageError
from tunesmith.core.progress import SILENT, Progress
from tunesmith.data.dataset import Example
from tunesmith.engines.protocol import UNBOUNDED, Completion, Generation, Responder

# With more distinct answers, or fewer than two examples per answer, the task is not a classification.
MOST_ANSWERS = 200
_TOKENS = r"(?u)\b\w+\b"  # scikit-learn's default drops words of one letter


class Baseline(Responder):
    """Answers requests from the training examples. Uses no tokens."""

    context_length = UNBOUNDED

    def generate(
        self, requests: Sequence[Generation], adapter: str | None = None, progress: Progress = SILENT
    ) -> list[Completion]:
        """Answers in the order of requests."""
        del adapter, progress
        if any(request.top_logprobs is not None for request in requests):
            raise UsageError("a baseline has no log-probabilities", where="logprobs")
        return self._answers([last_request(request.messages) for request in requests])

    @abstractmethod
    def _answers(self, texts: Sequence[str]) -> list[Completion]: ...


class Nearest(Baseline):
    """Gives the answer of the training example with the most similar request, by BM25."""

    def __init__(self, examples: Sequence[Example]) -> None:
        self._answer = [example.answer for example in examples]
        self._index: Index = example_index(examples)

    def _answers(self, texts: Sequence[str]) -> list[Completion]:
        return [Completion(self._answer[self._index.nearest(text, 1)[0]], "stop", 0, 0) for text in texts]


class Classifier(Baseline):
    """TF-IDF of words and word pairs, with logistic regression over the distinct answers, by scikit-learn."""

    def __init__(self, examples: Sequence[Example]) -> None:
        counted = Counter(example.answer for example in examples)
        if not 2 <= len(counted) <= MOST_ANSWERS or len(examples) < 2 * len(counted):
            raise UsageError(
                f"{len(examples)} training rows with {len(counted)} distinct answers are not a classification task "
                f"(it needs 2 to {MOST_ANSWERS} answers, with two rows each on average)",
                where="method: classifier",
                fix="use method: nearest",
            )
        try:
            from sklearn.feature_extraction.text import TfidfVectorizer
            from sklearn.linear_model import LogisticRegression
            from sklearn.pipeline import make_pipeline
        except ImportError as error:
            raise UsageError(
                "the classifier needs scikit-learn",
                where="method: classifier",
                fix="pip install 'tunesmith[classifier]'",
            ) from error
        vectors = TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True, token_pattern=_TOKENS)
        self._model: Any = make_pipeline(vectors, LogisticRegression(C=10.0, max_iter=1000))
        asked = [last_request(example.messages) for example in examples]
        if not any(re.search(_TOKENS, text) for text in asked):
            raise UsageError(
                "the training rows' requests have no words, which the classifier compares",
                where="method: classifier",
                fix="use method: nearest",
            )
        self._model.fit(asked, [example.answer for example in examples])

    def _answers(self, texts: Sequence[str]) -> list[Completion]:
        given: list[Completion] = []
        for row in self._model.predict_proba(list(texts)):
            answer = str(self._model.classes_[int(row.argmax())])
            given.append(Completion(answer, "stop", 0, 0, confidence=round(float(row.max()), 6)))
        return given


def make_baseline(method: str, examples: Sequence[Example]) -> Baseline:
    """The baseline of a method, built from training examples. The same examples give the same answers."""
    return Nearest(examples) if method == "nearest" else Classifier(examples)
