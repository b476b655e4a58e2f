"""A request's prompt, an answer in progress, and multiple choices as rows."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Sequence
from queue import SimpleQueue

from tunesmith.core.errors import UsageError
from tunesmith.engines.decoding.sampling import Score
from tunesmith.engines.protocol import Completion, Generation, Question, Scored, Streamed, TokenScore
from tunesmith.models.rendering import Rendered, Renderer


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
