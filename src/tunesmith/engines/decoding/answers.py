"""A request's prompt, the choice of an answer's next token, an answer in progress, and multiple choices as rows."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from queue import SimpleQueue

import torch
from torch import Tensor

from tunesmith.core.errors import UsageError
from tunesmith.engines.decoding.constraint import Guide
from tunesmith.engines.protocol import Completion, Generation, Question, Scored, Streamed, TokenScore
from tunesmith.models.rendering import Rendered, Renderer

_COLDEST = 1e-6  # a lower temperature would still draw nothing but the likeliest token


def sample(scores: Tensor, request: Generation, generator: torch.Generator) -> int:
    """A token drawn by its logits from the smallest set of probability top_p (Holtzman et al. 2019), never empty."""
    # Subtract the maximum first: divided by a temperature near zero, other logits could become infinite.
    probabilities = torch.softmax((scores - scores.max()) / max(request.temperature, _COLDEST), -1)
    if request.top_p >= 1.0:
        return int(torch.multinomial(probabilities, 1, generator=generator))
    probabilities, tokens = probabilities.sort(descending=True)
    before = probabilities.cumsum(-1) - probabilities
    probabilities[1:][before[1:] >= request.top_p] = 0.0  # the first stays: top_p may be 0 in 32 bits
    return int(tokens[torch.multinomial(probabilities, 1, generator=generator)])


@dataclass(eq=False, slots=True, kw_only=True)
class DecodedRow:
    """One answer to decode.

    ids: the prompt. limit: most tokens of the answer. listener: receives its tokens. guide: holds it to its schema or
    grammar. given: the tokens so far.
    """

    request: Generation
    ids: Sequence[int]
    limit: int
    listener: Answer
    guide: Guide | None = None
    given: list[int] = field(default_factory=list)
    generator: torch.Generator | None = None

    def choose(self, logits: Tensor) -> int:
        """The next token by its logits [vocabulary], those of disallowed tokens being minus infinity."""
        if self.request.temperature <= 0:
            return int(logits.argmax())
        if self.generator is None:
            self.generator = torch.Generator().manual_seed(self.request.seed)
        return sample(logits.float(), self.request, self.generator)

    def append(self, token: int, logprobs: Tensor | None, stop_ids: Collection[int]) -> bool:
        """Add a token and tell the listener; returns whether the row ends with it. logprobs: see Answer.take. Raises
        UsageError where the schema turns out too complex."""
        self.given.append(token)
        if token in stop_ids:
            if self.guide is not None:
                self.guide.check()
            return True
        if self.guide is not None:
            self.guide.follow(token)
        return self.listener.take(token, logprobs) or len(self.given) >= self.limit


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
    """One answer in progress: its text so far, and what ends it.

    The decoding thread calls take and end. The requesting thread waits on events, which receives the pieces of a stream
    and None at the end; then it calls completion.
    """

    def __init__(
        self,
        renderer: Renderer,
        request: Generation,
        prompt_tokens: int,
        token_bytes: Callable[[int], bytes],
        events: SimpleQueue[Streamed | None],
        *,
        streams: bool,
    ) -> None:
        self._renderer, self._token_bytes, self._events = renderer, token_bytes, events
        self._stops = [_StopText(stop) for stop in request.stop]
        self._streams, self._top, self._prompt_tokens = streams, request.top_logprobs, prompt_tokens
        self._read = renderer.reader()
        self._ids: list[int] = []
        self._text = ""
        self._scores: list[TokenScore] = []
        self._starts: list[int] = []  # place in the text where each score's token begins
        self._cut: int | None = None  # place in the text where a stop text begins
        self._sent, self._sent_scores = 0, 0
        self._stopped = False
        self._error: BaseException | None = None

    def take(self, token: int, logprobs: Tensor | None) -> bool:
        """Add the next token; returns whether a stop text ends the answer. logprobs: of the model, [vocabulary], if the
        request wants some."""
        start, piece = len(self._text), self._read(token)
        self._ids.append(token)
        self._text += piece
        if logprobs is not None:
            self._starts.append(start)
            values, tokens = logprobs.topk(min(self._top or 0, logprobs.numel()))
            top = tuple(map(self._scored, tokens.tolist(), values.tolist()))
            self._scores.append(self._scored(token, float(logprobs[token]), top))
        self._cut = min((place for stop in self._stops if (place := stop.find(piece)) is not None), default=None)
        if self._streams:
            begun = 0 if self._cut is not None else max((stop.matched for stop in self._stops), default=0)
            self._send(self._length - begun)  # later tokens may complete a stop text
        return self._cut is not None

    def end(self, *, stopped: bool, error: BaseException | None = None) -> None:
        """End the answer: no more tokens follow. stopped: an end token ended it."""
        self._stopped, self._error = stopped or self._cut is not None, error
        if self._cut is None:  # an incomplete character may be at the end
            self._text = self._renderer.text(self._ids)
        if self._streams and error is None:
            self._send(self._length)
        self._events.put(None)

    def raise_error(self) -> None:
        """Raise the error that ended the answer, if there is one."""
        if self._error is not None:
            raise self._error

    def completion(self) -> Completion:
        """The whole answer. Raises the error that ended it, if there is one."""
        self.raise_error()
        end = self._length
        scores = [score for score, start in zip(self._scores, self._starts, strict=True) if start < max(end, 1)]
        return Completion(
            self._text[:end],
            "stop" if self._stopped else "length",
            self._prompt_tokens,
            len(self._ids),
            by_stop_text=self._cut is not None,
            scores=tuple(scores),
        )

    def _scored(self, token: int, logprob: float, top: tuple[TokenScore, ...] = ()) -> TokenScore:
        data = self._token_bytes(token)
        return TokenScore(data.decode(errors="replace"), data, logprob, top)

    @property
    def _length(self) -> int:
        return len(self._text) if self._cut is None else self._cut

    def _send(self, end: int) -> None:
        begun = bisect_left(self._starts, end, self._sent_scores) - self._sent_scores
        scores = tuple(self._scores[self._sent_scores : self._sent_scores + begun])
        text = self._text[self._sent : end]
        self._sent, self._sent_scores = max(self._sent, end), self._sent_scores + begun
        if text or scores:
            self._events.put(text if self._top is None else Scored(text, scores))


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
