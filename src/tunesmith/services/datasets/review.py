"""The review queue: rows that were flagged and requests that were kept, and what people decide on them."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import Any, get_args

from sqlalchemy import select

from tunesmith.core.digests import digest_bytes
from tunesmith.core.errors import Refused, UsageError
from tunesmith.core.messages import Message
from tunesmith.core.scope import Scope
from tunesmith.core.system.files import write_atomic
from tunesmith.core.view import Omitted, View
from tunesmith.data.dataset import Example
from tunesmith.data.governance.withdrawn import content_key
from tunesmith.data.privacy.pseudonyms import recognised
from tunesmith.data.review import queue
from tunesmith.data.review.agreement import Agreement, agreements
from tunesmith.data.review.decisions import EXPORTED, Choice, ReviewedRow, encode_reviewed
from tunesmith.data.review.queue import Decision
from tunesmith.monitoring import cases
from tunesmith.monitoring.cases import Case
from tunesmith.project import Project
from tunesmith.services.datasets.review_sources import cases_to_review, rows_to_review
from tunesmith.store import database
from tunesmith.store.people.identities import acting, require
from tunesmith.store.store import Store
from tunesmith.store.tables import ReviewDecisionRow, ReviewItemRow

CHOICES: tuple[Choice, ...] = get_args(Choice)
EACH_PAGE = 25
_FILE = "review.jsonl"


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


class ReviewList(View):
    """Some items, oldest first. page: from 1. counts: state -> items; agreements: of every two reviewers."""

    items: tuple[ReviewLine, ...]
    total: int
    page: int
    pages: int
    counts: dict[str, int]
    agreements: tuple[Agreement, ...]


class ShownDecision(View):
    """What one person decided. messages: the turns as they wrote them, for an edit."""

    reviewer: str
    decision: str
    reason: str
    messages: tuple[Message, ...]
    settles: bool
    at: str


class ReviewItem(ReviewLine):
    """An item with its text. dataset: where the row was found; until: when a kept request is deleted.

    answered: a kept request's answer in service; the last of messages is the answer to learn. expected: whether
    somebody said that answer. decisions: oldest first; those of others are shown to who has decided, and in a conflict.
    may: whether the person who looks may decide now.
    """

    dataset: str
    messages: tuple[Message, ...]
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


def fill(
    store: Store,
    dataset: str | None = None,
    *,
    reviewers: int = 1,
    pseudonyms: bool = False,
    search: str = "",
    actor: str | None = None,
) -> FilledQueue:
    """Add what should be reviewed to the queue: rows of a dataset version that `data quality` flagged, rows with equal
    or similar requests and other answers, and requests that failed in service.

    dataset: by default the newest. reviewers: how many people decide on each item, 1 or 2. pseudonyms: also rows that
    hold a pseudonym. search: also training and validation rows with this text, at most MOST_FOUND. What is in the queue
    already stays as it is.
    """
    who = _reviewer(store, actor)
    if reviewers not in (1, 2):
        raise UsageError(f"{reviewers} people cannot review an item", fix="1 or 2")
    known = store.records_of("dataset")
    digest = store.find_record(dataset) if dataset else known[-1] if known else None
    rows = rows_to_review(store, digest, pseudonyms=pseudonyms, search=search.strip(), by=who)
    items = [*rows, *cases_to_review(store)]
    added = queue.add_items(store, items, wanted=reviewers, actor=who)
    found: defaultdict[str, int] = defaultdict(int)
    for item in items:
        for why in item.why:
            found[why] += 1
    with database.reading(store.engine) as session:
        counts = queue.counts(session)
    waiting = sum(counts[state] for state in queue.WAITING)
    return FilledQueue(dataset=digest, added=added, found=dict(sorted(found.items())), waiting=waiting)


def list_items(store: Store, *, state: str = "waiting", page: int = 1, actor: str | None = None) -> ReviewList:
    """Items of the queue. state: waiting (open or in conflict), open, conflict, accept, edit, reject, or all."""
    _reviewer(store, actor)
    groups = {"waiting": queue.WAITING, "all": queue.STATES}
    if state not in (*groups, *queue.STATES):
        raise UsageError(f"there is no state {state!r}", fix=f"one of {', '.join((*groups, *queue.STATES))}")
    cases.delete_expired(store)
    states = groups.get(state, (state,))
    with database.reading(store.engine) as session:
        counts = queue.counts(session)
        agreed = agreements(queue.first_decisions(session))
    total = sum(counts[one] for one in states)
    pages = max(1, -(-total // EACH_PAGE))
    page = min(max(1, page), pages)
    found = queue.list_items(store, states, (page - 1) * EACH_PAGE, EACH_PAGE)
    lines = tuple(ReviewLine.of(row, item=row.id, reviewers=row.wanted) for row in found)
    return ReviewList(items=lines, total=total, page=page, pages=pages, counts=counts, agreements=tuple(agreed))


def show(store: Store, number: int, *, actor: str | None = None) -> ReviewItem:
    """An item with its text. Raises UsageError for an unknown one, Refused if its case is deleted."""
    who = _reviewer(store, actor)
    with database.reading(store.engine) as session:
        row, decisions = queue.get_item(session, number)
        may = number in queue.waiting_for(session, who, _is_steward(store, who))
    messages, more = _text(store, row)
    seen = row.state not in ("open",) or any(one.reviewer == who for one in decisions)
    shown = tuple(ShownDecision.of(one, messages=queue.messages_of(one.messages)) for one in decisions if seen)
    facts = {"item": row.id, "reviewers": row.wanted, "messages": messages, "decisions": shown, "may": may}
    return ReviewItem.of(row, **facts, **more)


def next_item(store: Store, after: int = 0, *, actor: str | None = None, back: bool = False) -> int | None:
    """The number of the next item that waits for a person, else of the first one; back: of the one before."""
    who = _reviewer(store, actor)
    with database.reading(store.engine) as session:
        waiting = queue.waiting_for(session, who, _is_steward(store, who))
    if back:
        earlier = [number for number in waiting if number < after]
        return earlier[-1] if earlier else None
    return next((number for number in waiting if number > after), waiting[0] if waiting else None)


def decide(
    store: Store,
    number: int,
    choice: Choice,
    *,
    reason: str = "",
    contents: Sequence[str] | None = None,
    revision: int | None = None,
    actor: str | None = None,
) -> DecidedItem:
    """Decide on an item as one person. contents: the text of every turn, for an edit.

    revision: of the item that the person saw; by default the present one. Raises Refused where somebody else decided
    meanwhile, and as `queue.decide`; UsageError for an edit that changes nothing, or more than a kept request's answer.
    """
    who = _reviewer(store, actor)
    with database.reading(store.engine) as session:
        row, _ = queue.get_item(session, number)
    messages, more = _text(store, row)
    edited: tuple[Message, ...] = ()
    if choice == "edit":
        edited = _edited(row, messages, contents)
    elif choice == "accept" and not more.get("expected", True):
        raise UsageError("nobody said what the answer should have been", fix="edit the answer, or reject the request")
    seen = row.revision if revision is None else revision
    decided = queue.decide(store, number, Decision(choice, reason, edited), revision=seen, actor=who)
    following = next_item(store, number, actor=who)
    return DecidedItem(item=number, state=decided.state, next=following)


def export(project: Project, *, actor: str | None = None) -> ExportedReview:
    """Write all decisions on rows to the file that `data.review` names, for the next build, and carry out those on
    kept requests: an edit becomes the expected answer, a rejected request is deleted.

    Without `data.review` the file is review.jsonl in the project's folder.
    """
    store, who = project.store, project.actor(actor)
    _reviewer(store, who)
    named = project.settings.data.review
    target = (project.root / (named or _FILE)).resolve()
    if not target.is_relative_to(project.root.resolve()):
        raise UsageError("the file lies outside the project", where=f"data.review: {named}", fix="name one inside it")
    with database.reading(store.engine) as session:
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
    file = target.relative_to(project.root.resolve()).as_posix()
    return ExportedReview(file=file, named=named is not None, **counts, cases=ready, dropped=gone)


def marked(text: str) -> list[tuple[str, bool]]:
    """A text in pieces, each with whether it is a pseudonym that can be told from a real value."""
    pieces, place = [], 0
    for start, end in recognised(text):
        pieces += [(text[place:start], False), (text[start:end], True)]
        place = end
    return [piece for piece in (*pieces, (text[place:], False)) if piece[0]]


def _reviewer(store: Store, actor: str | None) -> str:
    """The name of the person, who may review. Rows are of all tenants, so a person of one tenant may not."""
    who = acting(store, actor)
    return require(store, who, queue.ACTION, scope=Scope()).name


def _is_steward(store: Store, who: str) -> bool:
    return "steward" in require(store, who, queue.ACTION).roles


def _text(store: Store, row: ReviewItemRow) -> tuple[tuple[Message, ...], dict[str, Any]]:
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


def _edited(row: ReviewItemRow, messages: tuple[Message, ...], contents: Sequence[str] | None) -> tuple[Message, ...]:
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
