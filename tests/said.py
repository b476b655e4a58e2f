"""Progress reports that keep what they are told."""

import contextlib
from collections.abc import Iterator

from tunesmith.core.progress import Silent, Task


class Said(Silent):
    """Keeps what a run says."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def say(self, text: str) -> None:
        self.lines.append(text)


class SaidAndNoted(Said):
    """Keeps what a run says and notes."""

    @contextlib.contextmanager
    def task(self, name: str, total: float) -> Iterator[Task]:
        with super().task(name, total) as task:
            task.note = self.lines.append  # type: ignore[method-assign]
            yield task
