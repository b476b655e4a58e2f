"""An engine that answers at once, and as told: fixed texts by adapter, gates, crashes and hangs."""

import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from tunesmith.core.errors import Refused
from tunesmith.core.messages import Message
from tunesmith.core.progress import SILENT, Progress
from tunesmith.engines.protocol import Completion, Generation, Question, Scored, Streamed, TokenScore
from tunesmith.models.call_format import CallFormat

VALID = '{"intent": "on"}'


class FakeEngine:
    """Implements engines.protocol.Engine. answer: (request, adapter) -> text; by default VALID.

    gate: while it is cleared every call waits. calls: how many there were; busiest: how many at once at most. broken:
    adapters it refuses.
    """

    def __init__(self, base: str) -> None:
        self.base, self.context_length, self.follows_grammars = base, 64, True
        self.adapters: dict[str, Path] = {}
        self.calls = self.busiest = self._under_way = 0
        self._counting = threading.Lock()
        self.broken: set[str] = set()
        self.answer: Callable[[Generation, str | None], str] = lambda _request, _adapter: VALID
        self.gate = threading.Event()
        self.gate.set()
        self.pieces = 0
        self.seen: list[Generation] = []

    def load_adapter(self, name: str, folder: Path) -> None:
        if name in self.broken:
            raise Refused("the adapter does not fit this base")
        assert (folder / "adapter_model.safetensors").is_file()
        self.adapters[name] = folder

    def holds(self, name: str) -> bool:
        return name in self.adapters

    @property
    def call_format(self) -> CallFormat:
        return CallFormat("<call>", "</call><call>", "</call>", "name", "arguments", exact=True)

    def count_prompt(self, messages: Sequence[Message], _most: int | None = None) -> int:
        return sum(len(message.content.split()) + 1 for message in messages)

    def generate(
        self, requests: Sequence[Generation], adapter: str | None = None, progress: Progress = SILENT
    ) -> list[Completion]:
        raise AssertionError("a server asks for one answer at a time")

    def stream(self, request: Generation, adapter: str | None = None) -> Iterator[Streamed]:
        assert adapter is None or adapter in self.adapters, "an adapter that was never loaded"
        with self._counting:
            self.calls += 1
            self._under_way += 1
            self.busiest = max(self.busiest, self._under_way)
        try:
            completion = self._completion(request, adapter)
            self.seen.append(request)
            for place, word in enumerate(completion.text.split(" ")):
                self.gate.wait()
                self.pieces += 1
                text = f" {word}" if place else word
                yield text if request.top_logprobs is None else Scored(text, (self._score(text, request),))
            yield completion
        finally:
            with self._counting:
                self._under_way -= 1

    def choose(
        self, questions: Sequence[Question], adapter: str | None = None, progress: Progress = SILENT
    ) -> list[list[float]]:
        raise AssertionError("a server does not ask multiple-choice questions")

    def _completion(self, request: Generation, adapter: str | None) -> Completion:
        text = self.answer(request, adapter)
        places = [place for stop in request.stop if (place := text.find(stop)) >= 0]
        text = text[: min(places, default=len(text))]
        words = text.split(" ")[: request.max_tokens]
        asked = request.top_logprobs is not None
        scores = tuple(self._score(f" {word}" if n else word, request) for n, word in enumerate(words)) if asked else ()
        finish = "stop" if len(words) == len(text.split(" ")) else "length"
        ended = {"by_stop_text": bool(places) and finish == "stop", "scores": scores}
        return Completion(" ".join(words), finish, self.count_prompt(request.messages), len(words), **ended)  # type: ignore[arg-type]

    def _score(self, text: str, request: Generation) -> TokenScore:
        top = tuple(TokenScore(other, other.encode(), -1.0) for other in "abc"[: request.top_logprobs or 0])
        return TokenScore(text, text.encode(), -0.5, top)
