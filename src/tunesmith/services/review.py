"""What people review: flagged rows, kept requests (cases) and held answers; what they decide, and what follows."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, model_validator
from sqlalchemy import and_, func, or_, select
from sqlalchemy.orm import Session

from tunesmith.core.clock import second
from tunesmith.core.digests import digest_bytes
from tunesmith.core.errors import NextStep, Refused, UsageError
from tunesmith.core.messages import Message, Turns
from tunesmith.core.reading.strict_json import JsonObject
from tunesmith.core.reading.text_files import inside
from tunesmith.core.system.files import write_atomic
from tunesmith.core.values import Omitted, Page, ScopedView, View
from tunesmith.data.building.flagged import rows_to_review
from tunesmith.data.dataset import Example
from tunesmith.data.governance.licences import permitted
from tunesmith.data.governance.withdrawn import content_key
from tunesmith.data.privacy.pseudonyms import recognised
from tunesmith.data.review import queue
from tunesmith.data.review.agreement import Agreement, agreements
from tunesmith.data.review.decisions import EXPORTED, Choice, ReviewedRow, encode_reviewed
from tunesmith.data.review.queue import Decision, NewItem
from tunesmith.holding import queue as holding
from tunesmith.holding.queue import Decision as HeldDecision
from tunesmith.holding.queue import State, UnknownAnswer
from tunesmith.holding.rules import Holder
from tunesmith.monitoring import cases
from tunesmith.monitoring.cases import Case
from tunesmith.monitoring.keeping import CaseKeeper
from tunesmith.project import Project
from tunesmith.services.actions import Acting, Bare, Because, Named, Number, Reason, Request, Short, action
from tunesmith.services.datasets import find_dataset
from tunesmith.services.rollouts import labels_of
from tunesmith.store.database import within
from tunesmith.store.people.identities import User, require
from tunesmith.store.store import Store
from tunesmith.store.tables import HeldRow, ReviewDecisionRow, ReviewItemRow

EACH_PAGE = 25
_FILE = "review.jsonl"
FAILED = "failed in service"


class FillQueue(Request):
    """What to add to the queue. dataset: a dataset version's digest or its start, by default the newest.

    reviewers: how many people decide on each item. pseudonyms: also rows that hold a pseudonym. search: also training
    and validation rows with this text, at most MOST_FOUND.
    """

    dataset: Annotated[str, Field(min_length=1, max_length=71)] | None = None
    reviewers: int = Field(default=1, ge=1, le=2)
    pseudonyms: bool = False
    search: Short = ""


class DecideItem(Request):
    """A decision on an item. contents: the text of every turn, for an edit.

    revision: of the item that was seen; where somebody else decided meanwhile, nothing is done.
    """

    item: Number
    decision: Choice
    reason: Reason = ""
    contents: Annotated[tuple[str, ...], Field(max_length=2048)] | None = None
    revision: int = Field(ge=0, le=2**31 - 1)

    @model_validator(mode="after")
    def _text_for_edits_only(self) -> DecideItem:
        if self.decision != "edit" and self.contents is not None:
            raise ValueError("only an edit states the text as it should be")
        return self


class AddCases(Request):
    """target: a JSONL source of the project, made if it does not exist. licence: SPDX expression of the requests'.

    everything: also requests that were answered correctly.
    """

    target: Path
    licence: Named
    everything: bool = False


class CorrectCase(Request):
    """What the answer to a kept request should have been."""

    request: Named
    expected: str


class DropCases(Request):
    """The kept requests to delete, with their texts."""

    requests: tuple[str, ...]


class CaseList(View):
    """The cases that are not rows of a source yet, oldest first."""

    cases: tuple[Case, ...]


class AddedCases(View):
    """How many cases were written to a source file. named: whether the project file lists that source.

    without_answer: how many were left, because nobody has said what the answer should have been.
    """

    added: int
    source: str
    named: bool
    without_answer: int


class DroppedCases(View):
    """How many cases were deleted."""

    dropped: int


class FilledQueue(View):
    """What was added to the queue. found: why -> rows and requests that were found, with those that were there already.

    waiting: items that wait now.
    """

    dataset: str | None
    added: int
    found: dict[str, int]
    waiting: int


class ReviewLine(View):
    """An item in a list. subject: the row's id, or the request's."""

    item: int
    kind: str
    subject: str
    split: str
    why: dict[str, str]
    state: str
    reviewers: int


class ReviewList(Page):
    """Some items, oldest first. counts: state -> items; agreements: of every two reviewers."""

    items: tuple[ReviewLine, ...]
    counts: dict[str, int]
    agreements: tuple[Agreement, ...]


class ShownDecision(View):
    """What one person decided. messages: the turns as they wrote them, for an edit."""

    reviewer: str
    decision: str
    reason: str
    messages: Turns
    settles: bool
    at: str


class ReviewItem(ReviewLine):
    """An item with its text. dataset: where the row was found; until: when a kept request is deleted.

    answered: a kept request's answer in service; the last of messages is the answer to learn. expected: whether
    somebody said that answer. decisions: oldest first; those of others are shown to who has decided, and in a conflict.
    may: whether the person who looks may decide now.
    """

    dataset: str
    messages: Turns
    revision: int
    decisions: tuple[ShownDecision, ...]
    may: bool
    expected: bool = True
    answered: Omitted[str] = None
    until: Omitted[str] = None


class DecidedItem(View):
    """An item after a decision. next: the next item that waits for the same person; None where there is none."""

    item: int
    state: str
    next: int | None


class ExportedReview(View):
    """The decisions that were written for the next build. named: whether the project file's data.review names the file.

    cases: kept requests that are ready to become rows; dropped: those that were rejected, and are deleted.
    """

    file: str
    named: bool
    accept: int
    edit: int
    reject: int
    cases: int
    dropped: int


_reviews_rows = partial(action, permission=queue.ACTION, tokens=("rows",), whole=True, form=True, reads_files=True)


@_reviews_rows("review.fill", says="added rows to the review queue", at="/review/fill")
def fill(acting: Acting, asked: FillQueue) -> FilledQueue:
    """Add what should be reviewed to the queue: rows of a dataset version that `data quality` flagged, rows with equal
    or similar requests and other answers, and requests that failed in service. What is in it stays as it is."""
    store = acting.store
    digest = find_dataset(store, asked.dataset) if asked.dataset or store.records_of("dataset") else None
    items = [
        NewItem("case", case.request, {FAILED: ", ".join(f"{name} {value:.2f}" for name, value in case.scores.items())})
        for case in list_cases(store).cases
    ]
    if digest is not None:
        pseudonyms, search, by = asked.pseudonyms, asked.search, acting.actor
        items = [*rows_to_review(store, digest, pseudonyms=pseudonyms, search=search, by=by), *items]
    added = queue.add_items(store, items, wanted=asked.reviewers, actor=acting.actor)
    counted = Counter(why for item in items for why in item.why)
    with store.reading() as session:
        counts = queue.counts(session)
    waiting = sum(counts[state] for state in queue.WAITING)
    return FilledQueue(dataset=digest, added=added, found=dict(sorted(counted.items())), waiting=waiting)


def list_items(acting: Acting, *, state: str = "waiting", page: int = 1) -> ReviewList:
    """Items of the queue. state: waiting (open or in conflict), open, conflict, accept, edit, reject, or all."""
    store = _reviewed_by(acting)
    groups = {"waiting": queue.WAITING, "all": queue.STATES}
    if state not in (*groups, *queue.STATES):
        raise UsageError(f"there is no state {state!r}", fix=f"one of {', '.join((*groups, *queue.STATES))}")
    cases.delete_expired(store)
    states = groups.get(state, (state,))
    with store.reading() as session:
        counts = queue.counts(session)
        agreed = agreements(queue.first_decisions(session))
    at = Page.within(page, sum(counts[one] for one in states), EACH_PAGE)
    rows = queue.list_items(store, states, (at.page - 1) * EACH_PAGE, EACH_PAGE)
    lines = tuple(ReviewLine.of(row, item=row.id, reviewers=row.wanted) for row in rows)
    return ReviewList(**dict(at), items=lines, counts=counts, agreements=tuple(agreed))


def show(acting: Acting, number: int) -> ReviewItem:
    """An item with its text. Raises NotThere for an unknown one, Refused if its case is deleted."""
    store = _reviewed_by(acting)
    with store.reading() as session:
        row, decisions = queue.get_item(session, number)
        may = number in _waiting(session, acting)
    messages, more = _text(store, row)
    seen = row.state != "open" or any(one.reviewer == acting.actor for one in decisions)
    shown = tuple(ShownDecision.of(one, messages=queue.messages_of(one.messages)) for one in decisions if seen)
    facts = {"item": row.id, "reviewers": row.wanted, "messages": messages, "decisions": shown, "may": may}
    return ReviewItem.of(row, **facts, **more)


def next_item(acting: Acting, after: int = 0, *, back: bool = False) -> int | None:
    """The number of the next item that waits for a person, else of the first one; back: of the one before."""
    with _reviewed_by(acting).reading() as session:
        waiting = _waiting(session, acting)
    if back:
        earlier = [number for number in waiting if number < after]
        return earlier[-1] if earlier else None
    return next((number for number in waiting if number > after), waiting[0] if waiting else None)


@_reviews_rows("review.decide", says="reviewed a row", at="/review/{item}/decide")
def decide(acting: Acting, asked: DecideItem) -> DecidedItem:
    """Accept, edit or reject an item. The audit log records it without the text."""
    store, who, number = acting.store, acting.actor, asked.item
    with store.reading() as session:
        row, _ = queue.get_item(session, number)
    messages, more = _text(store, row)
    edited: Turns = ()
    if asked.decision == "edit":
        edited = _edited(row, messages, asked.contents)
    elif asked.decision == "accept" and not more.get("expected", True):
        raise UsageError("nobody said what the answer should have been", fix="edit the answer, or reject the request")
    decision = Decision(asked.decision, asked.reason, edited)
    decided = queue.decide(store, number, decision, revision=asked.revision, actor=who)
    return DecidedItem(item=number, state=decided.state, next=next_item(acting, number))


@_reviews_rows("review.export", says="exported reviewed rows", at="/review/export")
def export(acting: Acting, _asked: Bare) -> ExportedReview:
    """Write all decisions on rows to the file that `data.review` names, for the next build, and carry out those on
    kept requests: an edit becomes the expected answer, a rejected request is deleted."""
    project, store, who = acting.project, acting.store, acting.actor
    named = project.settings.data.review
    target, file = _inside(project, named or _FILE, f"data.review: {named}")
    with store.reading() as session:
        query = select(ReviewItemRow).where(ReviewItemRow.state.not_in(queue.WAITING)).order_by(ReviewItemRow.id)
        items = list(session.scalars(query))
        made = select(ReviewDecisionRow).order_by(ReviewDecisionRow.item, ReviewDecisionRow.number)
        decisions: defaultdict[int, list[ReviewDecisionRow]] = defaultdict(list)
        for one in session.scalars(made):
            decisions[one.item].append(one)
    rows = [_reviewed(item, decisions[item.id]) for item in items if item.kind == "row"]
    counts = {choice: sum(one.decision == choice for one in rows) for choice in ("accept", "edit", "reject")}
    data = encode_reviewed(rows)
    with store.change(who, EXPORTED, target.name, {**counts, "file": digest_bytes(data)}) as session:
        require(session, who, queue.ACTION)
        write_atomic(target, data)
    ready, gone = _carry_out(store, [item for item in items if item.kind == "case"], decisions, who)
    return ExportedReview(file=file, named=named is not None, **counts, cases=ready, dropped=gone)


def case_keeper(project: Project) -> CaseKeeper | None:
    """What keeps requests for a review; None where the project file has no `cases:`."""
    settings = project.settings
    if settings.cases is None:
        return None
    return CaseKeeper(project.store, settings.cases, settings.data.privacy, project.schema)


def list_cases(store: Store, *, everything: bool = False) -> CaseList:
    """The cases that wait; with everything also those that were answered correctly.

    Deletes those whose time is over.
    """
    cases.delete_expired(store)
    return CaseList(cases=tuple(cases.list_cases(store, everything=everything)))


@action("cases.add", says="added kept requests to the rows")
def add_cases(acting: Acting, asked: AddCases) -> AddedCases:
    """Append the cases that wait to a JSONL source file, each with its origin; `data build` then reads them."""
    project = acting.project
    licence = permitted(asked.licence, project.settings.data.licences, "licence")
    path, name = _inside(project, asked.target, str(asked.target))
    waiting = list_cases(project.store, everything=asked.everything).cases
    split = project.settings.data.split
    added = cases.add_cases(project.store, waiting, path, licence=licence, split=split, actor=acting.actor)
    named = any(source.path == name for source in project.settings.data.sources)
    left = sum(case.expected is None for case in waiting)
    return AddedCases(added=added, source=name, named=named, without_answer=left)


@action("cases.correct", says="corrected the answer to a kept request")
def correct_case(acting: Acting, asked: CorrectCase) -> Case:
    """Say what the answer to a case should have been; cases without that are not added to a source."""
    if not asked.expected.strip():
        raise UsageError("the expected answer is empty", fix=NextStep("write it, or delete the case", "cases drop"))
    return cases.correct_case(acting.store, asked.request, asked.expected, actor=acting.actor)


@action("cases.drop", says="deleted kept requests")
def drop_cases(acting: Acting, asked: DropCases) -> DroppedCases:
    """Delete cases, with their texts."""
    waiting = {case.request for case in cases.list_cases(acting.store, everything=True)}
    unknown = [request for request in asked.requests if request not in waiting]
    if unknown:
        fix = NextStep("list the cases", "cases show", everything=True)
        raise UsageError(f"there is no case of request {unknown[0]!r}", fix=fix)
    cases.drop_cases(acting.store, asked.requests, actor=acting.actor)
    return DroppedCases(dropped=len(asked.requests))


def marked(text: str) -> list[tuple[str, bool]]:
    """A text in pieces, each with whether it is a pseudonym that can be told from a real value."""
    pieces, place = [], 0
    for start, end in recognised(text):
        pieces += [(text[place:start], False), (text[start:end], True)]
        place = end
    return [piece for piece in (*pieces, (text[place:], False)) if piece[0]]


def _inside(project: Project, file: str | Path, where: str) -> tuple[Path, str]:
    """A file of the project, and its path from the project's folder. Raises UsageError, with where, for one outside."""
    path = inside(project.root, file, "the file", where)
    return path, path.relative_to(project.root.resolve()).as_posix()


def _reviewed_by(acting: Acting) -> Store:
    """The store, for a person who may review. Rows are of all tenants, so a person of one tenant may not."""
    acting.user.require(queue.ACTION)
    acting.user.require_everything()
    return acting.store


def _waiting(session: Session, acting: Acting) -> list[int]:
    """The numbers of the items that wait for a person."""
    return queue.waiting_for(session, acting.actor, "steward" in acting.user.roles)


def _text(store: Store, row: ReviewItemRow) -> tuple[Turns, dict[str, Any]]:
    """An item's turns, and what else is known of a kept request."""
    if row.kind == "row":
        return queue.messages_of(row.messages), {}
    case = _case(store, row.subject)
    answer = case.expected if case.expected is not None else case.answer or ""
    turns = (*case.messages, Message(role="assistant", content=answer))
    return turns, {"expected": case.expected is not None, "answered": case.answer, "until": case.until}


def _case(store: Store, request: str) -> Case:
    case = cases.find_case(store, request)
    if case is None:
        raise Refused("this request is no longer kept", where=request, fix="go on with the next item")
    return case


def _edited(row: ReviewItemRow, messages: Turns, contents: Sequence[str] | None) -> Turns:
    if contents is None or len(contents) != len(messages):
        raise UsageError(f"an edit states the text of all {len(messages)} turns", fix="show the item again")
    texts = [_lines(text) for text in contents]  # a browser's form sends other line ends
    edited = tuple(
        turn if _lines(turn.content) == text else turn.model_copy(update={"content": text})
        for turn, text in zip(messages, texts, strict=True)
    )
    if edited == messages and row.kind == "row":
        raise UsageError("the edit changes nothing", fix="accept the item as it is, or change a turn")
    if any(not turn.content.strip() and not turn.tool_calls and turn.role != "tool" for turn in edited):
        raise UsageError("a turn is empty", fix="write it, or reject the item")
    if row.kind == "case" and edited[:-1] != messages[:-1]:
        raise UsageError("only the answer to a kept request can be edited", fix="leave the other turns as they are")
    return edited


def _lines(text: str) -> str:
    return text.replace("\r\n", "\n").replace("\r", "\n")


def _reviewed(item: ReviewItemRow, decisions: Sequence[ReviewDecisionRow]) -> ReviewedRow:
    last = decisions[-1]
    messages = queue.messages_of(item.messages)
    example = Example(id=item.subject, messages=messages, source="", licence="", group="")
    return ReviewedRow.model_validate(
        {
            "row": item.subject,
            "content": content_key(example),
            "decision": item.state,
            "why": tuple(why[:200] for why in item.why),
            "messages": queue.messages_of(last.messages) if item.state == "edit" else (),
            "by": tuple(dict.fromkeys(one.reviewer for one in decisions)),
        }
    )


def _carry_out(
    store: Store, items: Sequence[ReviewItemRow], decisions: dict[int, list[ReviewDecisionRow]], who: str
) -> tuple[int, int]:
    """Correct or drop the decided cases that are still kept; returns how many are ready, and how many were dropped."""
    there = [item for item in items if cases.find_case(store, item.subject) is not None]
    for item in there:
        if item.state == "edit":
            expected = queue.messages_of(decisions[item.id][-1].messages)[-1].content
            if _case(store, item.subject).expected != expected:
                cases.correct_case(store, item.subject, expected, actor=who)
    dropped = [item.subject for item in there if item.state == "reject"]
    if dropped:
        cases.drop_cases(store, dropped, actor=who)
    return len(there) - len(dropped), len(dropped)


LISTED = 100


class HeldView(ScopedView):
    """A held answer without its texts. id: of its request; version: the label of the one that answered.

    reasons: the rules that hold it. state: waiting, released, replaced or refused. at_deadline: what happens to it if
    nobody decides. digest, given: of the answer's text, and of the text that left, "" while none did. until: when its
    texts are deleted. may_decide: whether the one who looks may decide on it.
    """

    id: str
    version: str
    name: str
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

    messages: Omitted[Turns] = None
    answer: Omitted[str] = None
    edited: Omitted[str] = None
    completion: Omitted[JsonObject] = None


class DecideAnswer(Request):
    """A reviewer's decision on a held answer. identifier: of the answer, as its list or its completion names it.

    reason: for the audit log and the caller. answer: the edited one, with replace only.
    """

    identifier: Named
    decision: HeldDecision
    reason: Because
    answer: Annotated[str, Field(max_length=65_536)] | None = None


def answer_holder(project: Project) -> Holder | None:
    """What applies the project's rules to answers; None where it has none."""
    settings = project.settings
    return None if settings.hold is None else Holder(settings.hold, settings.policy, project.schema)


def list_held(acting: Acting, *, everything: bool = False) -> HeldList:
    """The held answers that a user may see: their own, and those of their tenant and region if they may review.

    everything: also those that are decided. A token without the scope `decisions` lists only its user's own.
    """
    store, user = acting.store, acting.user
    holding.tidy(store)
    mine = and_(HeldRow.caller == user.name, HeldRow.tenant == user.tenant)
    wanted = mine
    if acting.permits("decisions") and user.may("answer.review"):
        wanted = or_(mine, and_(True, *within(HeldRow, user.scope)))
    state = [] if everything else [HeldRow.state == holding.WAITING]
    with store.reading() as session:
        rows = holding.listed(session, wanted, *state, most=LISTED)
        return HeldList(held=tuple(HeldView.of(row, **_facts(session, row, user)) for row in rows))


def show_held(acting: Acting, identifier: str) -> HeldAnswerView:
    """A held answer. A token without the scope `decisions` shows what its caller sees.

    Raises UnknownAnswer, also for one that the user may not see.
    """
    store, user = acting.store, acting.user
    holding.tidy(store)
    with store.reading() as session:
        row = holding.get(session, identifier.removeprefix("chatcmpl-"))
        reviews = acting.permits("decisions") and _reviews(row, user)
        if not reviews and (row.caller, row.tenant) != (user.name, user.tenant):
            raise UnknownAnswer(identifier)
        shown = row.texts if reviews else {}  # its caller sees none of them
        texts = {key: shown.get(key) for key in ("messages", "answer", "edited")}
        texts["completion"] = holding.response_of(row)
        return HeldAnswerView.of(row, **_facts(session, row, user), **texts)


@action("answer.decide", permission="answer.review", tokens=("decisions",), at="/held/{identifier}/decide", form=True)
def decide_held(acting: Acting, asked: DecideAnswer) -> HeldAnswerView:
    """Release an answer, replace it by an edited one that fits the version's schema, or refuse it.

    It is decided once: a second reviewer's other decision is refused.
    """
    held = show_held(acting, asked.identifier)
    reason, answer = asked.reason, asked.answer
    holding.decide(acting.store, held.id, asked.decision, actor=acting.actor, reason=reason, answer=answer)
    return show_held(acting, held.id)


def waiting_for(acting: Acting) -> int:
    """How many answers wait for a decision of this user, if they may review."""
    user = acting.user
    if not user.may("answer.review"):
        return 0
    wanted = (HeldRow.state == holding.WAITING, HeldRow.caller != user.name, *within(HeldRow, user.scope))
    with acting.store.reading() as session:
        return session.scalar(select(func.count()).select_from(HeldRow).where(*wanted)) or 0


def count_held(store: Store) -> int:
    """How many answers wait for a reviewer."""
    with store.reading() as session:
        return holding.count_waiting(session)


def _reviews(row: HeldRow, user: User) -> bool:
    return user.may("answer.review") and user.scope.covers(row.scope)


def _facts(session: Session, row: HeldRow, user: User) -> JsonObject:
    return {
        "version": labels_of(session, {row.version}).get(row.version, row.version),
        **{name: second(getattr(row, name)) for name in ("at", "deadline", "until")},
        "decided_at": None if row.decided is None else second(row.decided),
        "may_decide": row.state == holding.WAITING and _reviews(row, user) and row.caller != user.name,
    }
