"""The native engine on a tiny random model, in the place of the fabricated base whose adapters a scene releases."""

import threading
from collections.abc import Iterator
from pathlib import Path

from tests.hf_models import base_of_family
from tests.tiny import TEMPLATE
from tunesmith.engines.native.engine import NativeEngine
from tunesmith.engines.protocol import Generation, Streamed
from tunesmith.models.call_format import CallFormat


class TinyEngine:
    """Implements what a server needs of engines.protocol.Engine. base: the digest it says it runs."""

    follows_grammars = True

    def __init__(self, base: str, folder: Path, template: str = TEMPLATE) -> None:
        self.native = NativeEngine(base_of_family(folder, "llama", template=template))
        self.base, self.context_length = base, self.native.context_length
        self.count_prompt, self.gate = self.native._renderer.count_prompt, threading.Event()
        self._loaded: set[str] = set()

    @property
    def call_format(self) -> CallFormat:
        return self.native._renderer.call_format

    def load_adapter(self, name: str, _folder: Path) -> None:
        self._loaded.add(name)

    def holds(self, name: str) -> bool:
        return name in self._loaded

    def stream(self, request: Generation, _adapter: str | None = None) -> Iterator[Streamed]:
        return self.native.stream(request)
