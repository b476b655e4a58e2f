"""`held list|show|release|refuse`: answers that wait for a reviewer before they leave the server."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from tunesmith.cli.terminal import Acting, add_commands, draw_table, say

if TYPE_CHECKING:
    from rich.console import Console

    from tunesmith.services.held import HeldAnswerView, HeldList

Identifier = Annotated[str, typer.Argument(metavar="ID", help="The answer's id, which `held list` shows.")]
Reason = Annotated[str, typer.Option("--reason", help="Why; the audit log keeps it, and the caller sees it.")]


def register(app: typer.Typer) -> None:
    """Add the commands."""
    group = typer.Typer(no_args_is_help=True, help="Show answers that wait for a reviewer, and decide on them.")
    add_commands(group, show, release, refuse, list=list_held)
    app.add_typer(group, name="held")


def list_held(
    here: Acting,
    everything: Annotated[bool, typer.Option("--all", help="Decided ones too, until they are deleted.")] = False,
) -> None:
    """List held answers: your own, and those of your tenant and region if you may review."""
    from tunesmith.services import held

    by = here.acting
    found = held.list_held(by.store, by.user, everything=everything)
    if not by.user.may("answer.review") and not here.as_json:
        say(f"{by.actor} may not review answers, so only their own are listed: act as a steward or approver with --as")
    here.emit(found, _draw_list)


def show(here: Acting, identifier: Identifier) -> None:
    """Show a held answer; to reviewers with its conversation."""
    from tunesmith.services import held

    by = here.acting
    here.emit(held.show(by.store, by.user, identifier), _draw_answer)


def release(
    here: Acting,
    identifier: Identifier,
    reason: Reason = "",
    answer: Annotated[
        str | None, typer.Option("--answer", metavar="TEXT", help="An edited answer, which fits the version's schema.")
    ] = None,
) -> None:
    """Let an answer leave, as it is or edited."""
    from tunesmith.services import held

    decision = "release" if answer is None else "replace"
    found = here.do(held.decide, identifier=identifier, decision=decision, reason=reason, answer=answer)
    here.emit(found, _draw_decided)


def refuse(here: Acting, identifier: Identifier, reason: Reason = "") -> None:
    """Keep an answer from leaving."""
    from tunesmith.services import held

    here.emit(here.do(held.decide, identifier=identifier, decision="refuse", reason=reason), _draw_decided)


def _draw_list(console: Console, found: HeldList) -> None:
    if not found.held:
        console.print("no answer waits")
        return
    rows = [
        (one.id, one.version, one.caller, "; ".join(one.reasons), one.state, one.deadline, one.decided_by)
        for one in found.held
    ]
    draw_table(console, rows, "answer", "version", "caller", "held because", "state", "deadline", "decided by")


def _draw_answer(console: Console, one: HeldAnswerView) -> None:
    from tunesmith.core.text.display import printable

    lines = [
        f"{one.id} of {one.version}, asked by {one.caller} at {one.at}",
        f"held because: {'; '.join(one.reasons)}",
        f"{one.state}; the deadline is {one.deadline}, then: {one.at_deadline}",
        *([f"decided by {one.decided_by}: {one.reason}"] if one.decided_by else []),
        *(f"{turn.role}: {turn.text}" for turn in one.messages or ()),
        *([f"answer: {one.answer}"] if one.answer is not None else []),
        *([f"edited: {one.edited}"] if one.edited is not None else []),
    ]
    for line in lines:
        console.print(printable(line), markup=False, highlight=False, soft_wrap=True)


def _draw_decided(console: Console, one: HeldAnswerView) -> None:
    console.print(f"{one.id} is {one.state} by {one.decided_by}")
