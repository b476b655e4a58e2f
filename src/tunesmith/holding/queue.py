"""The queue of held answers: rows of the database, each decided once, by a reviewer or at its deadline.

A row and its texts are deleted `fetch` after the deadline. The audit log keeps who decided what, when and why, and the
digests of the texts.
"""

from __future__ import annotations

import contextlib
import json
import logging
import time
from collections.abc import Sequence
from typing import Literal, NamedTuple

from sqlalchemy import ColumnElement, delete, func, select, update
from sqlalchemy.orm import Session

from tunesmith.core.digests import digest_bytes
from tunesmith.core.errors import Forbidden, NextStep, NotThere, Refused, TunesmithError, UsageError
from tunesmith.core.messages import Message
from tunesmith.core.reading.answer_grammar import matches
from tunesmith.core.reading.strict_json import JsonObject, NotJson, as_decoded, parse_json
from tunesmith.core.text.names import CONTROLLER, Scope
from tunesmith.holding.settings import HoldSettings
from tunesmith.registry.serving import standing_of
from tunesmith.registry.versions import load_version
from tunesmith.store.people.identities import require
from tunesmith.store.store import Store
from tunesmith.store.tables import HeldRow

Decision = Literal["release", "replace", "refuse"]
State = Literal["waiting", "released", "replaced", "refused"]
_STATES: dict[Decision, State] = {"release": "released", "replace": "replaced", "refuse": "refused"}
WAITING: State = "waiting"
_LOG = logging.getLogger("tunesmith.holding")


class QueueFull(Refused):
    """As many answers wait as the project allows."""


class TooManyOfCaller(Refused):
    """As many answers of this caller wait as one may have."""


class UnknownAnswer(NotThere):
    """There is no such held answer, or its time is over."""

    def __init__(self, identifier: str) -> None:
        what = f"there is no held answer {identifier[:80]!r}"
        super().__init__(what, fix=NextStep("list the answers that wait", "held list"), code="held_not_found")


class AlreadyDecided(Refused):
    """Somebody else, or the deadline, decided first."""

    def __init__(self, what: str, identifier: str) -> None:
        super().__init__(what, where=identifier, code="already_decided")


class HeldAnswer(NamedTuple):
    """An answer that must wait. id: its request's. name, version: what answered, the version by digest.

    messages: the conversation. response: the chat.completion object that would have been sent. schemas, grammar: what
    an edited answer must fit: JSON Schemas as text, a Lark grammar or None.
    """

    id: str
    name: str
    version: str
    scope: Scope
    caller: str
    reasons: tuple[str, ...]
    messages: tuple[Message, ...]
    text: str
    response: JsonObject
    schemas: tuple[str, ...] = ()
    grammar: str | None = None


def put(store: Store, answer: HeldAnswer, settings: HoldSettings, of_caller: int) -> float:
    """Add an answer to the queue; returns its deadline.

    of_caller: how many answers of one caller may wait, so that nobody fills the queue for all. Raises QueueFull where
    `at_most` wait already, TooManyOfCaller.
    """
    at = time.time()
    texts = {
        "messages": [message.model_dump(mode="json") for message in answer.messages],
        "answer": answer.text,
        "response": answer.response,
        "schemas": list(answer.schemas),
        "grammar": answer.grammar,
    }
    with store.writing() as session:
        if count_waiting(session) >= settings.at_most:
            raise QueueFull(f"{settings.at_most} answers wait for a reviewer already", fix="decide on some of them")
        if count_waiting(session, HeldRow.caller == answer.caller) >= of_caller:
            raise TooManyOfCaller(f"{of_caller} answers of {answer.caller} wait for a reviewer already")
        session.add(
            HeldRow(
                **{part: getattr(answer, part) for part in ("id", "name", "version", "caller")},
                **answer.scope.fields(),
                reasons=list(answer.reasons),
                digest=digest_bytes(answer.text.encode(errors="surrogatepass")),
                texts=texts,
                at=at,
                deadline=at + settings.deadline,
                until=at + settings.deadline + settings.fetch,
                at_deadline=settings.at_deadline,
                state=WAITING,
            )
        )
    return at + settings.deadline


def count_waiting(session: Session, *conditions: ColumnElement[bool]) -> int:
    """How many answers wait, of those that fulfil conditions."""
    return session.scalar(select(func.count(HeldRow.id)).where(HeldRow.state == WAITING, *conditions)) or 0


def get(session: Session, identifier: str) -> HeldRow:
    """A held answer. Raises UnknownAnswer."""
    row = session.get(HeldRow, identifier)
    if row is None or row.until <= time.time():
        raise UnknownAnswer(identifier)
    return row


def listed(session: Session, *conditions: ColumnElement[bool], most: int) -> Sequence[HeldRow]:
    """Held answers that fulfil conditions: those that wait first, by deadline, then the decided ones, newest first."""
    query = select(HeldRow).where(HeldRow.until > time.time(), *conditions)
    waits = HeldRow.state == WAITING
    ordered = query.order_by(waits.desc(), HeldRow.decided.desc(), HeldRow.deadline, HeldRow.id).limit(most)
    return session.scalars(ordered).all()


def decided_among(store: Store, identifiers: Sequence[str]) -> list[str]:
    """Which of these answers are decided, or gone."""
    with store.reading() as session:
        query = select(HeldRow.id).where(HeldRow.id.in_(identifiers), HeldRow.state == WAITING)
        waiting = set(session.scalars(query))
    return [one for one in identifiers if one not in waiting]


def decide(
    store: Store, identifier: str, decision: Decision, *, actor: str, reason: str, answer: str | None = None
) -> None:
    """Release an answer, replace it by an edited one, or refuse it. The same decision again changes nothing.

    answer: the edited one. Raises UsageError for an answer that does not fit the version's schema, UnknownAnswer,
    AlreadyDecided, and Refused where actor may not review, asked the question, or the version may not serve any more.
    """
    if not reason.strip() or "\0" in reason:
        raise UsageError("a decision on an answer needs a reason", where="reason")
    if (answer is not None) != (decision == "replace"):
        raise UsageError("an edited answer is given with replace, and only then", where="answer")
    detail: JsonObject = {}
    with (
        contextlib.suppress(_Repeated),
        store.change(actor, f"answer.{decision}", identifier, detail) as session,
    ):
        row = get(session, identifier)
        require(session, actor, "answer.review", scope=row.scope)
        if row.caller == actor:
            raise Forbidden(
                f"{actor} made this request and cannot decide on its answer", fix="have another reviewer do it"
            )
        said = row.texts["answer"] if decision == "release" else answer
        if answer is not None:
            _check_fits(row, answer)
        given = "" if said is None else digest_bytes(said.encode(errors="surrogatepass"))
        if row.state != WAITING:
            if (row.state, row.decided_by, row.given) == (_STATES[decision], actor, given):
                raise _Repeated
            raise AlreadyDecided(f"{row.decided_by} decided already: {row.state}", identifier)
        if row.deadline <= time.time():
            raise AlreadyDecided(f"its deadline is over: {row.at_deadline}", identifier)
        if decision == "release":
            _require_standing(session, store, row)
        _settle(session, row, _STATES[decision], actor, reason.strip(), answer)
        detail |= _about(row)


def expire_due(store: Store) -> list[State]:
    """Decide on every answer whose deadline is over; returns the outcomes. Several processes may call it at once.

    An answer that would be released goes on waiting while its version's record cannot be read.
    """
    with store.reading() as session:
        query = select(HeldRow.id, HeldRow.version, HeldRow.at_deadline)
        due = session.execute(query.where(HeldRow.state == WAITING, HeldRow.deadline <= time.time())).all()
    done: list[State] = []
    for identifier, version, at_deadline in due:
        if at_deadline == "release" and not _readable(store, version):
            continue
        detail: JsonObject = {}
        with (
            contextlib.suppress(_Repeated, UnknownAnswer),
            store.change(CONTROLLER, "answer.expire", identifier, detail) as session,
        ):
            row = session.get(HeldRow, identifier)
            if row is None or row.state != WAITING:  # another process was first
                raise _Repeated
            state, reason = _STATES["refuse"], "nobody decided before the deadline"
            if row.at_deadline == "release":
                try:
                    _require_standing(session, store, row)
                    state = _STATES["release"]
                except (Refused, UsageError) as error:
                    reason = "nobody decided before the deadline, and its version may not serve any more"
                    detail["why"] = error.what
            _settle(session, row, state, CONTROLLER, reason, None)
            detail |= _about(row)
            done.append(state)
    return done


def _readable(store: Store, version: str) -> bool:
    """Whether a version's record can be read now. A bucket's is read here, and not while other writers wait."""
    try:
        with contextlib.suppress(Refused, UsageError):  # which decide
            load_version(store, version)
    except TunesmithError as error:
        _LOG.error("the version of a held answer cannot be read, and the answer waits: %s", error)
        return False
    return True


def delete_over(store: Store) -> None:
    """Delete the held answers whose time is over, with their texts."""
    over = HeldRow.until <= time.time()
    with store.reading() as session:
        one = session.scalars(select(HeldRow.id).where(over, HeldRow.state != WAITING).limit(1)).first()
    if one is not None:
        with store.writing() as session:
            session.execute(delete(HeldRow).where(over, HeldRow.state != WAITING))


def tidy(store: Store) -> list[State]:
    """Decide on the answers whose deadline is over and delete those whose time is; returns the outcomes."""
    outcomes = expire_due(store)
    delete_over(store)
    return outcomes


def response_of(row: HeldRow) -> JsonObject | None:
    """The chat.completion object that left, or may leave; None for an answer that waits or was refused."""
    response: JsonObject = row.texts["response"]
    if row.state == "released":
        return response
    if row.state != "replaced":
        return None
    choice: JsonObject = response["choices"][0]
    message = {"role": "assistant", "content": row.texts["edited"], "refusal": None}
    return {**response, "choices": [{**choice, "message": message, "logprobs": None, "finish_reason": "stop"}]}


class _Repeated(Exception):
    """Nothing is left to do."""


def _settle(session: Session, row: HeldRow, state: State, by: str, reason: str, answer: str | None) -> None:
    """Write a decision. Raises AlreadyDecided where another one came first."""
    left = {"released": row.texts["answer"], "replaced": answer}.get(state)
    texts = row.texts if answer is None else {**row.texts, "edited": answer}
    changed = session.execute(
        update(HeldRow)
        .where(HeldRow.id == row.id, HeldRow.state == WAITING)
        .values(
            state=state,
            decided_by=by,
            reason=reason,
            decided=time.time(),
            texts=texts,
            given="" if left is None else digest_bytes(left.encode(errors="surrogatepass")),
        )
    )
    if changed.rowcount != 1:  # type: ignore[attr-defined]
        raise AlreadyDecided("somebody else decided already", row.id)
    session.refresh(row)


def _about(row: HeldRow) -> JsonObject:
    """What the audit log keeps of a decision."""
    stated = {key: getattr(row, key) for key in ("name", "version", "tenant", "region", "caller", "state", "reason")}
    return {**stated, "rules": row.reasons, "answer": row.digest, "given": row.given}


def _require_standing(session: Session, store: Store, row: HeldRow) -> None:
    """Raise Refused where the version that answered may not serve any more: its answers may not leave either."""
    standing_of(session, store, row.version, row.scope).require(row.name)


def _check_fits(row: HeldRow, answer: str) -> None:
    """Raise UsageError for an edited answer that the version could not have given."""
    try:
        answer.encode()
    except UnicodeEncodeError:
        raise UsageError("the edited answer holds half a character", where="answer") from None
    if not answer.strip():
        raise UsageError("the edited answer is empty", where="answer", fix="refuse it instead")
    from tunesmith.core.reading.answer_schema import satisfies

    fix = NextStep("edit the answer that waits, so that it fits", "held show", identifier=row.id)
    for text in row.texts["schemas"]:
        try:
            fits = satisfies(parse_json(answer), json.loads(text))
        except NotJson as error:
            raise UsageError(f"the edited answer is not JSON: {error}", where="answer", fix=fix) from None
        if not fits:
            raise UsageError("the edited answer does not fit the schema of this answer", where="answer", fix=fix)
    grammar = row.texts["grammar"]
    spelled = as_decoded(answer) if row.texts["schemas"] else answer  # a schema says nothing of spaces and escapes
    if grammar is not None and not matches(grammar, spelled):
        raise UsageError("the edited answer does not fit the grammar of this answer", where="answer", fix=fix)
