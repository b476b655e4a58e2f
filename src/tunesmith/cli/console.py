"""What is drawn by rich: a console that text of strangers cannot control, and its progress bars."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from rich.console import Console, ConsoleOptions, ConsoleRenderable, RenderHook, RenderResult
from rich.segment import Segment
from rich.table import Column
from rich.text import Text

from tunesmith.cli.terminal import Drawn
from tunesmith.core.progress import Task
from tunesmith.core.text.display import printable, printable_line

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID


class PlainConsole(Console):
    """Prints text as it is: no markup, no :emoji:, and nothing in a text controls the terminal.

    A string is a line: what follows a line feed inside it is indented. A rich `Text` keeps its lines.
    """

    def __init__(self, *, stderr: bool = False) -> None:
        super().__init__(stderr=stderr, markup=False, emoji=False, highlight=False)
        self.push_render_hook(_Printable())

    def print(self, *objects: Any, **options: Any) -> None:
        """Print strings and renderables like rich's own console."""
        super().print(*(printable_line(each) if isinstance(each, str) else each for each in objects), **options)

    def draw(self, drawn: Drawn) -> None:
        """Print what a command draws. No line is broken: a terminal does that itself."""
        for each in drawn:
            shown, style = each if isinstance(each, tuple) else (each, None)
            self.print(shown, style=style, soft_wrap=isinstance(shown, str | Text))


class _Printable(RenderHook):
    """Whatever is printed, tables and trees too: only rich's own segments may hold control sequences."""

    def process_renderables(self, renderables: list[ConsoleRenderable]) -> list[ConsoleRenderable]:
        return [_PrintableRenderable(each) for each in renderables]


class _PrintableRenderable:
    def __init__(self, renderable: ConsoleRenderable) -> None:
        self._renderable = renderable

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        for segment in console.render(self._renderable, options):
            yield segment if segment.control else Segment(printable(segment.text), segment.style)


@contextlib.contextmanager
def bar(title: str, total: float) -> Iterator[Task]:
    """Show a progress bar for a step of total units on stderr."""
    from rich import progress

    columns = (
        progress.TextColumn("{task.description}", markup=False),
        progress.BarColumn(bar_width=28),
        progress.TaskProgressColumn(),
        progress.TimeElapsedColumn(Column(min_width=7)),
        progress.TextColumn("left"),
        progress.TimeRemainingColumn(elapsed_when_finished=False, table_column=Column(min_width=7)),
        progress.TextColumn("{task.fields[note]}", markup=False),
    )
    with progress.Progress(*columns, console=PlainConsole(stderr=True)) as display:
        yield _BarTask(display, display.add_task(printable(title), total=total, note=""))


class _BarTask:
    def __init__(self, display: Progress, identifier: TaskID) -> None:
        self._display, self._identifier = display, identifier

    def advance(self, amount: float = 1.0) -> None:
        self._display.advance(self._identifier, amount)

    def note(self, text: str) -> None:
        self._display.update(self._identifier, note=printable(text))
