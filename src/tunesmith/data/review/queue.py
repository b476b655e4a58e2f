"""The review queue: items that wait for people's decisions, kept in the database.

An item is a row of a dataset version, with its text at that time, or a kept request, whose text stays with its case.
One or two people decide on it. If two disagree, it is a conflict, which a third person or a steward settles. Each
decision names the item's revision that it was made on, so that two people at once lose nothing.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import NamedTuple

from sqlalchemy import ColumnElement, delete, func, select, update
from sqlalchemy.orm import Session

from tunesmith.core.clock import stamp
from tunesmith.core.errors import NextStep, NotThere, Refused, UsageError
from tunesmith.core.messages import Conversation, Message, Turns
from tunesmith.core.reading.strict_json import Fields, JsonObject
from tunesmith.data.review.decisions import Choice
from tunesmith.store.people.identities import require
from tunesmith.store.store import Store
from tunesmith.store.tables import ReviewDecisionRow, ReviewItemRow

ACTION = "row.review"
WAITING = ("open", "conflict")
STATES = (*WAITING, "accept", "edit", "reject")


class NewItem(NamedTuple):
    """Something to review. why: what was found -> detail; messages: a row's turns, empty for a case."""

    kind: str
    subject: str
    why: Mapping[str, str]
    dataset: str = ""
    split: str = ""
    messages: Turns = ()


class Decision(NamedTuple):
    """What one person decides. messages: all turns as they should be, for an edit."""

    choice: Choice
    reason: str = ""
    messages: Turns = ()


def add_items(store: Store, items: Iterable[NewItem], *, wanted: int, actor: str) -> int:
    """Add items that are not in the queue, whatever was decided on those that are; returns how many were added."""
    detail: JsonObject = {}
    with store.change(actor, "review.fill", "review", detail) as session:
        require(session, actor, ACTION)
        there = set(map(tuple, session.execute(select(ReviewItemRow.kind, ReviewItemRow.subject))))
        fresh = [one for one in items if (one.kind, one.subject) not in there]
        session.add_all(
            ReviewItemRow(
                **one._asdict() | {"why": dict(one.why), "messages": _coded(one.messages)}, wanted=wanted, state="open"
            )
            for one in fresh
        )
        detail |= {"added": len(fresh), "reviewers": wanted}
    return len(fresh)


def get_item(session: Session, number: int) -> tuple[ReviewItemRow, list[ReviewDecisionRow]]:
    """An item and its decisions, oldest first. Raises NotThere where there is none."""
    row = session.get(ReviewItemRow, number)
    if row is None:
        raise NotThere(f"there is no review item {number}", fix=NextStep("list the items", "review list"))
    query = select(ReviewDecisionRow).where(ReviewDecisionRow.item == number).order_by(ReviewDecisionRow.number)
    return row, list(session.scalars(query))


def list_items(store: Store, states: Sequence[str], skip: int, most: int) -> list[ReviewItemRow]:
    """Items in some states, oldest first."""
    chosen = select(ReviewItemRow).where(ReviewItemRow.state.in_(states)).order_by(ReviewItemRow.id)
    with store.reading() as session:
        return list(session.scalars(chosen.offset(skip).limit(most)))


def waiting_for(session: Session, reviewer: str, steward: bool) -> list[int]:
    """The numbers of the items that a person may decide on now, oldest first."""
    own = select(ReviewDecisionRow.item).where(ReviewDecisionRow.reviewer == reviewer)
    new = ReviewItemRow.state.in_(WAITING) & ReviewItemRow.id.not_in(own)
    query = select(ReviewItemRow.id).where(new | (ReviewItemRow.state == "conflict") if steward else new)
    return list(session.scalars(query.order_by(ReviewItemRow.id)))


def counts(session: Session) -> dict[str, int]:
    """State -> items."""
    query = select(ReviewItemRow.state, func.count()).group_by(ReviewItemRow.state)
    return dict.fromkeys(STATES, 0) | dict(session.execute(query).all())


def first_decisions(session: Session) -> dict[int, dict[str, str]]:
    """Item -> reviewer -> decision, for the items that two people decide on; without what settled conflicts."""
    query = (
        select(ReviewDecisionRow.item, ReviewDecisionRow.reviewer, ReviewDecisionRow.decision)
        .join(ReviewItemRow, ReviewItemRow.id == ReviewDecisionRow.item)
        .where(ReviewItemRow.wanted > 1, ReviewDecisionRow.settles.is_(False))
    )
    decided: dict[int, dict[str, str]] = {}
    for item, reviewer, decision in session.execute(query):
        decided.setdefault(item, {})[reviewer] = decision
    return decided


def decide(store: Store, number: int, decision: Decision, *, revision: int, actor: str) -> ReviewItemRow:
    """Record a person's decision; returns the item with its new state.

    revision: that of the item which they saw. Raises Refused if the item changed since, if they decided before, or may
    not review; UsageError for an unknown item, a rejection without a reason, and an edit that adds or drops turns.
    """
    if decision.choice == "reject" and not decision.reason.strip():
        raise UsageError("a rejection needs a reason", fix="say why the row must not be learned")
    detail: JsonObject = {"item": number, "decision": decision.choice}
    with store.reading() as session:
        row, _ = get_item(session, number)
    with store.change(actor, "review.decide", f"{row.kind} {row.subject}", detail) as session:
        user = require(session, actor, ACTION)
        row, before = get_item(session, number)
        settles = row.state == "conflict"
        _check_may(row, before, actor, revision, steward="steward" in user.roles)
        session.add(
            ReviewDecisionRow(
                item=number,
                number=len(before) + 1,
                reviewer=actor,
                decision=decision.choice,
                reason=decision.reason.strip(),
                messages=_coded(decision.messages),
                settles=settles,
                at=stamp(),
            )
        )
        state = _state(row, before, decision, settles)
        changed = session.execute(
            update(ReviewItemRow)
            .where(ReviewItemRow.id == number, ReviewItemRow.revision == revision)
            .values(state=state, revision=revision + 1)
        )
        if changed.rowcount != 1:  # type: ignore[attr-defined]
            raise _moved_on(number)
        session.refresh(row)
        detail["state"] = state
    return row


def forget_cases(session: Session, requests: Iterable[str]) -> None:
    """Delete the items of requests whose cases are deleted, with what reviewers wrote."""
    _forget(session, (ReviewItemRow.kind == "case") & ReviewItemRow.subject.in_(list(requests)))


def items_of_rows(session: Session, rows: Collection[str], versions: Collection[str] | None) -> list[int]:
    """The numbers of the items on rows with these ids, which may be many more than the queue has items.

    versions: only items on rows of these dataset versions.
    """
    query = select(ReviewItemRow.id, ReviewItemRow.subject, ReviewItemRow.dataset).where(ReviewItemRow.kind == "row")
    return [
        number
        for number, subject, dataset in session.execute(query.order_by(ReviewItemRow.id))
        if subject in rows and (versions is None or dataset in versions)
    ]


def forget_items(session: Session, numbers: Iterable[int]) -> None:
    """Delete items on recalled rows, with what reviewers wrote."""
    for number in numbers:
        _forget(session, ReviewItemRow.id == number)


def _forget(session: Session, those: ColumnElement[bool]) -> None:
    session.execute(delete(ReviewDecisionRow).where(ReviewDecisionRow.item.in_(select(ReviewItemRow.id).where(those))))
    session.execute(delete(ReviewItemRow).where(those))


def messages_of(coded: Fields) -> Turns:
    """The turns that a column holds."""
    return tuple(Message.model_validate(turn) for turn in coded.get("turns", ()))


def _coded(messages: Conversation) -> JsonObject:
    return {"turns": [turn.model_dump(mode="json") for turn in messages]} if messages else {}


def _check_may(
    row: ReviewItemRow, before: Sequence[ReviewDecisionRow], actor: str, revision: int, *, steward: bool
) -> None:
    if row.state not in WAITING:
        raise Refused(f"item {row.id} is decided: {row.state}", fix="go on with the next one")
    if row.revision != revision:
        raise _moved_on(row.id)
    if any(one.reviewer == actor for one in before) and not (row.state == "conflict" and steward):
        raise Refused(
            f"{actor} has decided on item {row.id} already", fix="leave it to another reviewer, or to a steward"
        )


def _state(row: ReviewItemRow, before: Sequence[ReviewDecisionRow], decision: Decision, settles: bool) -> str:
    """The item's state after a decision: equal ones decide, unequal ones are a conflict."""
    if settles or row.wanted == 1:
        return decision.choice
    if len(before) + 1 < row.wanted:
        return "open"
    equal = all(one.decision == decision.choice and messages_of(one.messages) == decision.messages for one in before)
    return decision.choice if equal else "conflict"


def _moved_on(number: int) -> Refused:
    return Refused(f"somebody decided on item {number} meanwhile", fix="look at it again")
