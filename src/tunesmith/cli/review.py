"""`review` and `held`: rows and kept requests that people accept, edit or reject; answers that wait for a reviewer."""

from __future__ import annotations

from typing import Annotated, Literal

import typer

from tunesmith import services
from tunesmith.cli.terminal import Acting, Drawn, Positive, add_commands, add_group, say, table

Identifier = Annotated[str, typer.Argument(metavar="ID", help="The answer's id, which `held list` shows.")]
Reason = Annotated[str, typer.Option(help="Why; the audit log keeps it, and the caller sees it.")]
_Number = Annotated[int, typer.Argument(min=1, help="The item's number, as `review list` names it.")]


def register(app: typer.Typer) -> None:
    """Add the commands."""
    group = add_group(app, "review", "Review flagged rows and kept requests.")
    add_commands(group, fill, show, decide, export, list=list_items)
    group = add_group(app, "held", "Show answers that wait for a reviewer, and decide on them.")
    add_commands(group, release, refuse, show=show_held, list=list_held)


def fill(
    here: Acting,
    dataset: str | None = None,
    *,
    reviewers: Annotated[int, typer.Option(min=1, max=2)] = 1,
    pseudonyms: Annotated[bool, typer.Option()] = False,
    search: str = "",
) -> None:
    """Add rows that `data quality` flagged, conflicts, near duplicates and failed requests to the review queue.

    dataset: A dataset version's digest or its start; by default the newest.
    reviewers: How many people decide on each item.
    pseudonyms: Also rows that hold a pseudonym.
    search TEXT: Also training and validation rows with this text.
    """
    here.show(services.review.fill, _draw_filled)


def list_items(
    here: Acting,
    *,
    state: Literal["waiting", "open", "conflict", "accept", "edit", "reject", "all"] = "waiting",
    page: Positive = 1,
) -> None:
    """List items of the review queue, and how far two reviewers agree.

    state: Which items.
    page: 25 items each.
    """
    here.emit(services.review.list_items(here.acting, state=state, page=page), _draw_list)


def show(here: Acting, item: _Number) -> None:
    """Show an item with its text and decisions."""
    here.emit(services.review.show(here.acting, item), _draw_item)


def decide(
    here: Acting,
    item: _Number,
    decision: Literal["accept", "edit", "reject"],
    *,
    reason: str = "",
    answer: str | None = None,
) -> None:
    """Accept, edit or reject an item. The audit log records it without the text.

    decision: What is to become of the row.
    reason: Why; a rejection needs it.
    answer: The last turn as it should be, for an edit.
    """
    seen = services.review.show(here.acting, item)
    contents = None if answer is None else [*(turn.content for turn in seen.messages[:-1]), answer]
    done = here.do(services.review.decide, contents=contents, revision=seen.revision)
    here.emit(done, f"item {item}: {done.state}")


def export(here: Acting) -> None:
    """Write the decisions for the next `data build`, and carry out those on kept requests."""
    here.show(services.review.export, _draw_exported)


def list_held(here: Acting, everything: Annotated[bool, typer.Option("--all")] = False) -> None:
    """List held answers: your own, and those of your tenant and region if you may review.

    everything: Decided ones too, until they are deleted.
    """
    by = here.acting
    listed = services.review.list_held(by, everything=everything)
    if not by.user.may("answer.review") and not here.as_json:
        say(f"{by.actor} may not review answers, so only their own are listed: act as a steward or approver with --as")
    here.emit(listed, _draw_held)


def show_held(here: Acting, identifier: Identifier) -> None:
    """Show a held answer; to reviewers with its conversation."""
    here.emit(services.review.show_held(here.acting, identifier), _draw_held_answer)


def release(here: Acting, identifier: Identifier, *, reason: Reason = "", answer: str | None = None) -> None:
    """Let an answer leave, as it is or edited.

    answer TEXT: An edited answer, which fits the version's schema.
    """
    _decide_held(here, "release" if answer is None else "replace")


def refuse(here: Acting, identifier: Identifier, reason: Reason = "") -> None:
    """Keep an answer from leaving."""
    _decide_held(here, "refuse")


def _decide_held(here: Acting, decision: str) -> None:
    done = here.do(services.review.decide_held, decision=decision)
    here.emit(done, f"{done.id} is {done.state} by {done.decided_by}")


def _draw_filled(filled: services.review.FilledQueue) -> Drawn:
    for why, number in filled.found.items():
        yield f"{why}: {number}"
    yield f"{filled.added} added; {filled.waiting} wait for a review"
    if not filled.found:
        yield "nothing is flagged: `tunesmith data quality VERSION` looks for rows to review"


def _draw_list(listed: services.review.ReviewList) -> Drawn:
    rows = [(one.item, one.state, one.kind, one.subject, "; ".join(one.why)) for one in listed.items]
    yield table(rows, "item", "state", "kind", "of", "why")
    yield f"page {listed.page} of {listed.pages}; " + ", ".join(f"{n} {name}" for name, n in listed.counts.items())
    for one in listed.agreements:
        kappa = "too few or too alike for kappa"
        if one.kappa is not None:
            kappa = f"kappa {one.kappa:.2f}, 95% interval {one.low:.2f} to {one.high:.2f}"
        yield f"{' and '.join(one.reviewers)}: the same on {one.same} of {one.items} items ({kappa})"


def _draw_item(item: services.review.ReviewItem) -> Drawn:
    yield f"item {item.item}: {item.state}, {item.kind} {item.subject}, revision {item.revision}"
    for why, detail in item.why.items():
        yield f"  {why}: {detail}"
    for turn in item.messages:
        yield f"  {turn.role}: {turn.text}"
    for one in item.decisions:
        yield f"{one.at} {one.reviewer}: {one.decision} {one.reason}"
        for turn in one.messages:
            yield f"  {turn.role}: {turn.text}"


def _draw_exported(done: services.review.ExportedReview) -> Drawn:
    yield f"{done.file}: {done.accept} accepted, {done.edit} edited, {done.reject} rejected rows"
    if not done.named:
        yield f"name it in tunesmith.yaml, so that builds read it: data: {{review: {done.file}}}"
    if done.cases:
        yield f"{done.cases} kept requests can become rows: tunesmith cases add data/cases.jsonl --licence ..."
    if done.dropped:
        yield f"{done.dropped} rejected requests were deleted"


def _draw_held(listed: services.review.HeldList) -> Drawn:
    rows = [
        (one.id, one.version, one.caller, "; ".join(one.reasons), one.state, one.deadline, one.decided_by)
        for one in listed.held
    ]
    headings = ("answer", "version", "caller", "held because", "state", "deadline", "decided by")
    yield table(rows, *headings) if rows else "no answer waits"


def _draw_held_answer(one: services.review.HeldAnswerView) -> Drawn:
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
