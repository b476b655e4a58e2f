"""`requests`, `request` and `evaluations`: evaluations, and what candidates answered to their held-out requests."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from tunesmith import services
from tunesmith.cli.terminal import Acting, Drawn, Positive, add_commands, table
from tunesmith.core.text.display import printable_line

if TYPE_CHECKING:
    from tunesmith.services.answers import OpenedRequest, RequestMatrix
    from tunesmith.store.people.identities import User
    from tunesmith.store.store import Store

Evaluation = Annotated[str, typer.Option(metavar="DIGEST", help="The start of its digest; by default the newest one.")]


def register(app: typer.Typer) -> None:
    """Add the commands."""
    add_commands(app, requests, request, evaluations)


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
    store, user, digest = _which(here, evaluation)
    matrix = services.answers.show_requests(store, user, user.region, digest, wanted, first, most)
    here.emit(matrix, _draw_requests)


def request(here: Acting, row: str, *, evaluation: Evaluation = "", compared: str = "reference") -> None:
    """Show one held-out request with every candidate's answer, and how it differs from the reference.

    row: The row's id, as `requests` shows it.
    compared: What answers are compared with: reference, or a candidate.
    """
    store, user, digest = _which(here, evaluation)
    opened = services.answers.show_request(store, user, user.region, digest, row, {}, compared)
    here.emit(opened, _draw_request)


def evaluations(here: Acting, evaluation: str | None = None, *, page: Positive = 1) -> None:
    """List evaluations, newest first, or show one with the verdict on its best judged candidate.

    evaluation [DIGEST]: The start of one's digest: show it with its gates.
    page: 25 evaluations each.
    """
    if evaluation is None:
        acting = here.acting
        here.emit(services.evaluations.list_evaluations(acting.store, acting.user, page), _draw_list)
    else:
        here.emit(services.evaluations.show_evaluation(*_which(here, evaluation)), _draw_one)


def _which(here: Acting, evaluation: str) -> tuple[Store, User, str]:
    """The store, the acting user, and the digest of the evaluation that is meant."""
    acting = here.acting
    store, user = acting.store, acting.user
    if evaluation:
        return store, user, store.find_record(evaluation)
    return store, user, services.evaluations.newest_evaluation(store, user)


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
    from tunesmith.cli.evaluation import draw_evaluation, draw_verdict

    yield from draw_evaluation(page.summary)
    if page.verdict is not None:
        yield from draw_verdict(page.verdict)
    if page.recalled is not None:
        yield f"recalled: {page.recalled}", "bold red"
