"""Cases: served requests whose callers asked to keep them, until they become rows of a source or their time is over.

A case becomes evidence as every row does: in a source file with a licence, which `data build` reads, scans for personal
data, deduplicates and counts.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Sequence
from contextlib import suppress
from datetime import datetime
from pathlib import Path
from typing import Any

from tunesmith.core.clock import now
from tunesmith.core.errors import NextStep, Refused, UsageError
from tunesmith.core.messages import Message, tools_of
from tunesmith.core.reading.strict_json import JsonObject, parse_json
from tunesmith.core.system.files import write_atomic
from tunesmith.core.text.names import CONTROLLER
from tunesmith.core.values import ScopedView
from tunesmith.data.review.queue import forget_cases
from tunesmith.data.settings import Split
from tunesmith.store import audit
from tunesmith.store.people.identities import require
from tunesmith.store.store import Store

_LOG = logging.getLogger("tunesmith.cases")
_FOLDER = "cases/"


class Case(ScopedView):
    """One served request. version: digest of the one that answered; by: the user whose request or feedback made it.

    expected: the right answer, None until somebody says it. answer: None where the request failed. at: the time of the
    request; until: when the case is deleted.
    """

    request: str
    messages: tuple[Message, ...]
    expected: str | None
    answer: str | None
    version: str
    scores: dict[str, float]
    by: str
    at: str
    until: str

    @property
    def failed(self) -> bool:
        """Whether there was no answer, or any score is below 1."""
        return self.answer is None or any(value < 1.0 for value in self.scores.values())

    @property
    def over(self) -> bool:
        """Whether its time is over."""
        return datetime.fromisoformat(self.until) <= now()


def put_case(store: Store, case: Case) -> None:
    """Store a case until it is added to a source or dropped, or its time is over.

    An answer that was expected before is kept where this case has none.
    """
    if case.expected is None and store.blobs.exists(_key(case.request)):
        case = case.model_copy(update={"expected": _read(store, _key(case.request)).expected})
    store.blobs.put(_key(case.request), case.model_dump_json().encode(), private=True)


def list_cases(store: Store, *, everything: bool = False) -> list[Case]:
    """Stored cases whose time is not over, oldest first; with everything, also those that were answered right.

    Raises Refused for a damaged one.
    """
    cases = []
    for key in store.blobs.keys(_FOLDER):
        with suppress(FileNotFoundError):  # it was withdrawn meanwhile
            if not (case := _read(store, key)).over and (everything or case.failed):
                cases.append(case)
    return sorted(cases, key=lambda case: (case.at, case.request))


def find_case(store: Store, request: str) -> Case | None:
    """The case of a request; None where there is none, or its time is over."""
    try:
        case = _read(store, _key(request))
    except FileNotFoundError:
        return None
    return None if case.over else case


def count_cases(store: Store) -> int:
    """How many cases there are."""
    return sum(1 for _ in store.blobs.keys(_FOLDER))


def delete_expired(store: Store) -> int:
    """Delete the cases whose time is over; returns how many. The audit log keeps the ids of their requests.

    A damaged case is left and reported in the log, since nobody can tell its time.
    """
    due = [case.request for case in _readable(store) if case.over]
    if not due:
        return 0
    with store.writing() as session:
        left = [request for request in due if store.blobs.exists(_key(request))]  # another process may do the same
        if left:
            audit.append(session, actor=CONTROLLER, action="cases.expire", subject="cases", detail={"requests": left})
            forget_cases(session, left)
            session.flush()
        for request in left:
            store.blobs.delete(_key(request))
    return len(left)


def delete_case(store: Store, request: str) -> bool:
    """Delete the case of a request; returns whether there was one. The caller records it, and forgets its review."""
    there = store.blobs.exists(_key(request))
    store.blobs.delete(_key(request))
    return there


def correct_case(store: Store, request: str, expected: str, *, actor: str) -> Case:
    """Set the expected answer of a case. Raises UsageError where there is none, Refused if actor may not build data."""
    with store.change(actor, "cases.correct", request, {}) as session:
        require(session, actor, "data.build")
        case = next((one for one in list_cases(store, everything=True) if one.request == request), None)
        if case is None:
            fix = NextStep("list the cases", "cases show", everything=True)
            raise UsageError(f"there is no case of request {request[:80]!r}", fix=fix)
        case = case.model_copy(update={"expected": expected})
        put_case(store, case)
    return case


def add_cases(store: Store, cases: Sequence[Case], target: Path, *, licence: str, split: Split, actor: str) -> int:
    """Append cases to a JSONL source, one row each with its origin, and return how many were new.

    split: names the keys that a row needs. Each case gets its own group and the time of its request. Afterwards
    the cases are deleted from the store, and the audit log says who added them where. If the call is killed, the next
    one adds the rest; no case is in the file twice. Cases without an expected answer are left. Raises UsageError if
    target is not a JSONL file, Refused if actor may not build data.
    """
    if target.suffix != ".jsonl":
        raise UsageError(
            "cases can only be added to a JSONL file", where=str(target), fix="name a file that ends in .jsonl"
        )
    require(store, actor, "data.build")
    with store.lock("cases", "adding cases"):
        before = target.read_bytes() if target.is_file() else b""
        if before and not before.endswith(b"\n"):
            before += b"\n"
        there = _requests(before, target)
        detail: JsonObject = {"source": target.name, "licence": licence}
        with store.change(actor, "cases.add", target.name, detail) as session:
            # Those that are still there: a caller may have withdrawn one meanwhile.
            answered = [one for one in cases if one.expected is not None and store.blobs.exists(_key(one.request))]
            fresh = [case for case in answered if case.request not in there]
            detail["requests"] = [case.request for case in fresh]
            forget_cases(session, [case.request for case in answered])
            write_atomic(target, before + b"".join(_row(case, licence, split) for case in fresh))
        for case in answered:
            delete_case(store, case.request)
    return len(fresh)


def drop_cases(store: Store, requests: Sequence[str], *, actor: str) -> None:
    """Delete the cases of requests. Raises Refused if actor may not build data."""
    with store.change(actor, "cases.drop", "cases", {"requests": list(requests)}) as session:
        require(session, actor, "data.build")
        forget_cases(session, requests)
        for request in requests:
            delete_case(store, request)


def _key(request: str) -> str:
    return f"{_FOLDER}{request}.json"


def _read(store: Store, key: str) -> Case:
    try:
        return Case.model_validate_json(store.blobs.get(key))
    except ValueError:
        # Without the cause, whose message repeats the text.
        raise Refused("not a valid case", where=store.blobs.where(key), fix="delete the file") from None


def _readable(store: Store) -> Iterator[Case]:
    for key in store.blobs.keys(_FOLDER):
        try:
            yield _read(store, key)
        except FileNotFoundError:  # deleted meanwhile
            continue
        except Refused as error:
            _LOG.warning("%s", error)


def _row(case: Case, licence: str, split: Split) -> bytes:
    answer = {"role": "assistant", "content": case.expected}
    row: dict[str, Any] = {"messages": [*(turn.openai() for turn in case.messages), answer], "licence": licence}
    if tools := tools_of(case.messages):
        row["tools"] = tools
    row |= {key: value for key, value in (("tenant", case.tenant), ("region", case.region)) if value}
    row |= dict.fromkeys(split.keys, f"case-{case.request}") | ({split.time: case.at} if split.time else {})
    row["case"] = case.model_dump(mode="json", include={"request", "version", "scores", "by", "at"})
    return json.dumps(row, ensure_ascii=False).encode() + b"\n"


def _requests(data: bytes, target: Path) -> set[str]:
    requests = set()
    for number, line in enumerate(data.splitlines(), start=1):
        try:
            row = parse_json(line)
            requests.add(str(row.get("case", {}).get("request")))
        except (ValueError, AttributeError) as error:
            where = f"{target}, line {number}"
            raise UsageError("not a JSON row", where=where, fix="correct it, or name another file") from error
    return requests
