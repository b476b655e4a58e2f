"""`held list|show|release|refuse`: answers that wait for a reviewer before they leave the server."""

from __future__ import annotations

from typing import Annotated

import typer

from tunesmith import services
from tunesmith.cli.terminal import Acting, Drawn, add_commands, add_group, say, table

Identifier = Annotated[str, typer.Argument(metavar="ID", help="The answer's id, which `held list` shows.")]
Reason = Annotated[str, typer.Option(help="Why; the audit log keeps it, and the caller sees it.")]


def register(app: typer.Typer) -> None:
    """Add the commands."""
    group = add_group(app, "held", "Show answers that wait for a reviewer, and decide on them.")
    add_commands(group, show, release, refuse, list=list_held)


def list_held(here: Acting, everything: Annotated[bool, typer.Option("--all")] = False) -> None:
    """List held answers: your own, and those of your tenant and region if you may review.

    everything: Decided ones too, until they are deleted.
    """
    by = here.acting
    listed = services.review.list_held(by.store, by.user, everything=everything)
    if not by.user.may("answer.review") and not here.as_json:
        say(f"{by.actor} may not review answers, so only their own are listed: act as a steward or approver with --as")
    here.emit(listed, _draw_list)


def show(here: Acting, identifier: Identifier) -> None:
    """Show a held answer; to reviewers with its conversation."""
    by = here.acting
    here.emit(services.review.show_held(by.store, by.user, identifier), _draw_answer)


def release(here: Acting, identifier: Identifier, *, reason: Reason = "", answer: str | None = None) -> None:
    """Let an answer leave, as it is or edited.

    answer TEXT: An edited answer, which fits the version's schema.
    """
    _decide(here, "release" if answer is None else "replace")


def refuse(here: Acting, identifier: Identifier, reason: Reason = "") -> None:
    """Keep an answer from leaving."""
    _decide(here, "refuse")


def _decide(here: Acting, decision: str) -> None:
    done = here.do(services.review.decide_held, decision=decision)
    here.emit(done, f"{done.id} is {done.state} by {done.decided_by}")


def _draw_list(listed: services.review.HeldList) -> Drawn:
    rows = [
        (one.id, one.version, one.caller, "; ".join(one.reasons), one.state, one.deadline, one.decided_by)
        for one in listed.held
    ]
    headings = ("answer", "version", "caller", "held because", "state", "deadline", "decided by")
    yield table(rows, *headings) if rows else "no answer waits"


def _draw_answer(one: services.review.HeldAnswerView) -> Drawn:
    yield f"{one.id} of {one.version}, asked by {one.caller} at {one.at}"
    yield f"held because: {'; '.join(one.reasons)}"
    yield f"{one.state}; the deadline is {one.deadline}, then: {one.at_deadline}"
    if one.decided_by:
        yield f"decided by {one.decided_by}: {one.reason}"
    for turn in one.messages or ():
        yield f"{turn.role}: {turn.text}"
    if one.answer is not None:
        yield f"answer: {one.answer}"
    if one.edited is not None:
        yield f"edited: {one.edited}"
