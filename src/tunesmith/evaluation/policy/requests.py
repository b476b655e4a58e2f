"""The requests of policy checks: read from the project file or from JSONL, checked, and asked in several forms."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Final

from pydantic import ConfigDict, ValidationError

from tunesmith.core.digests import digest_of, short
from tunesmith.core.errors import UsageError
from tunesmith.core.messages import Conversation, Message, Turns
from tunesmith.core.reading.strict_json import parse_json
from tunesmith.core.reading.text_files import LARGEST_DATA, read_text_file
from tunesmith.core.values import Frozen
from tunesmith.data.duplicates import near_text, request_key, request_text
from tunesmith.data.formats.turns import objection
from tunesmith.evaluation.lines import Asked, Name, why_not
from tunesmith.evaluation.policy.settings import MOST_REQUESTS, Policy, PolicyCheck
from tunesmith.evaluation.probes.drift import PERTURBATIONS
from tunesmith.evaluation.probes.suites import with_last_request

_ANSWER: Final = Message(role="assistant", content="-")  # request_text leaves a conversation's last turn out
_VARIANTS: Final = ("typos", "capitals", "reworded")


# A request's place, group and messages.
_Placed = tuple[str, str | None, Turns]


class PolicyItem(Asked):
    """One request of a check. group: shared by the forms of one request, and by what a file puts into one group.

    By default, requests that differ in their system turn or in punctuation only share a group: their answers are not
    independent.
    """

    check: str
    group: str
    request: Turns


class _Row(Frozen):
    """A line of a file of requests: a prompt or messages."""

    model_config = ConfigDict(strict=True)

    prompt: str | None = None
    messages: list[Any] | None = None
    group: Name | None = None


def policy_items(policy: Policy, root: Path) -> list[PolicyItem]:
    """The requests of all checks, in their order. root: the project's folder.

    Raises UsageError, with the place, for a file or a request that cannot be used, and for a request that a check has
    twice.
    """
    return [item for name, check in policy.items() for item in _items_of(name, check, root)]


def _items_of(name: str, check: PolicyCheck, root: Path) -> Iterator[PolicyItem]:
    seen: dict[str, str] = {}
    for where, group, messages in _requests(name, check, root):
        key = request_key(messages)
        if key in seen:
            raise UsageError(
                f"the check {name!r} has a request twice", where=f"{where}, first at {seen[key]}", fix="remove one"
            )
        seen[key] = where
        own = f"{name}/{short(digest_of([turn.model_dump(mode='json') for turn in messages]))}"
        group = group or f"{name}/{short(digest_of(compared_text(messages)))}"
        yield PolicyItem(id=own, check=name, group=group, request=messages)
        for form in _VARIANTS if check.variants else ():
            changed = with_last_request(messages, lambda text: PERTURBATIONS[form](text, ""))  # noqa: B023
            if changed != messages:
                yield PolicyItem(id=f"{own}/{form}", check=name, group=group, request=changed)


def compared_text(messages: Conversation) -> str:
    """The text by which a request is compared with others and with training rows: folded words, no system turn."""
    return near_text(request_text((*messages, _ANSWER)))


def unchanged_id(item: PolicyItem) -> str:
    """The id of the request that an item is a form of, its own for the request itself."""
    own, _, form = item.id.rpartition("/")
    return own if form in _VARIANTS else item.id


def _requests(name: str, check: PolicyCheck, root: Path) -> Iterator[_Placed]:
    if isinstance(check.requests, Path):
        yield from _read(name, root / check.requests)
        return
    for number, request in enumerate(check.requests, start=1):
        where = f"policy.{name}.requests, number {number}"
        turns = [request] if isinstance(request, str) else [turn.model_dump() for turn in request]
        yield where, None, _messages(turns, where)


def _read(name: str, path: Path) -> Iterator[_Placed]:
    count = 0
    for number, line in enumerate(
        read_text_file(path, f"the file of requests of {name}", LARGEST_DATA).split("\n"), start=1
    ):
        if not line.strip():
            continue
        count += 1
        where = f"{path}, line {number}"
        if count > MOST_REQUESTS:
            raise UsageError(f"the check {name!r} has more than {MOST_REQUESTS} requests", where=where, fix="draw some")
        row = _line(line, where)
        yield where, row.group, _messages([row.prompt] if row.messages is None else row.messages, where)
    if not count:
        raise UsageError(f"the check {name!r} has no requests: the file is empty", where=str(path), fix="write some")


def _line(line: str, where: str) -> _Row:
    try:
        row = _Row.model_validate(parse_json(line))
        if len(row.model_fields_set & {"prompt", "messages"}) != 1 or (row.prompt is None and row.messages is None):
            raise ValueError("it has no prompt and no messages, or both")
    except ValueError as error:
        raise UsageError(
            f"the line is not a request: {why_not(error)}",
            where=where,
            fix='write {"prompt": "..."} or {"messages": [...]}, with "group" where several requests belong together',
        ) from error
    return row


def _messages(turns: Sequence[Any], where: str) -> Turns:
    """The messages of turns: a text is what the user says. Raises UsageError for turns that cannot be answered."""
    try:
        messages = tuple(
            Message(role="user", content=turn) if isinstance(turn, str) else Message.model_validate(turn)
            for turn in turns
        )
    except ValidationError as error:
        raise UsageError("a turn needs a role and a content", where=where, fix="correct it") from error
    if any(turn.role == "tool" or turn.tool_calls or turn.tools for turn in messages):
        raise UsageError("requests with tools are not supported in policy checks", where=where, fix="leave them out")
    if reason := objection([*messages, _ANSWER]):
        raise UsageError(
            f"the request cannot be answered: {reason}",
            where=where,
            fix="let user and assistant take turns, the user last",
        )
    return messages
