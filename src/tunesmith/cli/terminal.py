"""What all commands share: common options, messages on stderr, one result on stdout, progress bars.

Whatever a command prints goes through here, so that text of strangers cannot control the terminal (see
`core/text/display.py`).
"""

from __future__ import annotations

import contextlib
import copy
import functools
import inspect
import re
import shlex
import sys
import time
from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeAlias, TypeVar, get_args, get_origin

import typer
from typer.models import ArgumentInfo

from tunesmith import services
from tunesmith.core.errors import NextStep, UsageError
from tunesmith.core.progress import Task
from tunesmith.core.text.display import json_text, printable, printable_line
from tunesmith.core.text.names import Scope

if TYPE_CHECKING:
    from pydantic import BaseModel
    from rich.console import ConsoleRenderable
    from rich.table import Column, Table

    from tunesmith.project import Project
    from tunesmith.services import actions
    from tunesmith.store.store import Store

    Asked = TypeVar("Asked", bound=services.actions.Request)
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


# Lines, lines with a style, and what rich draws.
Drawn: TypeAlias = "Iterable[str | tuple[str, str] | ConsoleRenderable]"

Positive = Annotated[int, typer.Option(min=1)]
NotNegative = Annotated[int, typer.Option(min=0)]
Tenant = Annotated[str | None, typer.Option(help="The tenant it is for. Where you act: by default yours.")]
Region = Annotated[str | None, typer.Option(help="The region it is for. Where you act: by default yours.")]


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
    """A step in words, and its command if it has one."""
    return f"{step}: `{command_line(step)}`" if step.verb else str(step)


def say(text: str = "") -> None:
    """Print a line for a person, on stderr."""
    print(printable_line(text), file=sys.stderr, flush=True)


@dataclass(frozen=True)
class Here:
    """The options that commands share: the project's folder, and whether the result is printed as JSON.

    given: the command's own arguments and options, by the names of its parameters.
    """

    directory: Annotated[
        Path, typer.Option("-C", "--directory", metavar="DIR", help="The project's folder.", callback=_folder)
    ] = Path()
    as_json: Annotated[bool, typer.Option("--json", help="Print a JSON document on stdout, and nothing else.")] = False
    given: dict[str, Any] = field(default_factory=dict, init=False)

    @property
    def project(self) -> Project:
        """The project in the folder."""
        from tunesmith.project import Project

        return Project.load(self.directory)

    @functools.cached_property
    def store(self) -> Store:
        """The store of the project, or the folder itself where it is a store."""
        from tunesmith.project import open_store

        return open_store(self.directory)

    @property
    def machine(self) -> actions.Acting:
        """Whoever runs this machine, for what shows all that is in the store."""
        return services.actions.on_this_machine(self.store, lambda: self.project)

    @property
    def scope(self) -> Scope:
        """The tenant and region that the command's options name; "" stands for all."""
        return Scope(self.given["tenant"] or "", self.given["region"] or "")

    def emit(self, result: Result, draw: Callable[[Result], Drawn | str] | str) -> None:
        """Print a command's result on stdout: as JSON, or for a person. draw: makes what is drawn, or one line."""
        if self.as_json:
            how: Any = {"mode": "json", "by_alias": True, "context": {"worded": worded}}
            print(json_text(result if isinstance(result, Mapping) else result.model_dump(**how)), flush=True)
            return
        from tunesmith.cli.console import PlainConsole

        drawn = draw if isinstance(draw, str) else draw(result)
        PlainConsole().draw([drawn] if isinstance(drawn, str) else drawn)


@dataclass(frozen=True)
class Acting(Here):
    """The options of a command that changes something: also who acts."""

    actor: Annotated[
        str | None, typer.Option("--as", metavar="USER", help="Who acts; by default $TUNESMITH_USER, else the owner.")
    ] = None

    @property
    def acting(self) -> actions.Acting:
        """The person who acts, and the store."""
        from tunesmith.store.people.identities import acting, get_user

        user = get_user(self.store, acting(self.store, self.actor))
        return services.actions.Acting(self.store, user, lambda: self.project, user.region, progress=Terminal())

    def request(self, action: services.actions.Action[Asked, Done], **fields: object) -> Asked:
        """The request of an action: its fields are the command's options of the same names, and these fields.

        What is None was left out.
        """
        given = {name: self.given.get(name) for name in action.asked.model_fields} | fields
        return action.request({name: value for name, value in given.items() if value is not None})

    def do(self, action: services.actions.Action[Asked, Done], **fields: object) -> Done:
        """Do an action as the person who acts. fields: as `request` takes them."""
        return action(self.acting, self.request(action, **fields))

    def show(
        self, action: services.actions.Action[Asked, Done], draw: Callable[[Done], Drawn | str] | str, **fields: object
    ) -> Done:
        """Do an action, and print its result as `emit` does. Returns it."""
        done = self.do(action, **fields)
        self.emit(done, draw)
        return done


def add_commands(app: typer.Typer, *functions: Callable[..., int | None], **renamed: Callable[..., int | None]) -> None:
    """Add functions as commands, under their own names or under a keyword's name.

    A function's first parameter, `here` (Here or Acting), becomes the options that this class has as fields. Parameters
    before `*` are arguments, those after it options. The last paragraph of the docstring describes them, each in a line
    `name: help` or `name METAVAR: help`. The result is the exit code; None is 0.
    """
    for function in functions:
        app.command()(_command(function))
    for name, function in renamed.items():
        app.command(name)(_command(function))


def add_group(app: typer.Typer, name: str, about: str) -> typer.Typer:
    """A new group of commands. about: its help."""
    group = typer.Typer(no_args_is_help=True, help=about)
    app.add_typer(group, name=name)
    return group


_DESCRIBED = re.compile(r"^(\w+)(?: ([^a-z\n]+?))?: (.+(?:\n +.+)*)", re.MULTILINE)


def _command(function: Callable[..., int | None]) -> Callable[..., None]:
    parameters = dict(inspect.signature(function, eval_str=True).parameters)
    shared = parameters.pop("here").annotation
    options = inspect.signature(shared, eval_str=True).parameters
    about, _, last = (inspect.getdoc(function) or "").rpartition("\n\n")
    described = {name: rest for name, *rest in _DESCRIBED.findall(last)} if about else {}
    command_help = about if described else function.__doc__
    every = [_described(each, *described.pop(name, ("", ""))) for name, each in parameters.items()]
    every += [each.replace(kind=each.KEYWORD_ONLY) for each in options.values()]
    if described:
        raise TypeError(f"{function.__name__} describes parameters that it does not have: {', '.join(described)}")

    @functools.wraps(function)
    def command(**given: Any) -> None:
        here = shared(**{name: given.pop(name) for name in options})
        here.given.update(given)
        if code := function(here, **given):
            raise typer.Exit(code)

    command.__doc__ = command_help
    command.__signature__ = inspect.Signature(every)  # type: ignore[attr-defined]
    command.__annotations__ = {each.name: each.annotation for each in every}
    return command


def _described(parameter: inspect.Parameter, metavar: str, text: str) -> inspect.Parameter:
    """A parameter with what typer has to know of it. A bool has no `--no-...` unless it is annotated."""
    given = parameter.annotation
    kind, *own = get_args(given) if get_origin(given) is Annotated else [given]
    if own:
        info = copy.copy(own[0])
    elif parameter.kind is parameter.KEYWORD_ONLY:
        info = typer.Option(*[f"--{parameter.name.replace('_', '-')}"] * (kind is bool))
    else:
        info = typer.Argument()
    if isinstance(info, ArgumentInfo) and get_origin(kind) is not Literal:
        info.metavar = info.metavar or parameter.name.upper()
    info.metavar, info.help = metavar or info.metavar, " ".join(text.split()) or info.help
    return parameter.replace(annotation=Annotated[kind, info], kind=parameter.KEYWORD_ONLY)


def printed_text(text: str) -> Callable[[object], Drawn]:
    """A draw function that prints a text of several lines as it is."""
    from rich.text import Text

    return lambda _result: [Text(text.removesuffix("\n"))]


def table(
    rows: Iterable[Sequence[object]],
    *headings: str | Column,
    title: str | None = None,
    right: Container[int] = (),
) -> Table:
    """A table of texts. A long one continues in the next line. right: numbers of the columns that are aligned there."""
    from rich.table import Table
    from rich.text import Text

    drawn = Table(*headings, title=title, title_justify="left", show_header=bool(headings))
    for row in rows:
        drawn.add_row(*(cell if isinstance(cell, Text) else printable(str(cell)) for cell in row))
    for number, column in enumerate(drawn.columns):
        column.overflow, column.justify = "fold", "right" if number in right else "left"
    return drawn


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
        from tunesmith.cli.console import bar

        with bar(title, total) as task:
            yield task


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
