"""The floor: answers without a language model, which one has to beat to be worth its price."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from tunesmith.candidates.retrieval import Index, example_index, request_text
from tunesmith.core.errors import UsageError
from tunesmith.core.messages import Message
from tunesmith.core.progress import SILENT, Progress
from tunesmith.data.dataset import Example
from tunesmith.engines.protocol import Completion, Generation

# More distinct answers than this, or fewer than two examples of the usual one, is no classification.
MOST_ANSWERS = 200
_UNBOUNDED = 1 << 30
_TOKENS = r"(?u)\b\w+\b"  # scikit-learn's own leaves out words of one letter


@dataclass(frozen=True, slots=True)
class Confident(Completion):
    """A completion with the probability (0 to 1) that its maker gave it."""

    confidence: float = 0.0


class Baseline(ABC):
    """Answers requests from the training examples. Costs no tokens."""

    context_length = _UNBOUNDED

    def generate(
        self, requests: Sequence[Generation], adapter: str | None = None, progress: Progress = SILENT
    ) -> list[Completion]:
        """Answers in the order of requests."""
        del adapter, progress
        if any(request.top_logprobs is not None for request in requests):
            raise UsageError("this answer has no log-probabilities: no language model gave it", where="logprobs")
        return self._answers([last_request(request.messages) for request in requests])

    def stream(self, request: Generation, adapter: str | None = None) -> Iterator[str | Completion]:
        """The whole answer in one piece."""
        (completion,) = self.generate([request], adapter)
        yield completion.text
        yield completion

    @abstractmethod
    def _answers(self, texts: Sequence[str]) -> list[Completion]: ...


class Nearest(Baseline):
    """The answer of the training example whose request BM25 finds most like."""

    def __init__(self, examples: Sequence[Example]) -> None:
        self._answer = [example.answer for example in examples]
        self._index: Index = example_index(examples)

    def _answers(self, texts: Sequence[str]) -> list[Completion]:
        return [Completion(self._answer[self._index.nearest(text, 1)[0]], "stop", 0, 0) for text in texts]


class Classifier(Baseline):
    """TF-IDF of words and pairs of words, and logistic regression over the distinct answers, by scikit-learn."""

    def __init__(self, examples: Sequence[Example]) -> None:
        counted = Counter(example.answer for example in examples)
        if not 2 <= len(counted) <= MOST_ANSWERS or len(examples) < 2 * len(counted):
            raise UsageError(
                f"{len(examples)} training rows with {len(counted)} distinct answers are no classification "
                f"(2 to {MOST_ANSWERS} answers, two rows of each on average)",
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
        self._model.fit([request_text(example) for example in examples], [example.answer for example in examples])

    def _answers(self, texts: Sequence[str]) -> list[Completion]:
        given: list[Completion] = []
        for row in self._model.predict_proba(list(texts)):
            place = int(row.argmax())
            given.append(Confident(str(self._model.classes_[place]), "stop", 0, 0, round(float(row[place]), 6)))
        return given


def make_baseline(method: str, examples: Sequence[Example]) -> Baseline:
    """The floor of that method, made from training examples. The same examples give the same answers."""
    return Nearest(examples) if method == "nearest" else Classifier(examples)


def last_request(messages: Sequence[Message]) -> str:
    """What the user asked last. Raises UsageError where no user asked anything."""
    for message in reversed(messages):
        if message.role == "user":
            return message.content
    raise UsageError("there is no user message to answer", where="messages")
