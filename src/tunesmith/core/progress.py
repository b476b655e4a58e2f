"""How a long step tells of itself. Stages take a Progress; the command line draws it, tests and servers stay silent."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Protocol


class Task(Protocol):
    """One long step under way."""

    def advance(self, amount: float = 1.0) -> None:
        """Say that amount more units are done."""

    def note(self, text: str) -> None:
        """Replace the short text beside the bar (loss, tokens/s)."""


class Progress(Protocol):
    """Where stages report."""

    def task(self, title: str, total: float) -> AbstractContextManager[Task]:
        """Open a step of total units; closing it ends the display."""
        ...

    def say(self, text: str) -> None:
        """One line for a person."""


class _SilentTask:
    def __enter__(self) -> _SilentTask:
        return self

    def __exit__(self, *_: object) -> None:
        return None

    def advance(self, amount: float = 1.0) -> None:
        return None

    def note(self, text: str) -> None:
        return None


class Silent:
    """A Progress that shows nothing."""

    def task(self, title: str, total: float) -> AbstractContextManager[Task]:
        return _SilentTask()

    def say(self, text: str) -> None:
        return None


SILENT: Progress = Silent()
