"""`erase`: delete the texts of rows."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

import typer

from tunesmith import services
from tunesmith.cli.monitoring import only_one
from tunesmith.cli.terminal import Acting, Drawn, Here, add_commands, add_group, table

if TYPE_CHECKING:
    from tunesmith.monitoring.erasure import Plan

_CAUSES = ("subject", "source", "licence", "tenant", "row", "recall")


def register(app: typer.Typer) -> None:
    """Add the commands."""
    group = add_group(app, "erase", "Delete the texts of a person, a source or what was recalled.")
    add_commands(group, plan=plan_erasure, confirm=confirm_erasure, list=list_erasures)


def plan_erasure(
    here: Acting,
    *,
    reason: str,
    subject: str | None = None,
    source: str | None = None,
    licence: str | None = None,
    tenant: str | None = None,
    row: str | None = None,
    recall: str | None = None,
    weights: Literal["keep", "erase"] = "keep",
    kept_until: str = "",
) -> None:
    """List every place that holds the texts, for a second person to confirm. Deletes nothing.

    reason: Why; kept in the audit log.
    subject: All rows about a person.
    source: A source, as `data show` names it.
    licence: All rows whose licence needs this one.
    tenant: All that is of a tenant: rows, documents, kept requests, held answers, uploaded files.
    row ID: An example's id.
    recall: What was recalled, as `recalls` lists it: "subject C-1042".
    weights: Whether weights that learned the rows are deleted, too.
    kept_until: Until when backups, logs and replicas of the database are kept.
    """
    kind, value = only_one(here.given, _CAUSES, "erase")
    here.show(services.erasure.plan, _draw, kind=kind, value=value)


def confirm_erasure(here: Acting, erasure: int) -> None:
    """Erase what another person planned, with your signature. What is erased cannot be brought back.

    erasure: The number of the plan.
    """
    here.show(services.erasure.confirm, _draw)


def list_erasures(here: Here) -> None:
    """List plans and erasures, newest first."""
    here.emit(services.erasure.list_erasures(here.store), lambda listed: (_row(each) for each in listed.erasures))


def _row(plan: Plan) -> str:
    by = f", confirmed by {plan.confirmed_by}" if plan.confirmed_by else ""
    what = f"{plan.cause}, rows: {len(plan.rows)}, planned by {plan.planned_by}{by}"
    return f"{plan.number}  {plan.at[:10]}  {plan.state:<8} {what}"


def _draw(plan: Plan) -> Drawn:
    yield _row(plan)
    yield table(
        [(each.place, each.count, f"{each.bytes:,}") for each in plan.places], "place", "number", "bytes", right=(1, 2)
    )
    yield from plan.notices
    if plan.state == "planned":
        yield f"nothing is deleted; a second person confirms: `tunesmith erase confirm {plan.number}`"
