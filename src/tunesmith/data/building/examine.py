"""Examines rows: each becomes an example, or is removed with a reason."""

from __future__ import annotations

import json
from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence, Set
from functools import cached_property
from typing import Any, NamedTuple

from tunesmith.core.errors import Refused, TunesmithError, UsageError
from tunesmith.core.messages import Conversation, CountTokens, Turns, tools_of, with_tools
from tunesmith.core.reading.strict_json import Fields, NotJson, as_decoded, json_in, parse_json
from tunesmith.core.values import Schema
from tunesmith.data.building.staging import (
    ALTERED,
    EDITED,
    HAS_CONTROL,
    OFF_SCHEMA,
    OUTSIDE_WORDING,
    OVERLONG,
    PRIVATE,
    SPOILT,
    SPOILT_CALL,
    WITHDRAWN,
    Account,
    RemovedLine,
    StagedRow,
    staged_row,
)
from tunesmith.data.dataset import Example, example_id
from tunesmith.data.duplicates import answer_key, learned_parts, request_text
from tunesmith.data.formats import row_formats
from tunesmith.data.formats.key_order import in_request_order
from tunesmith.data.formats.row_readers import SourceRow
from tunesmith.data.formats.turns import AFTER_THE_LAST, conversation, objection
from tunesmith.data.governance.licences import permitted
from tunesmith.data.governance.withdrawn import Withdrawn, content_key
from tunesmith.data.privacy.scan import Scan, Scanner
from tunesmith.data.review.decisions import Reviewed, ReviewedRow
from tunesmith.data.settings import NEAR, WORDING, DataSettings, Source
from tunesmith.data.splitting.assignment import time_of
from tunesmith.data.splitting.groups import wording_group

_SHOWN_ROWS = 5  # of those that are refused together


def refuse_control_tokens(rows: Sequence[tuple[str, str]], otherwise: str, bases: Mapping[str, str] = {}) -> None:
    """Raise Refused where rows hold control tokens. rows: (place, reason). otherwise: what leaves these rows out.
    bases: token -> the base that it is of, where a project has several."""
    if rows:
        more = f" and {len(rows) - _SHOWN_ROWS} more" if len(rows) > _SHOWN_ROWS else ""
        count = "1 row holds" if len(rows) == 1 else f"{len(rows)} rows hold"
        held = {reason.removeprefix(f"{HAS_CONTROL} ").removesuffix(f" {EDITED}") for _, reason in rows}
        shown = ", ".join(f"{token} of {bases[token]}" if token in bases else token for token in sorted(held))
        raise Refused(
            f"{count} a control token of the base's chat template ({shown}), which a model reads as "
            "the start or end of a turn",
            where="; ".join(place for place, _ in rows[:_SHOWN_ROWS]) + more,
            fix=f"remove the tokens from these rows, or leave the rows out: {otherwise}",
        )


def control_token(messages: Conversation, tokens: Collection[str]) -> str | None:
    """Why a row with one of these tokens is removed; None for other rows."""
    held = next(filter(None, (turn.control_token(tokens) for turn in messages)), None) if tokens else None
    return held and f"{HAS_CONTROL} {held}"


class RowRules(NamedTuple):
    """The rules that every row of a build is examined by.

    count_tokens, max_tokens: the limit of a row's tokens; where either is None, no length is checked, and the record
    says so. answer_schema: JSON Schema that every answer must satisfy. control_tokens: those of the base's chat
    template, which no row may hold; of several bases, each token with its base. withdrawn: recalled rows, which are
    left out. outside: wordings of outside test sets. formats: a source's path -> its row format. unscorable: answer ->
    why the task's scorers cannot score against it, or None; such rows are removed and counted. reviewed: what reviewers
    decided. respell: whether JSON answers are written as constrained decoding writes them.
    """

    settings: DataSettings
    count_tokens: CountTokens | None = None
    max_tokens: int | None = None
    answer_schema: Schema | None = None
    control_tokens: Mapping[str, str] | Sequence[str] = ()
    withdrawn: Withdrawn = Withdrawn()
    outside: Set[str] = frozenset()
    formats: Mapping[str, row_formats.RowFormat] = {}
    unscorable: Callable[[str], str | None] | None = None
    reviewed: Reviewed = Reviewed()
    respell: bool = False


class _Removed(Exception):
    """A row is removed. example: its id, where it was computed already."""

    def __init__(self, reason: str, example: str | None = None) -> None:
        super().__init__(reason)
        self.reason, self.example = reason, example

    def of(self, row: SourceRow) -> RemovedLine:
        """As the database stores it."""
        return self.example, row.source, row.number, self.reason


class _Fitting(NamedTuple):
    """A row that waits for the privacy scan. row: with its renamed keys; original: as it was read; fitting: cut to the
    allowed length."""

    row: SourceRow
    source: Source
    licence: str
    original: Turns
    fitting: Turns


class ExaminedRows(NamedTuple):
    """Some rows after the checks, and their account."""

    kept: list[StagedRow]
    removed: list[RemovedLine]
    account: Account


class Examiner:
    """The checks of a row, in this order: format, licence, control tokens, length, privacy, answer.

    account: the counts of the rows that are examined now.
    """

    def __init__(self, rules: RowRules) -> None:
        self.rules, self.settings, self.account = rules, rules.settings, Account()
        split, attributes = self.settings.split, self.settings.attributes
        # The keys that are read in addition to the format's, and the labels that are kept with an example. A group that
        # depends on its row only is kept as its group.
        self._read_labels = {*split.keys, *attributes, split.time, split.stratify}
        self._kept_labels = {*(split.groups if split.joined else ()), *attributes, split.time, split.stratify}

    @cached_property
    def scanner(self) -> Scanner:
        """The privacy scanner, loaded for the first row: its patterns take a second."""
        return Scanner(self.settings.privacy, self.rules.answer_schema)

    def answer_objection(self, text: str) -> str | None:
        """Why an answer cannot be learned or scored: not JSON under the schema, or no scorer's reference."""
        from tunesmith.core.reading.answer_schema import satisfies

        schema = self.rules.answer_schema
        try:
            if schema is not None and not satisfies(parse_json(text), schema):
                return OFF_SCHEMA
        except NotJson:
            return OFF_SCHEMA
        return None if self.rules.unscorable is None else self.rules.unscorable(text)

    def examine(self, rows: Sequence[SourceRow], source: Source) -> ExaminedRows:
        """Some rows of one file. Many at once make the scan faster."""
        self.account = Account(read=Counter(row.source for row in rows))
        done = ExaminedRows([], [], self.account)
        waiting: list[_Fitting] = []
        for row in rows:
            try:
                waiting.append(self._before_scan(row, source))
            except _Removed as removed:
                done.removed.append(removed.of(row))
        scans = self.scanner.scan_many([one.fitting for one in waiting])
        for one, scan in zip(waiting, scans, strict=True):
            try:
                done.kept.append(self._after_scan(one, scan))
            except _Removed as removed:
                done.removed.append(removed.of(one.row))
        return done

    def _before_scan(self, read: SourceRow, source: Source) -> _Fitting:
        """A row that may go on to the scan. Raises _Removed for another one."""
        row, row_format = renamed(read, source.rename), self.rules.formats[source.path]
        turns = row_formats.read_turns(row, row_format, self.account.ignored)
        self.account.ignored.update(unread_keys(row.fields, source, row_format) - self._read_labels)
        if reason := objection(turns):
            raise _Removed(reason)
        licence = permitted(_licence(row, source), self.settings.licences, row.where)
        original = conversation(turns)
        if not turns[-1].weight:
            self.account.ignored[AFTER_THE_LAST] += 1
        if reason := control_token(original, self.rules.control_tokens):
            raise _Removed(reason)
        spelled = self._spelled(original)
        self.account.respelled += spelled != original
        return _Fitting(row, source, licence, original, self._fit(spelled, row))

    def _after_scan(self, one: _Fitting, scan: Scan, applied: Set[str] = frozenset()) -> StagedRow:
        """A row that passed all checks. Raises _Removed for another one. applied: the reviewed rows whose decisions
        made this one."""
        row, source, fitting = one.row, one.source, one.fitting
        self.account.privacy.update(scan.counts)
        self.account.fields.update(scan.fields)
        action = self.settings.privacy.action
        messages = fitting if action == "report" else scan.messages
        if scan.counts and action == "refuse":
            raise Refused(
                f"the row holds {', '.join(sorted(scan.counts))}",
                where=row.where,
                fix="clean the source, or set data.privacy.action to pseudonymise or remove",
            )
        if messages is None:
            raise _Removed(PRIVATE if action == "remove" else SPOILT_CALL)
        if self.settings.key_order == "request":
            messages = in_request_order(messages)
        name = example_id(messages, row.source)
        if scan.counts and action == "remove":
            raise _Removed(PRIVATE, name)
        if messages != fitting and self._fit(messages, row, name) != messages:
            raise _Removed(OVERLONG, name)
        if reason := self.answer_objection(messages[-1].text):
            raise _Removed(reason if self.answer_objection(fitting[-1].text) else f"{reason} {SPOILT}", name)
        templates = self._templates(messages, scan)
        earlier = learned_parts(messages)[:-1] if self.rules.outside else []
        compared = (templates, *(self._templates(part, scan) for part in earlier))
        if not all(map(self.rules.outside.isdisjoint, compared)):
            raise _Removed(OUTSIDE_WORDING, name)
        labels = self._labels(row, messages, templates[0])
        example = Example(
            id=name,
            messages=messages,
            source=row.source,
            licence=one.licence,
            group="" if self.settings.split.joined else labels[self.settings.split.groups[0]],
            subject=_label(row, source.subject_key),
            tenant=_label(row, source.tenant_key),
            region=_label(row, source.region_key),
            labels={key: value for key, value in labels.items() if key in self._kept_labels},
        )
        if self.rules.withdrawn.holds(example):
            if self.rules.withdrawn.reaches_copies(example):
                self.account.withdrawn.add(content_key(example))
            raise _Removed(WITHDRAWN, name)
        # An edited row may have been reviewed again. A decision is applied once, in case two edits undo each other.
        review = self.rules.reviewed.of(example) if not applied else self.rules.reviewed.rows.get(name)
        if review is not None and review.row not in applied:
            self.account.reviewed[review.row] += 1
            if review.decision == "reject":
                raise _Removed(review.reason, name)
            if review.decision == "edit":
                return self._edited(one, review, example, applied | {review.row})
        for edited in applied:
            contents = {self.rules.reviewed.rows[edited].content, content_key(example)}
            self.account.edits.setdefault(edited, set()).update(contents)
        if scan.originals and self.settings.privacy.originals is not None:
            self.account.originals[name] = dict(scan.originals)
        return staged_row(example, row.number, messages != one.original, self.settings.split)

    def _edited(self, one: _Fitting, review: ReviewedRow, example: Example, applied: Set[str]) -> StagedRow:
        """The row as reviewers wrote it, under the checks that every row passes. A copy of the reviewed row keeps its
        own system turn and tools; the row itself may have been reviewed before its JSON was spelled otherwise."""
        read = in_request_order(one.original) if self.settings.key_order == "request" else one.original
        itself = review.row in (example.id, example_id(read, one.row.source))
        edited = review.messages if itself else _in_frame(review.messages, example.messages)
        if reason := objection(edited) or control_token(edited, self.rules.control_tokens):
            raise _Removed(f"{reason} {EDITED}", review.row)
        fitting = self._fit(self._spelled(edited), one.row, review.row)
        return self._after_scan(one._replace(fitting=fitting), self.scanner.scan(fitting), applied)

    def _spelled(self, messages: Turns) -> Turns:
        if not self.rules.respell:
            return messages
        return tuple(
            turn.model_copy(update={"content": as_decoded(turn.content)}) if turn.role == "assistant" else turn
            for turn in messages
        )

    def _fit(self, messages: Turns, row: SourceRow, name: str | None = None) -> Turns:
        """The messages, without the oldest exchanges where truncation is allowed. Raises _Removed, with the row's name,
        where they do not fit.

        A turn is never cut in two: half an answer would teach the model to stop early. What is left begins with a
        user's turn, and offers the row's tools.
        """
        if self.rules.count_tokens is None or self.rules.max_tokens is None:
            return messages
        count_tokens, most = self.rules.count_tokens, self.rules.max_tokens

        def count(turns: Turns) -> int:
            try:
                return count_tokens(turns, most)
            except TunesmithError as error:
                plain = [
                    turn.model_copy(update={"content": "x"}) if turn.role == "assistant" and turn.content else turn
                    for turn in turns
                ]
                try:
                    count_tokens(plain, most)
                except TunesmithError:
                    error.where = f"{row.where}, {error.where}"
                    raise error from None
                raise _Removed(ALTERED, name) from error

        frame = messages[:1] if messages[0].role == "system" else ()
        spoken = messages[len(frame) :]
        length = count(messages)
        if length > most and self.settings.overlong == "truncate":
            # Without more exchanges there are fewer tokens, so a search by halves finds how many must go.
            starts, tools = [n for n, turn in enumerate(spoken) if turn.role == "user"], tools_of(messages[:1])

            def rest(start: int) -> Turns:
                return with_tools((*frame, *spoken[start:]), tools)

            gone = bisect_left(starts, True, lo=1, key=lambda start: count(rest(start)) <= most)
            messages = rest(starts[min(gone, len(starts) - 1)])
            length = count(messages)
        if length <= most:
            self.account.longest = max(self.account.longest, length)
            return messages
        if self.settings.overlong == "refuse":
            raise Refused(
                f"the conversation has {length} tokens or more, and the limit is {most}",
                where=row.where,
                fix="shorten it, set data.overlong to drop or truncate, or raise train.max_length of the candidates: "
                "the least of these is the limit, unless the base's context is shorter",
            )
        raise _Removed(OVERLONG, name)

    def _templates(self, messages: Conversation, scan: Scan) -> tuple[str, ...]:
        """The row's template, and the template without the scan's findings, which verification can recompute."""
        request, answer = request_text(messages), messages[-1].text
        names = [*self.settings.split.values, *scan.originals, *scan.originals.values()]
        return wording_group(request, answer, names), *((wording_group(request, answer),) if names else ())

    def _labels(self, row: SourceRow, messages: Conversation, template: str) -> dict[str, str]:
        """The row's labels for groups, time, stratum and attributes. Raises UsageError where one is missing."""
        split, fields = self.settings.split, row.fields
        stated = ((key, _attribute(fields, key, row)) for key in self.settings.attributes)
        labels = {key: text for key, text in stated if text is not None}
        labels |= {key: _required(_label(row, key), key, "groups rows", row) for key in split.keys}
        if split.time is not None:
            labels[split.time] = time_of(_required(fields.get(split.time), split.time, "orders rows", row), row.where)
        if split.stratify is not None:
            kind = _kind(row, messages[-1].text, split.stratify)
            labels[split.stratify] = _required(kind, split.stratify, "keeps kinds in like shares", row)
        if split.group_by is not None and (meant := {WORDING, NEAR} & fields.keys() & set(split.groups)):
            raise UsageError(
                f"the row has a key {max(meant)!r}, which has another meaning in data.split.group_by",
                where=row.where,
                fix="rename the key with the source's `rename`",
            )
        return labels | {WORDING: template}


def renamed(row: SourceRow, names: Mapping[str, str]) -> SourceRow:
    """The row after the source's renames. Raises UsageError where a new name exists already."""
    if not names:
        return row
    fields = {names.get(key, key): value for key, value in row.fields.items()}
    if len(fields) != len(row.fields):
        raise UsageError("two keys of the row have the same name after renaming", where=row.where)
    return row._replace(fields=fields)


def unread_keys(fields: Fields, source: Source, row_format: row_formats.RowFormat) -> set[str]:
    """The keys of a row that neither its format nor the source's labels read. fields: after the source's renames."""
    labels = {*_licence_keys(source), source.subject_key, source.tenant_key, source.region_key}
    return fields.keys() - (row_format.needs | row_format.also | labels)


def _in_frame(messages: Conversation, own: Conversation) -> Turns:
    """The messages with the system turn and the tools of another conversation."""
    frame = [turn for turn in own if turn.role == "system"]
    return with_tools((*frame, *(turn for turn in messages if turn.role != "system")), tools_of(own[:1]))


def _licence_keys(source: Source) -> tuple[str, ...]:
    """The keys for a row's licence: the default key in both spellings, so that none is missed."""
    return ("licence", "license") if source.licence_key == "licence" else (source.licence_key,)


def _licence(row: SourceRow, source: Source) -> str | None:
    """The row's own licence, else its source's. An empty one is none: CSV gives each row all columns."""
    stated = (_label(row, key) for key in _licence_keys(source))
    own = {licence for licence in stated if licence and licence.strip()}
    if len(own) > 1:
        raise UsageError("the row states two licences", where=row.where, fix="join them: `A AND B`")
    return own.pop() if own else source.licence


def _label(row: SourceRow, key: str) -> str | None:
    value = row.fields.get(key)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, str | int):
        raise UsageError(f"{key} is a {type(value).__name__}, not text", where=f"{row.where}, {key}")
    return row_formats.text_of({key: str(value)}, key, row.where)


def _required(value: Any, key: str, for_what: str, row: SourceRow) -> Any:
    if value in (None, ""):
        raise UsageError(
            f"the row has no {key}, by which data.split {for_what}", where=row.where, fix="add it to every row"
        )
    return value


def _attribute(fields: Fields, key: str, row: SourceRow) -> str | None:
    """The value of a kept key as text; lists and objects as JSON."""
    value = fields.get(key)
    if isinstance(value, str):
        return row_formats.text_of(fields, key, row.where)
    return None if value is None else json.dumps(value, sort_keys=True, default=str)


def _kind(row: SourceRow, answer: str, key: str) -> str | None:
    """The row's stratum: the value of its key, else of its JSON answer's key; for "answer" the whole answer."""
    if row.fields.get(key) is not None:
        return _attribute(row.fields, key, row)
    if key == "answer":
        return answer_key(answer)
    told = json_in(answer)
    return _attribute(told, key, row) if isinstance(told, dict) else None
