"""`monitor`, `impact`, `recall` and `cases`: watch traffic, withdraw data and versions, collect failed requests."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from tunesmith.cli.terminal import Acting, Here, add_commands, draw_table, printed, say

if TYPE_CHECKING:
    from rich.console import Console

    from tunesmith.monitoring.drift import Report
    from tunesmith.monitoring.pending_retrains import PendingRetrain
    from tunesmith.monitoring.recall import Recall
    from tunesmith.monitoring.recall_status import RecallStatus
    from tunesmith.services.monitoring import Impact, PendingRetrains
    from tunesmith.services.review import AddedCases, CaseList

_All = Annotated[bool, typer.Option("--all", help="Also those that were answered correctly.")]
_EXITS = {"stable": 0, "drift": 3, "inconclusive": 4}


def register(app: typer.Typer) -> None:
    """Add the commands."""
    add_commands(app, monitor, impact, recall)
    cases = typer.Typer(help="Turn requests that failed in service into test rows.", no_args_is_help=True)
    add_commands(cases, show=show_cases, correct=correct_case, add=add_cases, drop=drop_cases)
    app.add_typer(cases, name="cases")


def monitor(
    here: Here,
    which: Annotated[
        str | None,
        typer.Argument(metavar="[VERSION]", help="NAME@champion or NAME@v3; by default the project's champion."),
    ] = None,
    hours: Annotated[
        float | None, typer.Option("--hours", min=0.001, help="The window; by default the project's.")
    ] = None,
    tenant: Annotated[str | None, typer.Option("--tenant", help="Look at one tenant's requests only.")] = None,
) -> None:
    """Compare served requests with the test split. Exit code 3: they drifted; 4: too few requests to say.

    Also lists champions that may not serve, and the retrains that recalls left pending (`recall --pending`). These do
    not change the exit code.
    """
    from tunesmith.services import monitoring

    found, label = monitoring.monitor(here.project, which, hours=hours, tenant=tenant)

    def draw(console: Console, result: monitoring.Monitored) -> None:
        _draw_report(console, label, result)
        for champion in result.refused_champions:
            console.print(champion.warning, style="bold red")
        _draw_pending(console, result.pending_retrains)

    here.emit(found, draw)
    raise typer.Exit(_EXITS[found.verdict])


def impact(
    here: Here,
    base: Annotated[str, typer.Argument(help="As tunesmith.yaml names it, or the start of its record's digest.")],
) -> None:
    """List every version, alias and tenant that depends on a base, and the requests that each version answered."""
    from tunesmith.services import monitoring

    here.emit(monitoring.impact(here.store, base), _draw_impact)


def recall(
    here: Acting,
    reason: Annotated[str, typer.Option("--reason", help="Why; kept in the audit log and shown by refusals.")] = "",
    row: Annotated[str | None, typer.Option("--row", metavar="ID", help="An example's id.")] = None,
    source: Annotated[str | None, typer.Option("--source", help="A source, as `data show` names it.")] = None,
    licence: Annotated[str | None, typer.Option("--licence", help="All rows whose licence needs this one.")] = None,
    subject: Annotated[str | None, typer.Option("--subject", help="All rows about a person.")] = None,
    version: Annotated[str | None, typer.Option("--version", help="NAME@v3 or the start of its digest.")] = None,
    base: Annotated[str | None, typer.Option("--base", help="The start of a base record's digest.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Change nothing; show what a recall would reach.")] = False,
    check: Annotated[
        bool, typer.Option("--check", help="Show whether what was recalled is gone (exit 3: it is not).")
    ] = False,
    pending: Annotated[
        bool, typer.Option("--pending", help="List names whose recalled version is not replaced yet (exit 3: some).")
    ] = False,
) -> None:
    """Withdraw something and everything made from it, so that it is no longer served or built on.

    The next `tunesmith run` builds, trains and measures again without the rows, even if the sources still hold them.
    """
    from tunesmith.core.errors import UsageError
    from tunesmith.services import monitoring

    given = {"row": row, "source": source, "licence": licence, "subject": subject, "version": version, "base": base}
    named = {kind: value for kind, value in given.items() if value is not None}
    if pending:
        if named or dry_run or check or reason:
            raise UsageError("--pending only lists, and takes no other options", fix="tunesmith recall --pending")
        listed = monitoring.list_pending_retrains(here.store)
        here.emit(listed, _draw_pending_list)
        raise typer.Exit(3 if listed.pending_retrains else 0)
    if len(named) != 1:
        options = ", ".join(f"--{kind}" for kind in given)
        raise UsageError(f"name exactly one thing to recall, not {len(named)}", fix=f"one of {options}")
    ((kind, value),) = named.items()
    if check:
        store = here.store
        status = monitoring.recall_status_of(store, monitoring.cause_of(store, kind, value))
        here.emit(status, _draw_status)
        raise typer.Exit(0 if status.gone else 3)
    found = here.do(monitoring.recall, kind=kind, value=value, reason=reason, dry_run=dry_run)
    here.emit(found, _draw_recall)
    for line in found.next:
        say(line)


def show_cases(here: Here, everything: _All = False) -> None:
    """Show the requests that callers asked to keep and that wait for a review."""
    from tunesmith.services import review

    here.emit(review.list_cases(here.project.store, everything=everything), _draw_cases)


def add_cases(
    here: Acting,
    target: Annotated[Path, typer.Argument(help="A JSONL source of the project; created if it does not exist.")],
    licence: Annotated[str, typer.Option("--licence", help="SPDX expression of the requests' licence.")],
    everything: _All = False,
) -> None:
    """Append the cases to a source file, each with its origin; `data build` then reads them."""
    from tunesmith.services import review

    added = here.do(review.add_cases, target=target, licence=licence, everything=everything)
    here.emit(added, _draw_added)


def correct_case(
    here: Acting,
    request: Annotated[str, typer.Argument(help="The id of a request, as `cases show` lists it.")],
    expected: Annotated[str, typer.Option("--expected", help="What the answer should have been.")],
) -> None:
    """Say what the answer to a case should have been; cases without that are not added to a source."""
    from tunesmith.services import review

    case = here.do(review.correct_case, request=request, expected=expected)
    here.emit(case, printed(f"{request} is corrected"))


def drop_cases(
    here: Acting, requests: Annotated[list[str], typer.Argument(help="Ids of requests, as `cases show` lists them.")]
) -> None:
    """Delete cases, with their texts."""
    from tunesmith.services import review

    dropped = here.do(review.drop_cases, requests=requests)
    here.emit(dropped, printed(f"{dropped.dropped} dropped"))


def _draw_impact(console: Console, found: Impact) -> None:
    rows = [
        (one.version, " ".join(filter(None, (one.tenant, one.region))), ", ".join(one.aliases), one.requests, one.last)
        for one in found.versions
    ]
    draw_table(console, rows, "version", "made for", "aliases", "requests", "last", title=found.spec)
    tenants = ", ".join(tenant or "no tenant" for tenant in found.tenants)
    console.print(f"{found.adapters} trained weights; tenants: {tenants or 'none'}", soft_wrap=True, highlight=False)


def _draw_report(console: Console, label: str, report: Report) -> None:
    console.print(f"{label}: {report.verdict} ({report.reason})")
    console.print(f"  {report.requests} requests, {report.since} to {report.until}")
    for tenant, count in report.capped.items():
        console.print(f"  {count} requests of tenant {tenant!r} left out: more than the allowed share")
    for finding in report.findings:
        p_value = "" if finding.p_value is None else f" (KS p = {finding.p_value:.2g})"
        console.print(f"  {finding.outcome:<12} {finding.reason}{p_value}")
    if report.recommendation:
        console.print(f"  {report.recommendation}")


def _draw_pending_list(console: Console, found: PendingRetrains) -> None:
    _draw_pending(console, found.pending_retrains)
    if not found.pending_retrains:
        console.print("no retrain is pending")


def _draw_pending(console: Console, pending: Sequence[PendingRetrain]) -> None:
    for one in pending:
        serves = f"{one.serves} serves" if one.answers else "nothing serves"
        made = f"{one.replacement} was made without it" if one.replacement else "a new version is needed"
        console.print(f"retrain pending: {one.name}{one.scope.said}: {one.version} was recalled, {made}; {serves}")
        console.print(f"  by {', '.join(one.causes)}")
        for step in one.next:
            console.print(f"  next: {step}")


def _draw_status(console: Console, status: RecallStatus) -> None:
    _draw_near(console, status.near)
    console.print(f"{status.cause}: {'gone' if status.gone else 'not gone'}", soft_wrap=True)
    for line in status.left:
        console.print(f"  {line}")
    for name, label in status.replaced.items():
        console.print(f"  {name}: {label} does not contain it")
    for name in status.retrain:
        console.print(f"  {name}: nothing replaces it yet: `tunesmith run`")
    for licence in status.other_licences:
        console.print(f"  {licence}: not withdrawn, since it does not need it")


def _draw_near(console: Console, near: Sequence[str]) -> None:
    for name in near:
        console.print(f"not withdrawn, and may mean the same: {name}", soft_wrap=True)


def _draw_recall(console: Console, found: Recall) -> None:
    verb = "withdrew" if found.done else "would withdraw"
    console.print(f"{verb} {found.cause} ({found.reason}); {len(found.reached)} records:")
    for one in found.reached:
        rows = ", ".join(f"{count} in {split}" for split, count in one.rows.items() if count)
        console.print(f"  {one.kind:<11} {one.label}{f': {rows}' if rows else ''}")
    for alias in found.aliases:
        scope = " ".join(filter(None, (alias.tenant and f"tenant {alias.tenant}", alias.region)))
        console.print(f"  alias       {alias.name}@{alias.alias} {scope}".rstrip())
    for served in found.served:
        tenant = f"tenant {served.tenant}" if served.tenant else "no tenant"
        console.print(f"  answered    {served.requests} requests of {tenant}, the last {served.last}")
    for number in found.rollouts:
        console.print(f"  rollout     {number}: {'aborted' if found.done else 'would be aborted'}")
    _draw_near(console, found.near)


def _draw_cases(console: Console, found: CaseList) -> None:
    from tunesmith.core.text.wording import visible

    for case in found.cases:
        scores = ", ".join(f"{metric} {value:.2f}" for metric, value in case.scores.items())
        console.print(f"{case.request}  {case.at}  {case.by}  {scores}", style="dim")
        console.print(f"  asked: {visible(case.messages[-1].content)}")
        console.print("  it failed" if case.answer is None else f"  answered: {visible(case.answer)}")
        if case.expected is None:
            console.print(f"  nobody said what was expected: tunesmith cases correct {case.request} --expected TEXT")
        else:
            console.print(f"  expected: {visible(case.expected)}")
        console.print(f"  deleted after {case.until}", style="dim")
    if not found.cases:
        console.print('no cases: with `cases:` in the project file, callers make them with "store" or "keep": true')


def _draw_added(console: Console, added: AddedCases) -> None:
    console.print(f"{added.added} cases added to {added.source}")
    if added.without_answer:
        console.print(f"{added.without_answer} left, whose expected answer nobody said: tunesmith cases correct")
    if not added.named:
        console.print("add the file to tunesmith.yaml, under data.sources, so that its rows are held out:")
        console.print(f"  - {{path: {added.source}, split: test}}")
    console.print("then run `tunesmith data build`; existing measurements still refer to the earlier rows")
