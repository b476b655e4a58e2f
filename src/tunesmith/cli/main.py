"""The `tunesmith` command: its subcommands, and the exit codes of errors."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Annotated

import typer
from typer.exceptions import TyperException

from tunesmith.cli import (
    audit,
    data,
    erasure,
    evaluation,
    jobs,
    monitoring,
    pipeline,
    project,
    review,
    rollout,
    serve,
    storage,
    users,
    versions,
)
from tunesmith.cli.terminal import say, worded
from tunesmith.core.errors import NextStep, TunesmithError, UsageError
from tunesmith.core.system.files import disk_full, is_disk_full
from tunesmith.core.system.machine import started_by_torchrun
from tunesmith.core.text.display import json_text

_HELP = "From a task's examples to a released model behaviour that was measured, approved and signed."
app = typer.Typer(
    name="tunesmith",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
for commands in (
    *(project, pipeline, jobs, data, evaluation, review, versions, users),
    *(rollout, serve, monitoring, erasure, storage, audit),
):
    commands.register(app)

_STOPPED = 130
_STOPPED_TEXT = "\nstopped; the same command continues from here"


@app.callback(help=_HELP)
def options(
    context: typer.Context,
    directory: Annotated[
        Path | None,
        typer.Option("-C", "--directory", metavar="DIR", help="The project's folder."),
    ] = None,
) -> None:
    """Keep the options that are given before the command. Raises UsageError for what torchrun must not start."""
    if started_by_torchrun() and context.invoked_subcommand != "train":
        raise UsageError("torchrun starts `tunesmith train` only", fix="start this command without torchrun")
    context.obj = directory


def main() -> None:
    """Run a command. An expected error ends with its exit code and a message, not with a traceback."""
    try:
        code = app(standalone_mode=False)
    except TunesmithError as error:
        _print_error(error)
        sys.exit(error.exit_code)
    except TyperException as error:
        message = error.format_message() if hasattr(error, "format_message") else str(error)
        context = getattr(error, "ctx", None)
        command = context.command_path if context else "tunesmith"
        _print_error(UsageError(message, fix=f"`{command} --help` shows how"))
        sys.exit(2)
    except (KeyboardInterrupt, typer.Abort):
        print(_STOPPED_TEXT, file=sys.stderr)
        sys.exit(_STOPPED)
    except BrokenPipeError:
        sys.exit(1)
    except Exception as error:
        if not (told := _told(error)):
            raise
        _print_error(told)
        sys.exit(told.exit_code)
    if code == _STOPPED:  # typer's own answer to ctrl-C
        print(_STOPPED_TEXT, file=sys.stderr)
    sys.exit(code if isinstance(code, int) else 0)


def _told(error: Exception) -> TunesmithError | None:
    """What to say about an error of the system: a file that cannot be used, a disk that is full. None for a bug."""
    if isinstance(error, OSError) and not is_disk_full(error):
        return TunesmithError(str(error.strerror or error), where=error.filename and os.fsdecode(error.filename))
    if isinstance(error, OSError) and error.filename:
        return disk_full(Path(os.fsdecode(error.filename)))
    return disk_full() if is_disk_full(error) else None


def _print_error(error: TunesmithError) -> None:
    if isinstance(error.fix, NextStep):
        error.fix = worded(error.fix)
    if "--json" in sys.argv:
        print(json_text(error.as_json()))
    say(f"error: {error.what}")
    for label, text in (("where", error.where), ("fix", error.fix)):
        if text:
            say(f"  {label}: {text}")
