"""`tunesmith cases`: failed requests from service, on their way to become test rows."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tunesmith.cli.terminal import HERE, As, Directory, Json, emit

if TYPE_CHECKING:
    from rich.console import Console

_All = Annotated[bool, typer.Option("--all", help="Those that were answered right too.")]


def register(app: typer.Typer) -> None:
    """Add the `cases` verbs."""
    cases = typer.Typer(help="Make test rows of requests that failed in service.", no_args_is_help=True)
    for verb in (show, add, drop):
        cases.command()(verb)
    app.add_typer(cases, name="cases")


def show(everything: _All = False, directory: Directory = HERE, as_json: Json = False) -> None:
    """The cases that wait: feedback with `expected` and `keep`."""
    from tunesmith.monitoring.cases import list_cases
    from tunesmith.project import open_project

    found = list_cases(open_project(directory).store, everything=everything)
    document = {"cases": [case.model_dump(mode="json") for case in found]}
    emit(document, as_json, lambda console: _draw(console, document["cases"]))


def add(
    target: Annotated[Path, typer.Argument(help="A JSONL source of the project, made where it is not there.")],
    licence: Annotated[str, typer.Option("--licence", help="SPDX expression that the requests stand under.")],
    everything: _All = False,
    directory: Directory = HERE,
    as_json: Json = False,
    actor: As = None,
) -> None:
    """Write the cases that wait to a source file, each with where it comes from; `data build` then takes them in."""
    from tunesmith.core.errors import UsageError
    from tunesmith.data.governance.licences import permitted
    from tunesmith.monitoring.cases import add_cases, list_cases
    from tunesmith.project import open_project

    project = open_project(directory)
    licence = permitted(licence, project.settings.data.licences, "--licence")
    path = (project.root / target).resolve()
    if not path.is_relative_to(project.root.resolve()):
        raise UsageError("the file lies outside the project", where=str(path), fix="name a file inside it")
    split = project.settings.data.split
    waiting = list_cases(project.store, everything=everything)
    options: dict[str, Any] = {"licence": licence, "split": split, "actor": project.actor(actor)}
    added = add_cases(project.store, waiting, path, **options)
    name = path.relative_to(project.root.resolve()).as_posix()
    named = any(source.path == name for source in project.settings.data.sources)
    document = {"added": added, "source": name, "named": named}
    emit(document, as_json, lambda console: _told(console, document))


def drop(
    requests: Annotated[list[str], typer.Argument(help="Ids of requests, as `cases show` lists them.")],
    directory: Directory = HERE,
    as_json: Json = False,
    actor: As = None,
) -> None:
    """Forget cases, with their texts."""
    from tunesmith.core.errors import UsageError
    from tunesmith.monitoring.cases import drop_cases, list_cases
    from tunesmith.project import open_project
    from tunesmith.store.identities import require

    project = open_project(directory)
    require(project.store, project.actor(actor), "data.build")
    waiting = {case.request: case for case in list_cases(project.store, everything=True)}
    unknown = [request for request in requests if request not in waiting]
    if unknown:
        raise UsageError(f"no case of request {unknown[0]!r} waits", fix="`tunesmith cases show --all` lists them")
    drop_cases(project.store, [waiting[request] for request in requests])
    emit({"dropped": len(requests)}, as_json, lambda console: console.print(f"{len(requests)} dropped"))


def _draw(console: Console, cases: list[dict[str, Any]]) -> None:
    from tunesmith.evaluation.report.wording import visible

    for case in cases:
        scores = ", ".join(f"{metric} {value:.2f}" for metric, value in case["scores"].items())
        console.print(f"{case['request']}  {case['at']}  {case['by']}  {scores}", style="dim", markup=False)
        console.print(f"  asked: {visible(case['messages'][-1]['content'])}", markup=False)
        console.print(f"  answered: {visible(case['answer'])}", markup=False)
        console.print(f"  expected: {visible(case['expected'])}", markup=False)
    if not cases:
        console.print('none waits; feedback with "expected" and "keep": true leaves one')


def _told(console: Console, document: dict[str, Any]) -> None:
    console.print(f"{document['added']} cases added to {document['source']}", markup=False)
    if not document["named"]:
        console.print("name it in tunesmith.yaml, under data.sources, so that it is held out:")
        console.print(f"  - {{path: {document['source']}, split: test}}", markup=False)
    console.print("then `tunesmith data build`; what was measured before stands on the earlier rows")
