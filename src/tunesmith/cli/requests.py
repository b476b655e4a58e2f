"""`requests` and `request`: an evaluation's held-out requests by candidates, and one of them with all answers."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from tunesmith.cli.terminal import Acting, add_commands

if TYPE_CHECKING:
    from rich.console import Console

    from tunesmith.services.held_out_requests import OpenedRequest, RequestMatrix
    from tunesmith.store.people.identities import User
    from tunesmith.store.store import Store

Evaluation = Annotated[
    str, typer.Option("--evaluation", metavar="DIGEST", help="The start of its digest; by default the newest one.")
]


def register(app: typer.Typer) -> None:
    """Add the commands."""
    add_commands(app, requests, request)


def requests(
    here: Acting,
    evaluation: Evaluation = "",
    focus: Annotated[str, typer.Option(help="The candidate; by default the best tuned one.")] = "",
    rival: Annotated[str, typer.Option(help="What it is compared with; by default the best untuned one.")] = "",
    metric: Annotated[str, typer.Option(help="By default the primary metric.")] = "",
    show: Annotated[str, typer.Option(help="all, flips, wins, losses, invalid or long.")] = "all",
    group: Annotated[str, typer.Option(help="Only groups whose name begins so.")] = "",
    label: Annotated[str, typer.Option(metavar="KEY=VALUE", help="Only rows with this label.")] = "",
    search: Annotated[str, typer.Option(help="Only requests with this text in a request or an answer.")] = "",
    first: Annotated[int, typer.Option(min=0, help="The place to begin at.")] = 0,
    most: Annotated[int, typer.Option(min=1, max=1000, help="Requests to show.")] = 20,
) -> None:
    """Show held-out requests by candidates: where a candidate got worse first, then where it got better."""
    from tunesmith.services import held_out_requests

    given = {"focus": focus, "rival": rival, "metric": metric, "show": show}
    given |= {"group": group, "label": label, "search": search}
    store, user, digest = _which(here, evaluation)
    found = held_out_requests.show_requests(store, user, user.region, digest, given, first, most)
    here.emit(found, _draw_requests)


def request(
    here: Acting,
    row: Annotated[str, typer.Argument(metavar="ROW", help="The row's id, as `requests` shows it.")],
    evaluation: Evaluation = "",
    compared: Annotated[
        str, typer.Option(help="What answers are compared with: reference, or a candidate.")
    ] = "reference",
) -> None:
    """Show one held-out request with every candidate's answer, and how it differs from the reference."""
    from tunesmith.services import held_out_requests

    store, user, digest = _which(here, evaluation)
    here.emit(held_out_requests.show_request(store, user, user.region, digest, row, {}, compared), _draw_request)


def _which(here: Acting, evaluation: str) -> tuple[Store, User, str]:
    """The store, the acting user, and the digest of the evaluation that is meant."""
    from tunesmith.services import evaluation_lookups

    acting = here.acting
    store, user = acting.store, acting.user
    return (
        store,
        user,
        store.find_record(evaluation) if evaluation else evaluation_lookups.newest_evaluation(store, user),
    )


def _draw_requests(console: Console, found: RequestMatrix) -> None:
    from rich.table import Table

    chosen, counts = found.filter, found.changes
    title = f"{found.chosen} of {found.total} requests, {chosen['focus']} against {chosen['rival']}"
    table = Table(title=f"{title}: {counts['loss']} losses, {counts['win']} wins", title_justify="left")
    table.add_column("row", no_wrap=True)
    for heading in ("request", "change", *found.candidates):
        table.add_column(heading, overflow="fold")
    for row in found.rows:
        table.add_row(row.id, row.request, row.change, *(f"{cell.score:.0%}" for cell in row.cells))
    console.print(table)


def _draw_request(console: Console, found: OpenedRequest) -> None:
    from rich.text import Text

    for role, text in found.turns:
        console.print(Text(f"{role}: ", "bold"), Text(text))
    console.print(Text("reference: ", "bold"), Text(found.reference))
    for one in found.answers:
        console.print(Text(f"{one.candidate} ({one.scores[found.primary]:.0%}): ", "bold"), end="")
        if one.text is None:
            console.print("withheld: it was made with something that you may not see")
            continue
        styles = {"added": "green underline", "removed": "red strike", "same": ""}
        changed = one.candidate != found.compared and one.changes
        console.print(Text.assemble(*((each.text, styles[each.kind]) for each in one.changes)) if changed else one.text)
        if one.retrieved:
            console.print(f"from {', '.join(dict.fromkeys(each.source for each in one.retrieved))}", style="dim")
