"""`evaluate`, `gate`, `compare`, `leaderboard` and `report`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tunesmith.cli.terminal import HERE, Directory, Json, Terminal, emit

if TYPE_CHECKING:
    from rich.console import Console

    from tunesmith.evaluation.compare import Side
    from tunesmith.project import Project

_EXITS = {"pass": 0, "fail": 3, "inconclusive": 4}
_COLOURS = {"pass": "green", "fail": "red", "inconclusive": "yellow"}


def register(app: typer.Typer) -> None:
    """Add the verbs."""
    for verb in (plan, evaluate, gate, compare, leaderboard, report):
        app.command()(verb)


def plan(
    lift: Annotated[
        float | None, typer.Option(help="The true lift hoped for, 0.1 is ten points; by default five above each bound.")
    ] = None,
    differing: Annotated[
        float | None, typer.Option(min=0.0, max=1.0, help="Share of rows on which the two differ; by default 0.3.")
    ] = None,
    between: Annotated[
        tuple[str, str] | None,
        typer.Option(metavar="NAME NAME", help="Measure that share on the validation rows, with these candidates."),
    ] = None,
    directory: Directory = HERE,
    as_json: Json = False,
) -> None:
    """Say before a run what the test rows can show, and how many it takes to see a lift."""
    from tunesmith import pipeline
    from tunesmith.core.errors import UsageError
    from tunesmith.project import open_project

    if differing is not None and between is not None:
        raise UsageError("the share that differs is either given or measured", fix="leave one of the options out")
    document = pipeline.plan(
        pipeline.PipelineContext(open_project(directory), Terminal()), lift, differing, between or ()
    )
    emit(document, as_json, lambda console, _: show_plan(console, document))


def evaluate(
    names: Annotated[list[str] | None, typer.Argument(help="Candidates; by default all of them.")] = None,
    directory: Directory = HERE,
    as_json: Json = False,
) -> None:
    """Measure candidates on the same held-out rows."""
    from tunesmith import pipeline
    from tunesmith.evaluation.evaluate import evaluation_document
    from tunesmith.project import open_project

    project = open_project(directory)
    document = evaluation_document(project.store, pipeline.evaluate(project, Terminal(), names or None))
    emit(document, as_json, lambda console, _: show_evaluation(console, document))


def gate(
    name: Annotated[str | None, typer.Argument(help="The candidate; by default the one meant for release.")] = None,
    directory: Directory = HERE,
    as_json: Json = False,
) -> None:
    """Hold the gates against a candidate. Exits with 0 for pass, 3 for fail, 4 for inconclusive."""
    from tunesmith import pipeline
    from tunesmith.evaluation.gates.verdict import verdict_document
    from tunesmith.project import open_project

    project = open_project(directory)
    document = verdict_document(project.store, pipeline.gate(project, Terminal(), name))
    emit(document, as_json, lambda console, _: show_verdict(console, document))
    raise typer.Exit(_EXITS[document["verdict"]])


def compare(
    first: Annotated[str, typer.Argument(help="A candidate's name, or a version: NAME@v1, NAME@champion, a digest.")],
    second: Annotated[str, typer.Argument(help="Another one; differences are second minus first.")],
    directory: Directory = HERE,
    as_json: Json = False,
) -> None:
    """Compare two candidates or versions, request by request."""
    from tunesmith.evaluation.compare import comparison_document
    from tunesmith.project import open_project

    project = open_project(directory)
    document = comparison_document(project.store, _side(project, first), _side(project, second))
    emit(document, as_json, lambda console, _: show_comparison(console, document))


def leaderboard(
    name: Annotated[str | None, typer.Argument(help="A version's name; by default all names.")] = None,
    directory: Directory = HERE,
    as_json: Json = False,
) -> None:
    """Rank registered versions among those that were measured on the same held-out rows."""
    from tunesmith.project import open_store
    from tunesmith.registry.leaderboard import leaderboard as boards_of

    document = boards_of(open_store(directory), name)
    emit(document, as_json, lambda console, _: show_leaderboard(console, document))


def report(
    version: Annotated[
        str | None, typer.Argument(help="NAME@v1, NAME@champion or a digest; by default the newest evaluation.")
    ] = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", metavar="FILE", help="The page; by default report.html in DIR.")
    ] = None,
    markdown: Annotated[
        bool, typer.Option("--markdown", help="Print it as Markdown for a pull request (and write only --output).")
    ] = False,
    directory: Directory = HERE,
    as_json: Json = False,
) -> None:
    """Write the evidence as one HTML page; with --json print what it is made of (and write only --output)."""
    from tunesmith.core.errors import UsageError
    from tunesmith.core.files import write_atomic
    from tunesmith.evaluation.report.html import render
    from tunesmith.evaluation.report.markdown import report_markdown
    from tunesmith.evaluation.report.report_data import release_trail, report_data
    from tunesmith.project import open_project

    project = open_project(directory)
    evaluation, verdict, digest = _reported(project, version)
    name = project.store.record(digest).body["name"] if digest else project.settings.name
    data = report_data(project.store, evaluation, verdict, digest, release_trail(project.store, name, digest))
    if markdown:
        if as_json:
            raise UsageError("--markdown and --json both want stdout", fix="ask for one of them")
        text = report_markdown(data)
        if output is not None:
            write_atomic(output, text.encode())
        else:
            print(text, end="")
        return
    target = output if output is not None or as_json else directory / "report.html"
    if target is not None:
        write_atomic(target, render(data).encode())
    emit(data, as_json, lambda console, _: _show_report(console, data, target))


def show_evaluation(console: Console, document: Mapping[str, Any]) -> None:
    """The candidates with their intervals and prices, the best by the primary metric first."""
    from rich.markup import escape
    from rich.table import Table

    from tunesmith.evaluation.report.wording import money

    primary, candidates = document["primary"], document["candidates"]
    metrics = list(next(iter(candidates.values())))
    table = Table(title=f"{document['n']} held-out requests in {document['groups']} groups", title_justify="left")
    table.add_column("candidate", no_wrap=True)
    for metric in metrics:
        table.add_column(metric, justify="right", header_style="bold cyan" if metric == primary else None)
    currency = document["currency"]
    for heading in ("prompt tokens", "answer tokens", "seconds", *([currency] if currency else [])):
        table.add_column(f"{heading}\nper 1,000", justify="right")
    for name in sorted(candidates, key=lambda name: (-candidates[name][primary]["mean"], name)):
        price = document["prices"][name]
        table.add_row(
            f"[bold]{escape(name)}[/]" if document["tuned"][name] else escape(name),
            *(_measured(candidates[name][metric]) for metric in metrics),
            f"{price['prompt_tokens_per_1000']:,.0f}",
            f"{price['completion_tokens_per_1000']:,.0f}",
            f"{price['seconds_per_1000']:,.0f}",
            *([money(price.get("money_per_1000"))] if currency else []),
        )
    console.print(table)
    for name, cut in document["cut"].items():
        if cut:
            console.print(f"{cut} answers of {name} were cut off at the longest length allowed", markup=False)
    for name, drop in document["probes"].get("general", {}).get("drops", {}).items():
        change = f"{-drop['mean'] * 100:+.1f} points [{-drop['high'] * 100:+.1f}, {-drop['low'] * 100:+.1f}]"
        console.print(f"general ability of {name} against its base: {change}", markup=False)
    console.print(f"intervals are {document['confidence']:.0%} confidence intervals over groups", style="dim")


def show_plan(console: Console, document: Mapping[str, Any]) -> None:
    """Each comparing gate: what these rows can show, and how many would show what is hoped for."""
    from tunesmith.evaluation.planning import plan_sentence
    from tunesmith.evaluation.report.wording import points

    for gate in document["gates"]:
        console.print(plan_sentence(document, gate), markup=False)
        needed = f"{gate['needed']:,} rows" if gate["needed"] else "no number of rows"
        console.print(
            f"  a true difference of {points(gate['lift'])} points passes with {gate['power']:.0%}; "
            f"{needed} of this grouping would pass it with {document['wanted_power']:.0%}",
            markup=False,
        )
    if not document["gates"]:
        console.print("no gate compares two candidates, so there is nothing to plan", markup=False)
    basis = "measured on the validation rows" if document["measured"] else "assumed: --between measures it"
    console.print(
        f"how the two differ is {basis}; rows of one group correlate by {document['correlation']:.2f}; "
        f"{document['test_set_uses']} candidates have been judged on these test rows",
        style="dim",
        markup=False,
    )


def show_verdict(console: Console, document: Mapping[str, Any]) -> None:
    """The gates with their outcomes, and the verdict."""
    from rich.markup import escape
    from rich.table import Table

    table = Table(title=f"gates for {document['candidate']}", title_justify="left")
    for heading in ("gate", "outcome", "why"):
        table.add_column(heading, overflow="fold")
    for found in document["gates"]:
        colour = _COLOURS[found["outcome"]]
        table.add_row(escape(found["name"]), f"[{colour}]{found['outcome']}[/]", escape(found["reason"]))
    if document["gates"]:
        console.print(table)
    colour = _COLOURS[document["verdict"]]
    console.print(f"verdict: [bold {colour}]{document['verdict']}[/]", end="")
    console.print(f" ({document['reason']})" if document["reason"] else "", markup=False)
    if document["test_set_use"] > 1:
        console.print(
            f"{document['test_set_use']} candidates have used these test rows, which widens the intervals",
            style="dim",
        )


def show_comparison(console: Console, document: Mapping[str, Any]) -> None:
    """Two candidates metric by metric."""
    from rich.table import Table

    first, second = document["first"], document["second"]
    table = Table(title=f"{second['label']} against {first['label']}, {document['n']} requests", title_justify="left")
    headings = (
        "metric",
        first["label"],
        second["label"],
        "difference, points",
        "won",
        "lost",
        "alike",
        "p (sign-flip)",
    )
    for place, heading in enumerate(headings):
        table.add_column(heading, justify="right" if place else "left", overflow="fold")
    for metric, found in document["metrics"].items():
        gap = found["difference"]
        table.add_row(
            metric,
            f"{first['metrics'][metric]['mean']:.1%}",
            f"{second['metrics'][metric]['mean']:.1%}",
            f"{gap['mean'] * 100:+.1f}\n[dim]\\[{gap['low'] * 100:+.1f}, {gap['high'] * 100:+.1f}][/]",
            str(found["wins"]),
            str(found["losses"]),
            str(found["ties"]),
            "< 0.0001" if found["sign_flip"] < 0.0001 else f"{found['sign_flip']:.2g}",
        )
    console.print(table)


def show_leaderboard(console: Console, document: Mapping[str, Any]) -> None:
    """A table for each board."""
    from rich.table import Table

    from tunesmith.registry.leaderboard import board_title

    for board in document["boards"]:
        table = Table(title=board_title(board), title_justify="left")
        for place, heading in enumerate(
            ("version", "approach", board["metric"], "behind the first, points", "verdict", "")
        ):
            table.add_column(heading, justify="right" if place in (2, 3) else "left", overflow="fold")
        for row in board["versions"]:
            gap = row["behind"]
            behind = (
                f"{gap['mean'] * 100:+.1f}\n[dim]\\[{gap['low'] * 100:+.1f}, {gap['high'] * 100:+.1f}][/]"
                if gap
                else ""
            )
            state = f"recalled: {row['recalled']}" if row["recalled"] else row["alias"] or ""
            table.add_row(row["version"], row["approach"], _measured(row), behind, row["verdict"], state)
        console.print(table)
    if not document["boards"]:
        console.print("no version is registered yet; `tunesmith run` registers what passes its gates")


def _measured(found: Mapping[str, float]) -> str:
    return f"{found['mean']:.1%}\n[dim]\\[{found['low'] * 100:.1f}, {found['high'] * 100:.1f}][/]"


def _show_report(console: Console, data: Mapping[str, Any], target: Path | None) -> None:
    advice = data["advice"]
    console.print(advice["headline"], style="bold", markup=False)
    for sentence in advice["reasons"]:
        console.print(f"- {sentence}", markup=False)
    for sentence in advice["cautions"]:
        console.print(f"! {sentence}", markup=False, style="yellow")
    console.print(f"written to {target}", markup=False)


def _reported(project: Project, version: str | None) -> tuple[str, str | None, str | None]:
    """Digests of the evaluation, verdict and version that a report is about."""
    from tunesmith import pipeline

    if version is not None:
        from tunesmith.registry.versions import resolve

        found = resolve(project.store, version)
        return found.evaluation, found.verdict, found.digest
    evaluation = _latest_evaluation(project)
    verdict = pipeline.latest_verdict(project, None)
    if verdict is None or project.store.record(verdict).parents["evaluation"] != evaluation:
        return evaluation, None, None
    versions = [child for _, kind, child in project.store.children(verdict) if kind == "version"]
    newest = max(versions, key=lambda digest: project.store.record(digest).body["number"], default=None)
    return evaluation, verdict, newest


def _side(project: Project, text: str) -> Side:
    """A candidate of the newest evaluation where text is one's name, else a version."""
    from tunesmith.evaluation.compare import side_of_candidate, side_of_digest
    from tunesmith.registry.versions import resolve

    if text in project.settings.candidates:
        return side_of_candidate(project.store, _latest_evaluation(project), text)
    version = resolve(project.store, text)
    return side_of_digest(project.store, version.evaluation, version.candidate, version.label)


def _latest_evaluation(project: Project) -> str:
    from tunesmith import pipeline
    from tunesmith.core.errors import UsageError

    evaluation = pipeline.latest_evaluation(project)
    if evaluation is None:
        raise UsageError("nothing has been evaluated yet", fix="run `tunesmith evaluate` first")
    return evaluation
