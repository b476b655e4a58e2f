"""Held answers: what waits for a reviewer, and the reviewer's decision."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field
from sqlalchemy import and_, func, or_, select
from sqlalchemy.orm import Session

from tunesmith.core.clock import second
from tunesmith.core.errors import TunesmithError
from tunesmith.core.messages import Message
from tunesmith.core.reading.strict_json import JsonObject
from tunesmith.core.view import Omitted, View
from tunesmith.holding import queue
from tunesmith.holding.queue import Decision, State, UnknownAnswer
from tunesmith.holding.rules import Holder
from tunesmith.project import Project
from tunesmith.registry.versions import load_version
from tunesmith.services.actions import Acting, Because, Named, Request, action
from tunesmith.store import database
from tunesmith.store.database import within
from tunesmith.store.people.identities import User
from tunesmith.store.store import Store
from tunesmith.store.tables import HeldRow

LISTED = 100


class HeldView(View):
    """A held answer without its texts. id: of its request; version: the label of the one that answered.

    reasons: the rules that hold it. state: waiting, released, replaced or refused. at_deadline: what happens to it if
    nobody decides. digest, given: of the answer's text, and of the text that left, "" while none did. until: when its
    texts are deleted. may_decide: whether the one who looks may decide on it.
    """

    id: str
    version: str
    name: str
    tenant: str
    region: str
    caller: str
    reasons: tuple[str, ...]
    state: State
    at: str
    deadline: str
    at_deadline: str
    until: str
    digest: str
    given: str
    decided_by: str
    decided_at: str | None
    reason: str
    may_decide: bool


class HeldList(View):
    """Held answers: those that wait first, by deadline, then the decided ones, newest first."""

    held: tuple[HeldView, ...]


class HeldAnswerView(HeldView):
    """A held answer. messages, answer, edited: the conversation, the answer and the edited one, for reviewers only.

    completion: the chat.completion object, once the answer may leave.
    """

    messages: Omitted[tuple[Message, ...]] = None
    answer: Omitted[str] = None
    edited: Omitted[str] = None
    completion: Omitted[JsonObject] = None


class DecideAnswer(Request):
    """A reviewer's decision on a held answer. identifier: of the answer, as its list or its completion names it.

    reason: for the audit log and the caller. answer: the edited one, with replace only.
    """

    identifier: Named
    decision: Decision
    reason: Because
    answer: Annotated[str, Field(max_length=65_536)] | None = None


def answer_holder(project: Project) -> Holder | None:
    """What applies the project's rules to answers; None where it has none."""
    settings = project.settings
    return None if settings.hold is None else Holder(settings.hold, settings.policy, project.schema)


def list_held(store: Store, user: User, *, everything: bool = False, reviews: bool = True) -> HeldList:
    """The held answers that a user may see: their own, and those of their tenant and region if they may review.

    everything: also those that are decided. reviews: False lists only their own.
    """
    tidy(store)
    mine = and_(HeldRow.caller == user.name, HeldRow.tenant == user.tenant)
    wanted = mine
    if reviews and user.may("answer.review"):
        wanted = or_(mine, and_(True, *within(HeldRow, user.scope)))
    state = [] if everything else [HeldRow.state == queue.WAITING]
    with database.reading(store.engine) as session:
        rows = queue.listed(session, wanted, *state, most=LISTED)
        return HeldList(held=tuple(HeldView.of(row, **_facts(session, store, row, user)) for row in rows))


def show(store: Store, user: User, identifier: str, *, reviews: bool = True) -> HeldAnswerView:
    """A held answer. reviews: False shows what its caller sees.

    Raises UnknownAnswer, also for one that the user may not see.
    """
    tidy(store)
    with database.reading(store.engine) as session:
        row = queue.get(session, identifier.removeprefix("chatcmpl-"))
        reviews = reviews and _reviews(row, user)
        if not reviews and (row.caller, row.tenant) != (user.name, user.tenant):
            raise UnknownAnswer(identifier)
        texts: JsonObject = {"completion": queue.response_of(row)}
        if reviews:
            texts |= {key: row.texts.get(key) for key in ("messages", "answer", "edited")}
        return HeldAnswerView.of(row, **_facts(session, store, row, user), **texts)


@action("answer.decide", permission="answer.review", tokens=("decisions",), at="/held/{identifier}/decide", form=True)
def decide(acting: Acting, asked: DecideAnswer) -> HeldAnswerView:
    """Release an answer, replace it by an edited one that fits the version's schema, or refuse it.

    It is decided once: a second reviewer's other decision is refused.
    """
    store, user = acting.store, acting.user
    found = show(store, user, asked.identifier)
    queue.decide(store, found.id, asked.decision, actor=user.name, reason=asked.reason, answer=asked.answer)
    return show(store, user, found.id)


def tidy(store: Store) -> list[State]:
    """Decide on the answers whose deadline is over and delete those whose time is; returns the outcomes."""
    outcomes = queue.expire_due(store)
    queue.delete_over(store)
    return outcomes


def waiting_for(store: Store, user: User) -> int:
    """How many answers wait for a decision of this user, if they may review."""
    if not user.may("answer.review"):
        return 0
    wanted = (HeldRow.state == queue.WAITING, HeldRow.caller != user.name, *within(HeldRow, user.scope))
    with database.reading(store.engine) as session:
        return session.scalar(select(func.count()).select_from(HeldRow).where(*wanted)) or 0


def waiting(store: Store) -> int:
    """How many answers wait for a reviewer."""
    with database.reading(store.engine) as session:
        return queue.count_waiting(session)


def _reviews(row: HeldRow, user: User) -> bool:
    return user.may("answer.review") and user.scope.covers(row.scope)


def _facts(session: Session, store: Store, row: HeldRow, user: User) -> JsonObject:
    try:
        label = load_version(store, row.version, session).label
    except TunesmithError:  # a record that cannot be read
        label = row.version
    return {
        "version": label,
        **{name: second(getattr(row, name)) for name in ("at", "deadline", "until")},
        "decided_at": None if row.decided is None else second(row.decided),
        "may_decide": row.state == queue.WAITING and _reviews(row, user) and row.caller != user.name,
    }
