"""What the engines that compute in this process have in common."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from functools import cached_property
from queue import SimpleQueue
from typing import Generic, TypeVar

from tunesmith.core.errors import Refused
from tunesmith.core.progress import SILENT, Progress
from tunesmith.engines.answers import Answer, choice_rows
from tunesmith.engines.constraint import Constraints, Guide
from tunesmith.engines.protocol import Generation, Question, Streamed, TokenScore
from tunesmith.engines.sampling import Score
from tunesmith.models.base import Base
from tunesmith.models.rendering import Rendered, Renderer

Loaded = TypeVar("Loaded")


class InProcessEngine(ABC, Generic[Loaded]):
    """Renders requests, holds loaded adapters and scores multiple-choice questions in batches.

    choice_rows, choice_tokens: the most rows, and the most tokens of several rows, in one forward pass of choose().
    """

    choice_rows: int
    choice_tokens: int

    def __init__(self, base: Base) -> None:
        self._base = base
        self._renderer = Renderer(base.folder)
        self._adapters: dict[str, Loaded] = {}  # by the caller's name

    @property
    @abstractmethod
    def _vocabulary(self) -> int:
        """How many logits a step has."""

    @property
    def base(self) -> str:
        """Digest of the base record."""
        return self._base.digest

    @property
    def context_length(self) -> int:
        """Most tokens that a prompt and its answer may have together."""
        return self._base.context_length

    def choose(
        self, questions: Sequence[Question], adapter: str | None = None, progress: Progress = SILENT
    ) -> list[list[float]]:
        """For each question the log-probability of each choice, summed over its tokens (end token included)."""
        rows = choice_rows(self._renderer, questions)
        sums = [0.0] * len(rows)
        with progress.task("scoring choices", len(rows)) as task:
            for chosen in self._choice_batches([len(row.ids) for row in rows]):
                scored = self._log_probabilities([rows[place] for place in chosen], adapter)
                for place, total in zip(chosen, scored, strict=True):
                    sums[place] = total
                task.advance(len(chosen))
        every = iter(sums)
        return [[next(every) for _ in question.choices] for question in questions]

    @abstractmethod
    def _log_probabilities(self, rows: Sequence[Rendered], adapter: str | None) -> list[float]:
        """The summed log-probability of each row's labels."""

    @cached_property
    def _constraints(self) -> Constraints:
        return Constraints(self._renderer.tokenizer, self._vocabulary)

    def _guide(self, request: Generation) -> Guide | None:
        """What holds a request's answer to its schema or grammar; None where any text may be given."""
        free = request.schema is None and request.grammar is None
        return None if free else self._constraints.guide(request)

    def _loaded(self, adapter: str | None) -> Loaded | None:
        """The adapter of this name; None for the base. Raises Refused where it is not loaded."""
        if adapter is None:
            return None
        if adapter not in self._adapters:
            raise Refused(f"adapter {adapter} is not loaded", fix="load it first")
        return self._adapters[adapter]

    def _answer(self, request: Generation, events: SimpleQueue[Streamed | None], *, streams: bool) -> Answer:
        return Answer(self._renderer, request, self._token_score, events, streams=streams)

    def _token_score(self, token: int, score: Score) -> TokenScore:
        """A score with the texts and bytes of its tokens."""

        def spelled(token: int, logprob: float, top: tuple[TokenScore, ...] = ()) -> TokenScore:
            data = self._constraints.token_bytes(token)
            return TokenScore(data.decode(errors="replace"), data, logprob, top)

        return spelled(token, score.logprob, tuple(spelled(*each) for each in score.top))

    def _choice_batches(self, lengths: Sequence[int]) -> Iterator[list[int]]:
        """Indices of rows in batches for one forward pass each, shortest rows first. lengths: of all rows."""
        batch: list[int] = []
        for place in sorted(range(len(lengths)), key=lambda place: lengths[place]):
            full = len(batch) == self.choice_rows or lengths[place] * (len(batch) + 1) > self.choice_tokens
            if batch and full:
                yield batch
                batch = []
            batch.append(place)
        if batch:
            yield batch
