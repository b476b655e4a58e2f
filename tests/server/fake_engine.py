"""An engine that answers at once, and as told: fixed texts by adapter, gates, crashes and hangs."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from tunesmith.core.errors import Refused
from tunesmith.core.messages import Message
from tunesmith.core.progress import SILENT, Progress
from tunesmith.inference.engine import Completion, Generation, Question

VALID = '{"intent": "on"}'


class FakeEngine:
    """Implements inference.engine.Engine. answer: (request, adapter) -> text; by default VALID.

    gate: while it is cleared every call waits. batches: sizes of the calls of generate. broken: adapters it refuses.
    """

    def __init__(self, base: str) -> None:
        self.base, self.context_length = base, 64
        self.adapters: dict[str, Path] = {}
        self.batches: list[int] = []
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

    def count_tokens(self, messages: Sequence[Message]) -> int:
        return sum(len(message.content.split()) + 1 for message in messages)

    def generate(
        self, requests: Sequence[Generation], adapter: str | None = None, progress: Progress = SILENT
    ) -> list[Completion]:
        assert adapter is None or adapter in self.adapters, "an adapter that was never loaded"
        self.gate.wait()
        self.batches.append(len(requests))
        self.seen += requests
        return [self._completion(request, adapter) for request in requests]

    def stream(self, request: Generation, adapter: str | None = None) -> Iterator[str | Completion]:
        assert adapter is None or adapter in self.adapters, "an adapter that was never loaded"
        completion = self._completion(request, adapter)
        self.seen.append(request)
        for word in completion.text.split(" "):
            self.gate.wait()
            self.pieces += 1
            yield word if word == completion.text.split(" ")[0] else f" {word}"
        yield completion

    def choose(
        self, questions: Sequence[Question], adapter: str | None = None, progress: Progress = SILENT
    ) -> list[list[float]]:
        raise AssertionError("a server does not ask multiple-choice questions")

    def _completion(self, request: Generation, adapter: str | None) -> Completion:
        text = self.answer(request, adapter)
        words = text.split(" ")[: request.max_tokens]
        finish = "stop" if len(words) == len(text.split(" ")) else "length"
        return Completion(" ".join(words), finish, self.count_tokens(request.messages), len(words))  # type: ignore[arg-type]
