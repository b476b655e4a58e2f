"""A rich console that text of strangers cannot control."""

from __future__ import annotations

from typing import Any

from rich.console import Console, ConsoleOptions, ConsoleRenderable, RenderHook, RenderResult
from rich.segment import Segment

from tunesmith.core.text.display import printable, printable_line


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
