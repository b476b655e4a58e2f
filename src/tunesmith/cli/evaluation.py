"""`plan`, `evaluate`, `gate`, `compare`, `leaderboard` and `report`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from tunesmith.cli.terminal import Here, Terminal, add_commands

if TYPE_CHECKING:
    from rich.console import Console
    from rich.text import Text

    from tunesmith.evaluation.compare import Comparison
    from tunesmith.evaluation.planning import Plan
    from tunesmith.evaluation.report.evidence import EvidenceReport
    from tunesmith.evaluation.summary import EvaluationSummary, VerdictSummary
    from tunesmith.records.evaluation import MetricInterval
    from tunesmith.registry.leaderboard import Leaderboard

EXITS = {"pass": 0, "fail": 3, "inconclusive": 4}
_COLOURS = {"pass": "green", "fail": "red", "inconclusive": "yellow"}


def register(app: typer.Typer) -> None:
    """Add the commands."""
    add_commands(app, plan, evaluate, gate, compare, leaderboard, report)


def plan(
    here: Here,
    lift: Annotated[
        float | None,
        typer.Option(help="The true lift hoped for; 0.1 is ten points. By default five points above each bound."),
    ] = None,
    differing: Annotated[
        float | None, typer.Option(min=0.0, max=1.0, help="Share of rows on which the two differ; by default 0.3.")
    ] = None,
    between: Annotated[
        tuple[str, str] | None,
        typer.Option(metavar="NAME NAME", help="Measure that share on the validation rows, with these candidates."),
    ] = None,
) -> None:
    """Show before a run what the test rows can show, and how many rows it takes to detect a lift."""
    from tunesmith.services import evaluations

    found = evaluations.plan(here.project, lift=lift, differing=differing, between=between or (), progress=Terminal())
    here.emit(found, _draw_plan)


def evaluate(
    here: Here, names: Annotated[list[str] | None, typer.Argument(help="Candidates; by default all of them.")] = None
) -> None:
    """Measure candidates on the same held-out rows."""
    from tunesmith.services import evaluations

    found = evaluations.evaluate(here.project, names or None, progress=Terminal())
    here.emit(found, draw_evaluation)


def gate(
    here: Here,
    name: Annotated[str | None, typer.Argument(help="The candidate; by default the one meant for release.")] = None,
) -> None:
    """Apply the gates to a candidate. Exits with 0 for pass, 3 for fail, 4 for inconclusive."""
    from tunesmith.services import evaluations

    found = evaluations.gate(here.project, name, progress=Terminal())
    here.emit(found, draw_verdict)
    raise typer.Exit(EXITS[found.verdict])


def compare(
    here: Here,
    first: Annotated[str, typer.Argument(help="A candidate's name, or a version: NAME@v1, NAME@champion, a digest.")],
    second: Annotated[str, typer.Argument(help="Another one; differences are second minus first.")],
) -> None:
    """Compare two candidates or versions, request by request."""
    from tunesmith.services import evaluations

    here.emit(evaluations.compare_candidates(here.project, first, second), _draw_comparison)


def leaderboard(
    here: Here, name: Annotated[str | None, typer.Argument(help="A version's name; by default all names.")] = None
) -> None:
    """Rank registered versions among those that were measured on the same held-out rows."""
    from tunesmith.registry.leaderboard import leaderboard as rank

    here.emit(rank(here.store, name), _draw_leaderboard)


def report(
    here: Here,
    version: Annotated[
        str | None, typer.Argument(help="NAME@v1, NAME@champion or a digest; by default the newest evaluation.")
    ] = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", metavar="FILE", help="The page; by default report.html in DIR.")
    ] = None,
    markdown: Annotated[
        bool, typer.Option("--markdown", help="Print Markdown for a pull request, or write it to --output.")
    ] = False,
) -> None:
    """Write the evidence as one HTML page. With --json, print its data, and write a page only to --output."""
    from tunesmith.core.errors import UsageError
    from tunesmith.core.system.files import write_atomic
    from tunesmith.core.text.display import printable
    from tunesmith.evaluation.report.markdown import report_markdown
    from tunesmith.services import evaluations

    if markdown and here.as_json:
        raise UsageError("--markdown and --json both write to stdout", fix="choose one of them")
    found = evaluations.report(here.project, version)
    if markdown:
        text = report_markdown(found)
        if output is not None:
            write_atomic(output, text.encode())
        else:
            print(printable(text), end="")
        return
    page = output if output is not None or here.as_json else here.directory / "report.html"
    if page is not None:
        evaluations.report_page(found, page)
    here.emit(found, lambda console, shown: _draw_report(console, shown, page))


def draw_evaluation(console: Console, found: EvaluationSummary) -> None:
    """The candidates with their intervals and prices, the best by the primary metric first."""
    from rich.table import Table
    from rich.text import Text

    from tunesmith.core.text.wording import money

    metrics = list(next(iter(found.candidates.values())))
    table = Table(title=f"{found.n} held-out requests in {found.groups} groups", title_justify="left")
    table.add_column("candidate", no_wrap=True)
    for metric in metrics:
        style = "bold cyan" if metric == found.primary else None
        table.add_column(metric, justify="right", header_style=style, overflow="fold")
    for heading in ("prompt tokens", "answer tokens", "seconds", *([found.currency] if found.currency else [])):
        table.add_column(f"{heading}\nper 1,000", justify="right", overflow="fold")
    for name in sorted(found.candidates, key=lambda name: (-found.candidates[name][found.primary].mean, name)):
        price = found.prices[name]
        table.add_row(
            Text(name, "bold" if found.tuned[name] else ""),
            *(_measured(found.candidates[name][metric]) for metric in metrics),
            f"{price.prompt_tokens_per_1000:,.0f}",
            f"{price.completion_tokens_per_1000:,.0f}",
            f"{price.seconds_per_1000:,.0f}",
            *([money(price.money_per_1000)] if found.currency else []),
        )
    console.print(table)
    for name, cut in found.cut.items():
        if cut:
            console.print(f"{cut} answers of {name} were cut off at the longest length allowed")
    for name, drop in found.probes["general"].drops.items() if found.probes else ():
        change = f"{-drop.mean * 100:+.1f} points [{-drop.high * 100:+.1f}, {-drop.low * 100:+.1f}]"
        console.print(f"general ability of {name} compared with its base: {change}")
    _draw_behaviour(console, found)
    console.print(f"intervals are {found.confidence:.0%} confidence intervals over groups", style="dim")


def _draw_behaviour(console: Console, found: EvaluationSummary) -> None:
    """How often each candidate broke each policy check, and how much of its answers is in the references' style."""
    from tunesmith.records.evaluation import NoStyle

    for name, told in found.policy.candidates.items() if found.policy else ():
        if told.unusable is not None:
            console.print(f"policy, {name}: {told.unusable}", style="yellow")
        for check, cell in (told.checks or {}).items():
            extra = f", {cell.undecided} decide nothing" if cell.undecided else ""
            leaked = f", {cell.leaked} leaked" if cell.leaked else ""
            kept = not (cell.broke or cell.undecided or cell.leaked)
            said = f"policy check {check}: {name} broke it on {cell.broke} of {cell.n} requests{extra}{leaked}"
            console.print(said, style="dim" if kept else "red" if cell.broke else "yellow")
    if isinstance(found.style, NoStyle):
        console.print(f"style was not measured: {found.style.unusable}", style="yellow")
    elif found.style is not None:
        for name, measured in found.style.candidates.items():
            share = measured.share
            said = f"{share.mean:.1%} [{share.low:.1%}, {share.high:.1%}]" if share else "inconclusive"
            console.print(f"answers of {name} in the references' style: {said}")


def draw_verdict(console: Console, found: VerdictSummary) -> None:
    """The gates with their outcomes, and the verdict."""
    from rich.table import Table
    from rich.text import Text

    table = Table(title=f"gates for {found.candidate}", title_justify="left")
    for heading in ("gate", "outcome", "why"):
        table.add_column(heading, overflow="fold")
    for gate in found.gates:
        table.add_row(gate.name, Text(gate.outcome, _COLOURS[gate.outcome]), gate.reason)
    if found.gates:
        console.print(table)
    outcome = Text(found.verdict, f"bold {_COLOURS[found.verdict]}")
    console.print("verdict:", outcome, *([f"({found.reason})"] if found.reason else []))
    for caution in found.cautions:
        console.print(Text(caution, "yellow"))
    if found.test_set_use > 1:
        console.print(
            f"{found.test_set_use} candidates have used these test rows, which widens the intervals", style="dim"
        )


def _draw_plan(console: Console, found: Plan) -> None:
    from tunesmith.core.text.wording import points
    from tunesmith.evaluation.planning import plan_sentence

    for gate in found.gates:
        console.print(plan_sentence(found, gate))
        needed = f"{gate.needed:,} rows" if gate.needed else "no number of rows"
        console.print(
            f"  a true difference of {points(gate.lift)} points passes with {gate.power:.0%}; "
            f"{needed} in groups of this size would pass it with {found.wanted_power:.0%}",
        )
        assumed = "assumed, since a judge scores it" if found.measured else "assumed: --between measures it"
        basis = "measured on the validation rows" if gate.measured else assumed
        console.print(
            f"  how the two differ is {basis}; rows of one group correlate by {gate.correlation:.2f}", style="dim"
        )
    if not found.gates:
        console.print("no gate compares two candidates, so there is nothing to plan")
    console.print(f"{found.test_set_uses} candidates have used these test rows so far", style="dim")


def _draw_comparison(console: Console, found: Comparison) -> None:
    from rich.table import Table

    first, second = found.first, found.second
    table = Table(title=f"{second.label} against {first.label}, {found.n} requests", title_justify="left")
    headings = ("metric", first.label, second.label, "difference, points", "won", "lost", "alike", "p (sign-flip)")
    for place, heading in enumerate(headings):
        table.add_column(heading, justify="right" if place else "left", overflow="fold")
    for name, metric in found.metrics.items():
        table.add_row(
            name,
            f"{first.metrics[name].mean:.1%}",
            f"{second.metrics[name].mean:.1%}",
            _gap(metric.difference),
            str(metric.wins),
            str(metric.losses),
            str(metric.ties),
            "< 0.0001" if metric.sign_flip < 0.0001 else f"{metric.sign_flip:.2g}",
        )
    console.print(table)
    if found.changed_scorers:
        console.print(f"not compared, since the scorer has changed: {', '.join(found.changed_scorers)}")


def _draw_leaderboard(console: Console, found: Leaderboard) -> None:
    from rich.table import Table

    for board in found.boards:
        table = Table(title=board.title, title_justify="left")
        headings = ("version", "approach", board.metric, "behind the first, points", "verdict", "")
        for place, heading in enumerate(headings):
            table.add_column(heading, justify="right" if place in (2, 3) else "left", overflow="fold")
        for row in board.versions:
            behind = _gap(row.behind) if row.behind else ""
            state = f"recalled: {row.recalled}" if row.recalled else row.alias or ""
            table.add_row(row.version, row.approach, _measured(row), behind, row.verdict, state)
        console.print(table)
    if not found.boards:
        console.print("no version is registered yet; `tunesmith run` registers what passes its gates")


def _measured(found: MetricInterval) -> Text:
    return _two_lines(f"{found.mean:.1%}", f"[{found.low * 100:.1f}, {found.high * 100:.1f}]")


def _gap(found: MetricInterval) -> Text:
    return _two_lines(f"{found.mean * 100:+.1f}", f"[{found.low * 100:+.1f}, {found.high * 100:+.1f}]")


def _two_lines(number: str, interval: str) -> Text:
    from rich.text import Text

    return Text.assemble(number, "\n", (interval, "dim"))


def _draw_report(console: Console, found: EvidenceReport, page: Path | None) -> None:
    console.print(found.advice.headline, style="bold")
    for sentence in found.advice.reasons:
        console.print(f"- {sentence}")
    for sentence in found.advice.cautions:
        console.print(f"! {sentence}", style="yellow")
    console.print(f"written to {page}")
