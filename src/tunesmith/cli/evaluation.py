"""`plan`, `evaluate`, `gate`, `compare`, `leaderboard`, `report`; `requests`, `request` and `evaluations`: what was
measured, and what candidates answered."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from tunesmith import services
from tunesmith.cli.terminal import Acting, Drawn, Here, Positive, Terminal, add_commands, table
from tunesmith.core.errors import UsageError
from tunesmith.core.system.files import write_atomic
from tunesmith.core.text.display import printable, printable_line
from tunesmith.core.text.wording import money, p_value, points

if TYPE_CHECKING:
    from rich.text import Text

    from tunesmith.evaluation.compare import Comparison
    from tunesmith.evaluation.planning import Plan
    from tunesmith.evaluation.report.evidence import EvidenceReport
    from tunesmith.evaluation.summary import EvaluationSummary, VerdictSummary
    from tunesmith.records.evaluation import MetricInterval
    from tunesmith.services.answers import OpenedRequest, RequestMatrix
    from tunesmith.services.evaluations import Leaderboard

Evaluation = Annotated[str, typer.Option(metavar="DIGEST", help="The start of its digest; by default the newest one.")]
EXITS = {"pass": 0, "fail": 3, "inconclusive": 4}
_COLOURS = {"pass": "green", "fail": "red", "inconclusive": "yellow"}


def register(app: typer.Typer) -> None:
    """Add the commands."""
    add_commands(app, plan, evaluate, gate, compare, leaderboard, report, requests, request, evaluations)


def plan(
    here: Here,
    *,
    lift: float | None = None,
    differing: Annotated[float | None, typer.Option(min=0.0, max=1.0)] = None,
    between: tuple[str, str] | None = None,
) -> None:
    """Show before a run what the test rows can show, and how many rows it takes to detect a lift.

    lift: The true lift hoped for; 0.1 is ten points. By default five points above each bound.
    differing: Share of rows on which the two differ; by default 0.3.
    between NAME NAME: Measure that share on the validation rows, with these candidates.
    """
    planned = services.evaluations.plan(
        here.project, lift=lift, differing=differing, between=between or (), progress=Terminal()
    )
    here.emit(planned, _draw_plan)


def evaluate(here: Here, names: list[str] | None = None) -> None:
    """Measure candidates on the same held-out rows.

    names: Candidates; by default all of them.
    """
    here.emit(services.evaluations.evaluate(here.project, names or None, progress=Terminal()), draw_evaluation)


def gate(here: Here, name: str | None = None) -> int:
    """Apply the gates to a candidate. Exits with 0 for pass, 3 for fail, 4 for inconclusive.

    name: The candidate; by default the one meant for release.
    """
    verdict = services.evaluations.gate(here.project, name, progress=Terminal())
    here.emit(verdict, draw_verdict)
    return EXITS[verdict.verdict]


def compare(here: Here, first: str, second: str) -> None:
    """Compare two candidates or versions, request by request.

    first: A candidate's name, or a version: NAME@v1, NAME@champion, a digest.
    second: Another one; differences are second minus first.
    """
    here.emit(services.evaluations.compare_candidates(here.project, first, second), _draw_comparison)


def leaderboard(here: Here, name: str | None = None) -> None:
    """Rank registered versions among those that were measured on the same held-out rows.

    name: A version's name; by default all names.
    """
    here.emit(services.evaluations.leaderboard(here.store, name), _draw_leaderboard)


def report(
    here: Here,
    version: str | None = None,
    *,
    output: Annotated[Path | None, typer.Option("--output", "-o")] = None,
    markdown: bool = False,
) -> None:
    """Write the evidence as one HTML page. With --json, print its data, and write a page only to --output.

    version: NAME@v1, NAME@champion or a digest; by default the newest evaluation.
    output FILE: The page; by default report.html in DIR.
    markdown: Print Markdown for a pull request, or write it to --output.
    """
    if markdown and here.as_json:
        raise UsageError("--markdown and --json both write to stdout", fix="choose one of them")
    evidence = services.evaluations.report(here.project, version)
    if markdown:
        text = services.evaluations.page_of(evidence, "report.md")
        if output is not None:
            write_atomic(output, text.encode())
        else:
            print(printable(text), end="")
        return
    page = output if output is not None or here.as_json else here.directory / "report.html"
    if page is not None:
        write_atomic(page, services.evaluations.page_of(evidence, "report.html").encode())
    here.emit(evidence, lambda shown: [*_draw_advice(shown), f"written to {page}"])


def requests(
    here: Acting,
    *,
    evaluation: Evaluation = "",
    focus: str = "",
    rival: str = "",
    metric: str = "",
    show: str = "all",
    group: str = "",
    label: str = "",
    search: str = "",
    first: Annotated[int, typer.Option(min=0)] = 0,
    most: Annotated[int, typer.Option(min=1, max=1000)] = 20,
) -> None:
    """Show held-out requests by candidates: where a candidate got worse first, then where it got better.

    focus: The candidate; by default the best tuned one.
    rival: What it is compared with; by default the best untuned one.
    metric: By default the primary metric.
    show: all, flips, wins, losses, invalid or long.
    group: Only groups whose name begins so.
    label KEY=VALUE: Only rows with this label.
    search: Only requests with this text in a request or an answer.
    first: The place to begin at.
    most: Requests to show.
    """
    wanted = {name: here.given[name] for name in services.answers.FILTERS}
    matrix = services.answers.show_requests(*_which(here, evaluation), wanted, first, most)
    here.emit(matrix, _draw_requests)


def request(here: Acting, row: str, *, evaluation: Evaluation = "", compared: str = "reference") -> None:
    """Show one held-out request with every candidate's answer, and how it differs from the reference.

    row: The row's id, as `requests` shows it.
    compared: What answers are compared with: reference, or a candidate.
    """
    opened = services.answers.show_request(*_which(here, evaluation), row, {}, compared)
    here.emit(opened, _draw_request)


def evaluations(here: Acting, evaluation: str | None = None, *, page: Positive = 1) -> None:
    """List evaluations, newest first, or show one with the verdict on its best judged candidate.

    evaluation [DIGEST]: The start of one's digest: show it with its gates.
    page: 25 evaluations each.
    """
    if evaluation is None:
        here.emit(services.evaluations.list_evaluations(here.acting, page), _draw_list)
    else:
        here.emit(services.evaluations.show_evaluation(*_which(here, evaluation)), _draw_one)


def _which(here: Acting, evaluation: str) -> tuple[services.actions.Acting, str]:
    """Who acts, and the digest of the evaluation that is meant."""
    acting = here.acting
    if evaluation:
        return acting, acting.store.find_record(evaluation)
    return acting, services.evaluations.newest_evaluation(acting)


def draw_evaluation(summary: EvaluationSummary) -> Drawn:
    """The candidates with their intervals and prices, the best by the primary metric first."""
    from rich.table import Column
    from rich.text import Text

    metrics = list(next(iter(summary.candidates.values())))
    prices = ["prompt tokens", "answer tokens", "seconds", *([summary.currency] if summary.currency else [])]
    headings = [Column("candidate", no_wrap=True)]
    headings += [Column(Text(metric, "bold cyan" if metric == summary.primary else "")) for metric in metrics]
    headings += [Column(f"{each}\nper 1,000") for each in prices]
    rows = []
    for name in sorted(summary.candidates, key=lambda name: (-summary.candidates[name][summary.primary].mean, name)):
        price, measured = summary.prices[name], summary.candidates[name]
        costs = (price.prompt_tokens_per_1000, price.completion_tokens_per_1000, price.seconds_per_1000)
        named = Text(name, "bold" if summary.tuned[name] else "")
        paid = [money(price.money_per_1000)] if summary.currency else []
        rows.append(
            [named, *(_measured(measured[each]) for each in metrics), *(f"{each:,.0f}" for each in costs), *paid]
        )
    title = f"{summary.n} held-out requests in {summary.groups} groups"
    yield table(rows, *headings, title=title, right=range(1, len(headings)))
    for name, cut in summary.cut.items():
        if cut:
            yield f"{cut} answers of {name} were cut off at the longest length allowed"
    for name, drop in summary.probes["general"].drops.items() if summary.probes else ():
        change = f"{-drop.mean * 100:+.1f} points [{-drop.high * 100:+.1f}, {-drop.low * 100:+.1f}]"
        yield f"general ability of {name} compared with its base: {change}"
    yield from _draw_behaviour(summary)
    yield f"intervals are {summary.confidence:.0%} confidence intervals over groups", "dim"


def _draw_behaviour(summary: EvaluationSummary) -> Drawn:
    """How often each candidate broke each policy check, and how much of its answers is in the references' style."""
    for name, told in summary.policy.candidates.items() if summary.policy else ():
        if told.unusable is not None:
            yield f"policy, {name}: {told.unusable}", "yellow"
        for check, cell in (told.checks or {}).items():
            extra = f", {cell.undecided} decide nothing" if cell.undecided else ""
            leaked = f", {cell.leaked} leaked" if cell.leaked else ""
            kept = not (cell.broke or cell.undecided or cell.leaked)
            said = f"policy check {check}: {name} broke it on {cell.broke} of {cell.n} requests{extra}{leaked}"
            yield said, "dim" if kept else "red" if cell.broke else "yellow"
    if summary.style is not None and hasattr(summary.style, "unusable"):
        yield f"style was not measured: {summary.style.unusable}", "yellow"
    elif summary.style is not None:
        for name, measured in summary.style.candidates.items():
            share = measured.share
            said = f"{share.mean:.1%} [{share.low:.1%}, {share.high:.1%}]" if share else "inconclusive"
            yield f"answers of {name} in the references' style: {said}"


def draw_verdict(verdict: VerdictSummary) -> Drawn:
    """The gates with their outcomes, and the verdict."""
    from rich.text import Text

    rows = [(gate.name, Text(gate.outcome, _COLOURS[gate.outcome]), gate.reason) for gate in verdict.gates]
    if rows:
        yield table(rows, "gate", "outcome", "why", title=f"gates for {verdict.candidate}")
    reason = f" ({verdict.reason})" if verdict.reason else ""
    yield Text.assemble("verdict: ", (verdict.verdict, f"bold {_COLOURS[verdict.verdict]}"), reason)
    for caution in verdict.cautions:
        yield caution, "yellow"
    if verdict.test_set_use > 1:
        yield f"{verdict.test_set_use} candidates have used these test rows, which widens the intervals", "dim"


def _draw_plan(planned: Plan) -> Drawn:
    for gate in planned.gates:
        yield planned.sentence(gate)
        needed = f"{gate.needed:,} rows" if gate.needed else "no number of rows"
        enough = f"{needed} in groups of this size would pass it with {planned.wanted_power:.0%}"
        yield f"  a true difference of {points(gate.lift)} points passes with {gate.power:.0%}; {enough}"
        assumed = "assumed, since a judge scores it" if planned.measured else "assumed: --between measures it"
        basis = "measured on the validation rows" if gate.measured else assumed
        yield f"  how the two differ is {basis}; rows of one group correlate by {gate.correlation:.2f}", "dim"
    if not planned.gates:
        yield "no gate compares two candidates, so there is nothing to plan"
    yield f"candidates that have used these test rows so far: {planned.test_set_uses}", "dim"


def _draw_comparison(comparison: Comparison) -> Drawn:
    first, second = comparison.first, comparison.second
    headings = ("metric", first.label, second.label, "difference, points", "won", "lost", "alike", "p (sign-flip)")
    rows = []
    for name, metric in comparison.metrics.items():
        means = [f"{side.metrics[name].mean:.1%}" for side in (first, second)]
        counts = (metric.wins, metric.losses, metric.ties)
        rows.append((name, *means, _gap(metric.difference), *counts, p_value(metric.sign_flip)))
    title = f"{second.label} against {first.label}, {comparison.n} requests"
    yield table(rows, *headings, title=title, right=range(1, 8))
    if comparison.changed_scorers:
        yield f"not compared, since the scorer has changed: {', '.join(comparison.changed_scorers)}"


def _draw_leaderboard(ranking: Leaderboard) -> Drawn:
    for board in ranking.boards:
        rows = []
        for one in board.versions:
            note = f"recalled: {one.recalled}" if one.recalled else one.alias or ""
            behind = _gap(one.behind) if one.behind else ""
            rows.append((one.version, one.approach, _measured(one), behind, one.verdict, note))
        headings = ("version", "approach", board.metric, "behind the first, points", "verdict", "")
        yield table(rows, *headings, title=board.title, right=(2, 3))
    if not ranking.boards:
        yield "no version is registered yet; `tunesmith run` registers what passes its gates"


def _measured(interval: MetricInterval, sign: str = "", unit: str = "%") -> Text:
    """A mean in percent, and its interval in the line below."""
    from rich.text import Text

    mean, low, high = (f"{each * 100:{sign}.1f}" for each in (interval.mean, interval.low, interval.high))
    return Text.assemble(f"{mean}{unit}\n", (f"[{low}, {high}]", "dim"))


def _gap(interval: MetricInterval) -> Text:
    return _measured(interval, "+", "")


def _draw_advice(evidence: EvidenceReport) -> Drawn:
    yield evidence.advice.headline, "bold"
    for sentence in evidence.advice.reasons:
        yield f"- {sentence}"
    for sentence in evidence.advice.cautions:
        yield f"! {sentence}", "yellow"


def _draw_requests(matrix: RequestMatrix) -> Drawn:
    from rich.table import Column

    chosen, counts = matrix.filter, matrix.changes
    title = f"{matrix.chosen} of {matrix.total} requests, {chosen['focus']} against {chosen['rival']}"
    yield table(
        ((row.id, row.request, row.change, *(f"{cell.score:.0%}" for cell in row.cells)) for row in matrix.rows),
        Column("row", no_wrap=True),
        "request",
        "change",
        *matrix.candidates,
        title=f"{title}: {counts['loss']} losses, {counts['win']} wins",
    )


def _draw_request(opened: OpenedRequest) -> Drawn:
    from rich.text import Text

    for role, text in [*opened.turns, ("reference", opened.reference)]:
        yield Text.assemble((f"{role}: ", "bold"), text)
    styles = {"added": "green underline", "removed": "red strike", "same": ""}
    for one in opened.answers:
        text = "withheld: it was made with something that you may not see" if one.text is None else one.text
        changes = one.changes if one.candidate != opened.compared else ()
        words = [(each.text, styles[each.kind]) for each in changes] or [(printable_line(text), "")]
        yield Text.assemble((f"{one.candidate} ({one.scores[opened.primary]:.0%}): ", "bold"), *words)
        if one.retrieved:
            yield f"from {', '.join(dict.fromkeys(each.source for each in one.retrieved))}", "dim"


def _draw_list(listed: services.evaluations.EvaluationList) -> Drawn:
    rows = []
    for one in listed.evaluations:
        best = f"{one.best} {one.score.mean:.1%}" if one.score else f"unreadable: {one.unreadable}"
        verdicts = ", ".join(f"{each.candidate}: {each.verdict}" for each in one.verdicts)
        versions = ", ".join(each.version for each in one.versions)
        rows.append((one.evaluation[7:19], one.at[:16], one.n, best, verdicts, versions, one.recalled or ""))
    title = f"{len(rows)} of {listed.total} evaluations"
    yield table(rows, "evaluation", "at", "requests", "best", "verdicts", "versions", "recalled", title=title)


def _draw_one(page: services.evaluations.EvaluationPage) -> Drawn:
    yield from draw_evaluation(page.summary)
    if page.verdict is not None:
        yield from draw_verdict(page.verdict)
    if page.recalled is not None:
        yield f"recalled: {page.recalled}", "bold red"
