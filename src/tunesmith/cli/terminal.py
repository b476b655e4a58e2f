"""What all commands share: common options, messages on stderr, one result on stdout, progress bars.

Whatever a command prints goes through here, so that text of strangers cannot control the terminal (see
`core/text/display.py`).
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import shlex
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import typer

from tunesmith.core.errors import NextStep, UsageError
from tunesmith.core.progress import Task
from tunesmith.core.text.display import json_text, printable, printable_line

if TYPE_CHECKING:
    from pydantic import BaseModel
    from rich.console import Console

    from tunesmith.project import Project
    from tunesmith.services import actions
    from tunesmith.services.actions import Action
    from tunesmith.store.store import Store

    Done = TypeVar("Done", bound=BaseModel)
    Result = TypeVar("Result", bound=BaseModel | Mapping[str, Any])


def _folder(context: typer.Context, folder: Path) -> Path:
    """The project's folder, whether `-C DIR` is written before or after the command."""
    before = context.find_root().obj
    if not isinstance(before, Path):
        return folder
    source = context.get_parameter_source("directory")
    if source is not None and source.name == "COMMANDLINE":
        raise UsageError("-C is given twice", where=f"-C {before} and -C {folder}", fix="write it once")
    return before


Json = Annotated[bool, typer.Option("--json", help="Print one JSON document on stdout and nothing else there.")]
Tenant = Annotated[str | None, typer.Option("--tenant", help="The tenant it is for. Where you act: by default yours.")]
Region = Annotated[str | None, typer.Option("--region", help="The region it is for. Where you act: by default yours.")]


def command_line(step: NextStep) -> str:
    """The command that does a step. An argument that it needs and the step does not give stands by its name."""
    from tunesmith.cli.main import app

    command: Any = typer.main.get_command(app)
    for name in step.verb.split():
        command = command.commands[name]
    words = ["tunesmith", step.verb]
    for one in command.params:
        value = step.arguments.get(one.name, ... if one.required else None)
        option = [one.opts[0]] if one.param_type_name == "option" else []
        if value is ...:
            words += [*option, (one.metavar or one.name.upper()).strip("[]*")]
        elif value is True:
            words += option
        elif value:
            for each in value if isinstance(value, tuple) else (value,):
                words += [*option, shlex.quote(str(each))]
    return " ".join(words)


def worded(step: NextStep) -> str:
    """A step in words, and its command."""
    return f"{step}: `{command_line(step)}`"


def say(text: str = "") -> None:
    """Print a line for a person, on stderr."""
    print(printable_line(text), file=sys.stderr, flush=True)


@dataclass(frozen=True)
class Here:
    """The options that commands share: the project's folder, and whether the result is printed as JSON."""

    directory: Annotated[
        Path, typer.Option("-C", "--directory", metavar="DIR", help="The project's folder.", callback=_folder)
    ] = Path()
    as_json: Json = False

    @property
    def project(self) -> Project:
        """The project in the folder."""
        from tunesmith.project import Project

        return Project.load(self.directory)

    @property
    def store(self) -> Store:
        """The store of the project, or the folder itself where it is a store."""
        from tunesmith.project import open_store

        return open_store(self.directory)

    def emit(self, result: Result, draw: Callable[[Console, Result], None]) -> None:
        """Print a command's result on stdout: as JSON, or drawn for a person."""
        if self.as_json:
            document = result if isinstance(result, Mapping) else result.model_dump(mode="json", by_alias=True)
            print(json_text(document), flush=True)
            return
        from tunesmith.cli.console import PlainConsole

        draw(PlainConsole(), result)


@dataclass(frozen=True)
class Acting(Here):
    """The options of a command that changes something: also who acts."""

    actor: Annotated[
        str | None, typer.Option("--as", metavar="USER", help="Who acts; by default $TUNESMITH_USER, else the owner.")
    ] = None

    @property
    def acting(self) -> actions.Acting:
        """The person who acts, and the store."""
        from tunesmith.services import actions
        from tunesmith.store.people.identities import acting, get_user

        store = self.store
        return actions.Acting(
            store, get_user(store, acting(store, self.actor)), lambda: self.project, progress=Terminal()
        )

    def do(self, action: Action[Any, Done], **fields: object) -> Done:
        """Do an action as the person who acts. fields: of its request; None where the option was left out."""
        acting = self.acting
        return action(acting, action.request({name: value for name, value in fields.items() if value is not None}))


def add_commands(app: typer.Typer, *functions: Callable[..., None], **renamed: Callable[..., None]) -> None:
    """Add functions as commands, under their own names or under a keyword's name.

    A function's parameter `here` (Here or Acting) becomes the options that this class has as fields.
    """
    for function in functions:
        app.command()(_with_options(function))
    for name, function in renamed.items():
        app.command(name)(_with_options(function))


def _with_options(function: Callable[..., None]) -> Callable[..., None]:
    signature = inspect.signature(function, eval_str=True)
    if "here" not in signature.parameters:
        return function
    shared = signature.parameters["here"].annotation
    options = inspect.signature(shared, eval_str=True).parameters
    parameters = [each for name, each in signature.parameters.items() if name != "here"]

    @functools.wraps(function)
    def command(**given: Any) -> None:
        function(here=shared(**{name: given.pop(name) for name in options}), **given)

    parameters += options.values()
    command.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
    command.__annotations__ = {each.name: each.annotation for each in parameters}
    return command


def printed(line: str) -> Callable[[Console, Any], None]:
    """A draw function that prints one line."""
    return lambda console, _result: console.print(line, soft_wrap=True)


def printed_text(text: str) -> Callable[[Console, Any], None]:
    """A draw function that prints a text of several lines as it is."""
    from rich.text import Text

    return lambda console, _result: console.print(Text(text.removesuffix("\n")), soft_wrap=True)


def draw_table(console: Console, rows: Iterable[Sequence[object]], *headings: str, title: str | None = None) -> None:
    """Draw rows as a table."""
    from rich.table import Table

    table = Table(*headings, title=title, title_justify="left", show_header=bool(headings))
    for row in rows:
        table.add_row(*(printable(str(cell)) for cell in row))
    console.print(table)


class Terminal:
    """A core.progress.Progress on stderr: rich bars on a terminal, otherwise a plain line every few seconds."""

    def __init__(self) -> None:
        self._fancy = sys.stderr.isatty()

    def say(self, text: str) -> None:
        """Print a line for a person."""
        say(text)

    def measured(self, name: str, values: Mapping[str, float]) -> None:
        """Nothing: the bar's note has the loss."""

    @contextlib.contextmanager
    def task(self, title: str, total: float) -> Iterator[Task]:
        """Open a step of total units."""
        if not self._fancy:
            plain = _PlainTask(title, total)
            yield plain
            plain.finish()
            return
        from rich import progress as bars
        from rich.table import Column

        from tunesmith.cli.console import PlainConsole

        columns = (
            bars.TextColumn("{task.description}", markup=False),
            bars.BarColumn(bar_width=28),
            bars.TaskProgressColumn(),
            bars.TimeElapsedColumn(Column(min_width=7)),
            bars.TextColumn("left"),
            bars.TimeRemainingColumn(elapsed_when_finished=False, table_column=Column(min_width=7)),
            bars.TextColumn("{task.fields[note]}", markup=False),
        )
        with bars.Progress(*columns, console=PlainConsole(stderr=True)) as display:
            yield _RichTask(display, display.add_task(printable(title), total=total, note=""))


class _RichTask:
    def __init__(self, display: Any, identifier: Any) -> None:
        self._display, self._identifier = display, identifier

    def advance(self, amount: float = 1.0) -> None:
        self._display.advance(self._identifier, amount)

    def note(self, text: str) -> None:
        self._display.update(self._identifier, note=printable(text))


class _PlainTask:
    _EVERY = 10.0

    def __init__(self, title: str, total: float) -> None:
        self._title, self._total, self._done, self._note = title, total, 0.0, ""
        self._began = self._shown = time.monotonic()

    def advance(self, amount: float = 1.0) -> None:
        self._done += amount
        now = time.monotonic()
        if now - self._shown < self._EVERY or self._done >= self._total:
            return
        self._shown = now
        left = ""
        if self._done:
            left = f", {(now - self._began) * (self._total - self._done) / self._done:.0f} s left"
        say(f"{self._title}: {self._done / self._total:.0%}{left} {self._note}".rstrip())

    def note(self, text: str) -> None:
        self._note = text

    def finish(self) -> None:
        say(f"{self._title}: done in {time.monotonic() - self._began:.1f} s {self._note}".rstrip())
