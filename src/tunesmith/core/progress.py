"""Progress reports of long steps. The command line draws them; tests and servers show nothing."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Protocol


class Stopped(Exception):
    """The work was told to stop. Raised by the progress reports of work that can be stopped, between two of its steps.

    Not a TunesmithError, so that nothing takes it for a failure of one step.
    """


class Task(Protocol):
    """One long step that is running."""

    def advance(self, amount: float = 1.0) -> None:
        """Report that amount more units are done. Raises Stopped where the work was told to stop."""

    def note(self, text: str) -> None:
        """Replace the short text next to the bar (loss, tokens/s)."""


class Progress(Protocol):
    """Where stages report their progress."""

    def task(self, title: str, total: float) -> AbstractContextManager[Task]:
        """Open a step of total units; closing it ends the display. Raises Stopped as `Task.advance` does."""
        ...

    def say(self, text: str) -> None:
        """One line for a person."""

    def measured(self, name: str, values: Mapping[str, float]) -> None:
        """Report numbers of the training with this name, for its curves.

        values: what is predicted, under names that begin with `expected_`, and the score `beside:NAME` of an untuned
        candidate; or what was measured after its step `step`.
        """


class Silent:
    """A Progress, and its tasks, that show nothing."""

    def task(self, title: str, total: float) -> AbstractContextManager[Task]:
        return nullcontext(self)

    def advance(self, amount: float = 1.0) -> None:
        return None

    def note(self, text: str) -> None:
        return None

    def say(self, text: str) -> None:
        return None

    def measured(self, name: str, values: Mapping[str, float]) -> None:
        return None


SILENT: Progress = Silent()
