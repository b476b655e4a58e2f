"""`tunesmith review`: rows and kept requests that people accept, edit or reject."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Literal

import typer

from tunesmith.cli.terminal import Acting, add_commands, draw_table, printed

if TYPE_CHECKING:
    from rich.console import Console

    from tunesmith.services.review import ExportedReview, FilledQueue, ReviewItem, ReviewList

_Number = Annotated[int, typer.Argument(min=1, help="The item's number, as `review list` names it.")]


def register(app: typer.Typer) -> None:
    """Add the `review` commands."""
    review = typer.Typer(help="Review flagged rows and kept requests.", no_args_is_help=True)
    add_commands(review, fill, show, decide, export, list=list_items)
    app.add_typer(review, name="review")


def fill(
    here: Acting,
    dataset: Annotated[
        str | None, typer.Argument(help="A dataset version's digest or its start; by default the newest.")
    ] = None,
    reviewers: Annotated[int, typer.Option(min=1, max=2, help="How many people decide on each item.")] = 1,
    pseudonyms: Annotated[bool, typer.Option(help="Also rows that hold a pseudonym.")] = False,
    search: Annotated[str, typer.Option(metavar="TEXT", help="Also training and validation rows with this text.")] = "",
) -> None:
    """Add rows that `data quality` flagged, conflicts, near duplicates and failed requests to the review queue."""
    from tunesmith.services import review

    asked = here.do(review.fill, dataset=dataset, reviewers=reviewers, pseudonyms=pseudonyms, search=search)
    here.emit(asked, _draw_filled)


def list_items(
    here: Acting,
    state: Annotated[
        Literal["waiting", "open", "conflict", "accept", "edit", "reject", "all"], typer.Option(help="Which items.")
    ] = "waiting",
    page: Annotated[int, typer.Option(min=1, help="25 items each.")] = 1,
) -> None:
    """List items of the review queue, and how far two reviewers agree."""
    from tunesmith.services import review

    here.emit(review.list_items(here.store, state=state, page=page, actor=here.actor), _draw_list)


def show(here: Acting, item: _Number) -> None:
    """Show an item with its text and decisions."""
    from tunesmith.services import review

    here.emit(review.show(here.store, item, actor=here.actor), _draw_item)


def decide(
    here: Acting,
    item: _Number,
    decision: Annotated[Literal["accept", "edit", "reject"], typer.Argument(help="What is to become of the row.")],
    reason: Annotated[str, typer.Option(help="Why; a rejection needs it.")] = "",
    answer: Annotated[str | None, typer.Option(help="The last turn as it should be, for an edit.")] = None,
) -> None:
    """Accept, edit or reject an item. The audit log records it without the text."""
    from tunesmith.services import review

    seen = review.show(here.store, item, actor=here.actor)
    contents = None if answer is None else [*(turn.content for turn in seen.messages[:-1]), answer]
    revision = seen.revision
    done = here.do(review.decide, item=item, decision=decision, reason=reason, contents=contents, revision=revision)
    here.emit(done, printed(f"item {item}: {done.state}"))


def export(here: Acting) -> None:
    """Write the decisions for the next `data build`, and carry out those on kept requests."""
    from tunesmith.services import review

    here.emit(here.do(review.export), _draw_exported)


def _draw_filled(console: Console, found: FilledQueue) -> None:
    for why, number in found.found.items():
        console.print(f"{why}: {number}")
    console.print(f"{found.added} added; {found.waiting} wait for a review")
    if not found.found:
        console.print("nothing is flagged: `tunesmith data quality VERSION` looks for rows to review")


def _draw_list(console: Console, found: ReviewList) -> None:
    rows = [(one.item, one.state, one.kind, one.subject, "; ".join(one.why)) for one in found.items]
    draw_table(console, rows, "item", "state", "kind", "of", "why")
    console.print(
        f"page {found.page} of {found.pages}; " + ", ".join(f"{n} {name}" for name, n in found.counts.items())
    )
    for one in found.agreements:
        kappa = "too few or too alike for kappa"
        if one.kappa is not None:
            kappa = f"kappa {one.kappa:.2f}, 95% interval {one.low:.2f} to {one.high:.2f}"
        console.print(f"{' and '.join(one.reviewers)}: the same on {one.same} of {one.items} items ({kappa})")


def _draw_item(console: Console, item: ReviewItem) -> None:
    console.print(f"item {item.item}: {item.state}, {item.kind} {item.subject}, revision {item.revision}")
    for why, detail in item.why.items():
        console.print(f"  {why}: {detail}")
    for turn in item.messages:
        console.print(f"  {turn.role}: {turn.text}")
    for one in item.decisions:
        console.print(f"{one.at} {one.reviewer}: {one.decision} {one.reason}")
        for turn in one.messages:
            console.print(f"  {turn.role}: {turn.text}")


def _draw_exported(console: Console, done: ExportedReview) -> None:
    console.print(f"{done.file}: {done.accept} accepted, {done.edit} edited, {done.reject} rejected rows")
    if not done.named:
        console.print(f"name it in tunesmith.yaml, so that builds read it: data: {{review: {done.file}}}")
    if done.cases:
        console.print(f"{done.cases} kept requests can become rows: tunesmith cases add data/cases.jsonl --licence ...")
    if done.dropped:
        console.print(f"{done.dropped} rejected requests were deleted")
