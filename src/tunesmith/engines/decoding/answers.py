"""A request's prompt, the choice of an answer's next token, an answer in progress, and multiple choices as rows."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from queue import SimpleQueue
from typing import Protocol

import torch
from torch import Tensor

from tunesmith.core.errors import UsageError
from tunesmith.engines.decoding.constraint import Guide
from tunesmith.engines.protocol import Completion, Generation, Question, Scored, Streamed, TokenScore
from tunesmith.models.rendering import Rendered, Renderer

_COLDEST = 1e-6  # a lower temperature would still draw nothing but the likeliest token


@dataclass(frozen=True, slots=True)
class Sampling:
    """How a row's next token is chosen. temperature 0: the likeliest."""

    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0


@dataclass(frozen=True, slots=True)
class Score:
    """A token's log-probability under the model, and the likeliest tokens with theirs, in descending order."""

    logprob: float
    top: tuple[tuple[int, float], ...]


class Listener(Protocol):
    """Receives a row's tokens. Called by the thread that decodes."""

    def take(self, token: int, score: Score | None) -> bool:
        """Receive the next token; returns whether the row ends with it. score: if the row wants log-probabilities."""
        ...

    def end(self, *, stopped: bool, error: BaseException | None = None) -> None:
        """Learn that no more tokens follow. stopped: an end token ended the row."""


def score_of(logprobs: Tensor, token: int, top: int) -> Score:
    """The score of a token among logprobs [vocabulary], with the top likeliest tokens."""
    values, tokens = logprobs.topk(min(top, logprobs.numel()))
    return Score(float(logprobs[token]), tuple(zip(tokens.tolist(), values.tolist(), strict=True)))


def sample(scores: Tensor, sampling: Sampling, generator: torch.Generator) -> int:
    """A token drawn by its logits from the smallest set of probability top_p (Holtzman et al. 2019), never empty."""
    # Subtract the maximum first: divided by a temperature near zero, other logits could become infinite.
    probabilities = torch.softmax((scores - scores.max()) / max(sampling.temperature, _COLDEST), -1)
    if sampling.top_p >= 1.0:
        return int(torch.multinomial(probabilities, 1, generator=generator))
    probabilities, tokens = probabilities.sort(descending=True)
    before = probabilities.cumsum(-1) - probabilities
    probabilities[1:][before[1:] >= sampling.top_p] = 0.0  # the first stays: top_p may be 0 in 32 bits
    return int(tokens[torch.multinomial(probabilities, 1, generator=generator)])


@dataclass(eq=False, slots=True, kw_only=True)
class DecodedRow:
    """One answer to decode.

    ids: the prompt. limit: most tokens of the answer. guide: holds it to its schema or grammar. top: how many of the
    likeliest tokens to score at each step; None: no log-probabilities. given: the tokens so far.
    """

    ids: Sequence[int]
    limit: int
    sampling: Sampling
    listener: Listener
    guide: Guide | None = None
    top: int | None = None
    given: list[int] = field(default_factory=list)
    generator: torch.Generator | None = None

    def choose(self, logits: Tensor) -> int:
        """The next token by its logits [vocabulary], those of disallowed tokens being minus infinity."""
        if self.sampling.temperature <= 0:
            return int(logits.argmax())
        if self.generator is None:
            self.generator = torch.Generator().manual_seed(self.sampling.seed)
        return sample(logits.float(), self.sampling, self.generator)

    def append(self, token: int, logprobs: Tensor | None, stop_ids: Collection[int]) -> bool:
        """Add a token and tell the listener; returns whether the row ends with it. logprobs: [vocabulary], if it wants
        scores. Raises UsageError where the schema turns out too complex."""
        self.given.append(token)
        if token in stop_ids:
            if self.guide is not None:
                self.guide.check()
            return True
        if self.guide is not None:
            self.guide.follow(token)
        score = None if logprobs is None else score_of(logprobs, token, self.top or 0)
        return self.listener.take(token, score) or len(self.given) >= self.limit


def prompt_ids(renderer: Renderer, request: Generation, context_length: int) -> list[int]:
    """The token ids of a request's prompt. Raises UsageError if they leave no room for an answer."""
    least = renderer.least_tokens(request.messages)
    prompt = renderer.prompt(request.messages) if least < context_length else []
    if (tokens := max(least, len(prompt))) >= context_length:
        raise UsageError(
            f"the prompt has {tokens} tokens or more and leaves no room for an answer: the model's context length is "
            f"{context_length}",
            where="messages",
            fix="shorten the request, or give fewer shots or retrieved examples",
        )
    return prompt


def choice_rows(renderer: Renderer, questions: Sequence[Question]) -> list[Rendered]:
    """A row for each choice of each question, in order, whose labels are the choice's tokens."""
    return [row for question in questions for row in renderer.answered_each(question.messages, question.choices)]


class Answer:
    """One answer in progress: its text so far, and what ends it. Implements engines.sampling.Listener.

    The decoding thread calls take and end. The requesting thread waits on events, which receives the pieces of a stream
    and None at the end; then it calls raise_error and completion.
    """

    def __init__(
        self,
        renderer: Renderer,
        request: Generation,
        token_score: Callable[[int, Score], TokenScore],
        events: SimpleQueue[Streamed | None],
        *,
        streams: bool,
    ) -> None:
        self._renderer, self._token_score, self._events = renderer, token_score, events
        self._stops = [_StopText(stop) for stop in request.stop]
        self._streams, self._scored = streams, request.top_logprobs is not None
        self.prompt_tokens = 0
        self._read = renderer.reader()
        self._ids: list[int] = []
        self._text = ""
        self._scores: list[TokenScore] = []
        self._starts: list[int] = []  # place in the text where each score's token begins
        self._cut: int | None = None  # place in the text where a stop text begins
        self._sent, self._sent_scores = 0, 0
        self._stopped = False
        self._error: BaseException | None = None

    def take(self, token: int, score: Score | None) -> bool:
        """Add the next token; returns whether a stop text ends the answer."""
        start, piece = len(self._text), self._read(token)
        self._ids.append(token)
        self._text += piece
        if score is not None:
            self._starts.append(start)
            self._scores.append(self._token_score(token, score))
        self._cut = min((place for stop in self._stops if (place := stop.find(piece)) is not None), default=None)
        if self._streams:
            self._send(self._settled())
        return self._cut is not None

    def end(self, *, stopped: bool, error: BaseException | None = None) -> None:
        """End the answer: no more tokens follow."""
        self._stopped, self._error = stopped or self._cut is not None, error
        if self._cut is None:  # an incomplete character may be at the end
            self._text = self._renderer.text(self._ids)
        if self._streams and error is None:
            self._send(len(self._text) if self._cut is None else self._cut)
        self._events.put(None)

    def raise_error(self) -> None:
        """Raise the error that ended the answer, if there is one."""
        if self._error is not None:
            raise self._error

    def completion(self) -> Completion:
        """The whole answer."""
        end = len(self._text) if self._cut is None else self._cut
        scores = [score for score, start in zip(self._scores, self._starts, strict=True) if start < max(end, 1)]
        return Completion(
            self._text[:end],
            "stop" if self._stopped else "length",
            self.prompt_tokens,
            len(self._ids),
            by_stop_text=self._cut is not None,
            scores=tuple(scores),
        )

    def _settled(self) -> int:
        """Length of the text that no later token can change."""
        if self._cut is not None:
            return self._cut
        return len(self._text) - max((stop.matched for stop in self._stops), default=0)

    def _send(self, end: int) -> None:
        begun = bisect_left(self._starts, end, self._sent_scores) - self._sent_scores
        scores = tuple(self._scores[self._sent_scores : self._sent_scores + begun])
        text = self._text[self._sent : end]
        self._sent, self._sent_scores = max(self._sent, end), self._sent_scores + begun
        if text or scores:
            self._events.put(Scored(text, scores) if self._scored else text)


class _StopText:
    """Looks for a stop text in an answer that arrives in pieces, by Knuth, Morris and Pratt (1977).

    Each letter costs the same on average, whatever the stop text: matched, the length of the longest beginning of it
    in which the text so far ends, only grows by one a letter.
    """

    def __init__(self, stop: str) -> None:
        self._stop, self._read, self.matched = stop, 0, 0
        # Where a letter does not fit after `n` that did, the next shorter beginning to try has the length fallback[n].
        self._fallback = [0, 0]
        for letter in stop[1:]:
            self._fallback.append(self._after(self._fallback[-1], letter))

    def find(self, piece: str) -> int | None:
        """Read the next piece; the place in the whole text where the stop text begins, once it has come."""
        for letter in piece:
            self.matched = self._after(self.matched, letter)
            self._read += 1
            if self.matched == len(self._stop):
                return self._read - self.matched
        return None

    def _after(self, matched: int, letter: str) -> int:
        while matched and self._stop[matched] != letter:
            matched = self._fallback[matched]
        return matched + (self._stop[matched] == letter)
