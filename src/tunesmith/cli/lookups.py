"""`evaluations`, `recalls` and `notice`: what the console lists and shows, on the command line."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from tunesmith.cli.terminal import Acting, Here, Region, Tenant, add_commands, draw_table, printed_text

if TYPE_CHECKING:
    from rich.console import Console

    from tunesmith.services.evaluation_lookups import EvaluationList, EvaluationPage
    from tunesmith.services.monitoring import RecallList


def register(app: typer.Typer) -> None:
    """Add the commands."""
    add_commands(app, evaluations, recalls, notice)


def evaluations(
    here: Acting,
    evaluation: Annotated[
        str | None, typer.Argument(metavar="[DIGEST]", help="The start of one's digest: show it with its gates.")
    ] = None,
    page: Annotated[int, typer.Option(min=1, help="25 evaluations each.")] = 1,
) -> None:
    """List evaluations, newest first, or show one with the verdict on its best judged candidate."""
    from tunesmith.services import evaluation_lookups

    acting = here.acting
    store, user = acting.store, acting.user
    if evaluation is None:
        here.emit(evaluation_lookups.list_evaluations(store, user, page), _draw_list)
    else:
        here.emit(evaluation_lookups.show_evaluation(store, user, store.find_record(evaluation)), _draw_one)


def recalls(here: Here) -> None:
    """List what was recalled and why, newest first."""
    from tunesmith.services import monitoring

    here.emit(monitoring.list_recalls(here.store), _draw_recalls)


def notice(
    here: Here,
    version: Annotated[str, typer.Argument(help="NAME@v3, NAME@champion, or the start of a version's digest.")],
    tenant: Tenant = None,
    region: Region = None,
) -> None:
    """Print what the licences of a version's rows ask for (NOTICE.md)."""
    from tunesmith.core.scope import Scope
    from tunesmith.registry.versions import resolve
    from tunesmith.services.versions import notice_of

    store = here.store
    found = resolve(store, version, scope=Scope(tenant or "", region or ""))
    here.emit({"version": found.label, "notice": (text := notice_of(store, found))}, printed_text(text))


def _draw_list(console: Console, found: EvaluationList) -> None:
    rows = [
        (
            one.evaluation[7:19],
            one.at[:16],
            one.n,
            f"{one.best} {one.score.mean:.1%}",
            ", ".join(f"{verdict.candidate}: {verdict.verdict}" for verdict in one.verdicts),
            ", ".join(version.version for version in one.versions),
            one.recalled or "",
        )
        for one in found.evaluations
    ]
    title = f"{len(rows)} of {found.total} evaluations"
    draw_table(console, rows, "evaluation", "at", "requests", "best", "verdicts", "versions", "recalled", title=title)


def _draw_one(console: Console, found: EvaluationPage) -> None:
    from tunesmith.cli.evaluation import draw_evaluation, draw_verdict

    draw_evaluation(console, found.summary)
    if found.verdict is not None:
        draw_verdict(console, found.verdict)
    if found.recalled is not None:
        console.print(f"recalled: {found.recalled}", style="bold red")


def _draw_recalls(console: Console, found: RecallList) -> None:
    rows = [(one.cause, one.reason, one.at[:16], one.records) for one in found.recalls]
    draw_table(console, rows, "recalled", "why", "at", "records")
