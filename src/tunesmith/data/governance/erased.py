"""Texts that are to be erased: how they are found elsewhere, and how a file or record is rewritten without them.

A text is found by its sentences and lines, folded as the privacy scan folds, wherever one of at least `SHORTEST`
characters stands. Shorter ones ("Yes.") say nothing about a person where they stand alone.

What is rewritten depends on the old bytes and on two lists without texts alone: the ids of lines that are left out, and
the places of strings that are cut. So it can be repeated on a restored backup, and gives the same bytes.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Iterator
from typing import Any

from tunesmith.core.digests import canonical, canonical_lines, digest_bytes, is_digest, short
from tunesmith.core.reading.strict_json import JsonObject, parse_json
from tunesmith.core.text.folding import fold

SHORTEST = 24  # characters of a sentence that is looked for
_ENDS = re.compile(r"(?<=[.!?])\s+|[\n\r\t]+")
_ESCAPED = re.compile(r"\\(?:u([0-9a-fA-F]{4})|[nrt])")
_QUOTES = re.compile(r"[\\\"'`\u2018-\u201f]+")
_STARTS = re.compile(r"\b\w")
_STRING = re.compile(r'"(?:[^"\\]++|\\.)*+"')
CUT = "[erased"  # what every string begins with that stands for a cut one
# Of a line about a row, the keys under which its text or an answer to it may stand.
_SAID = frozenset(("text", "detail", "why", "content", "fields"))


def sentences(text: str) -> Iterator[str]:
    """The folded sentences and lines of a text that are long enough to be looked for."""
    for part in _ENDS.split(_unescaped(text)):
        folded = _spelled(part)
        if (start := _STARTS.search(folded)) and len(found := folded[start.start() :]) >= SHORTEST:
            yield found


def _spelled(text: str) -> str:
    """A text as it is compared: folded, without quotes and backslashes, by which it may stand in another text."""
    return fold(_QUOTES.sub("", text))


def _unescaped(text: str) -> str:
    """A text that may hold JSON, as a message of a log does, with the characters that its escapes stand for."""
    if "\\" not in text:
        return text
    plain = _ESCAPED.sub(lambda match: chr(int(match[1], 16)) if match[1] else "\n", text)
    return plain.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


class Sentences:
    """Sentences that are looked for. The time grows with the text, not with their number."""

    def __init__(self, wanted: Iterable[str]) -> None:
        self._by_start: defaultdict[str, list[str]] = defaultdict(list)
        for sentence in wanted:
            self._by_start[sentence[:SHORTEST]].append(sentence)

    def within(self, text: str) -> Iterator[str]:
        """Those that stand in a text."""
        if len(text) < SHORTEST or not self._by_start:
            return
        spelled = _spelled(_unescaped(text))
        for start in (match.start() for match in _STARTS.finditer(spelled)):
            for sentence in self._by_start.get(spelled[start : start + SHORTEST], ()):
                if spelled.startswith(sentence, start):
                    yield sentence

    def stand_in(self, value: Any) -> bool:
        """Whether one stands in a string of a JSON value."""
        return any(next(self.within(text), None) is not None for text in strings(value))


def strings(value: Any) -> Iterator[str]:
    """Every string of a JSON value, keys too."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for key, each in value.items():
            yield key
            yield from strings(each)
    elif isinstance(value, list):
        for each in value:
            yield from strings(each)


class Erased:
    """What is erased of rows or passages: everything of the lines that have these ids, and their texts elsewhere.

    turns: the folded turns of each row, so that a shot that is one is found, however short.
    """

    def __init__(self, ids: Collection[str], wanted: Iterable[str], turns: Collection[tuple[str, ...]]) -> None:
        self.ids, self.sentences, self._turns = frozenset(ids), Sentences(wanted), frozenset(turns)
        self._shortest = min(SHORTEST, *map(len, self.ids), SHORTEST)

    def cut(self, data: bytes, *, lines: bool) -> tuple[str, ...]:
        """The places of the strings to cut in a record, or in a file of evidence, each line of which stays."""
        return tuple(self._places(_parsed(data, lines))) if self._may_be_in(data.decode()) else ()

    def _may_be_in(self, text: str) -> bool:
        """Whether JSON has to be looked at place by place. This is quick, and no for nearly all of a store's files."""
        if self._turns and '"content"' in text:
            return True
        found = (parse_json(one) for one in set(_STRING.findall(text)) if len(one) > self._shortest)
        return any(one in self.ids or (not is_digest(one) and self.sentences.stand_in(one)) for one in found)

    def _places(
        self, value: Any, place: str = "", key: str = "", said: Collection[str] = (), *, whole: bool = False
    ) -> Iterator[str]:
        """key: the value's. said: keys under which every string is cut. whole: it stands under one of them."""
        if isinstance(value, str):
            if whole or key in self.ids or next(self.sentences.within(value), None) is not None:
                yield place
        elif isinstance(value, list):
            said = ("content",) if self._turns and turns_of(value) in self._turns else ()
            for number, each in enumerate(value):
                yield from self._places(each, f"{place}/{number}", key, said, whole=whole)
        elif isinstance(value, dict):
            said = _SAID if value.get("id") in self.ids else said
            for number, name in enumerate(sorted(value)):
                yield from self._places(name, f"{place}/{number}#", whole=whole)
                yield from self._places(value[name], f"{place}/{number}", name, whole=whole or name in said)


def turns_of(value: Any) -> tuple[str, ...]:
    """The folded contents of a conversation's turns; () for what is no conversation."""
    if not isinstance(value, list) or not all(isinstance(turn, dict) and "content" in turn for turn in value):
        return ()
    return tuple(_spelled(str(turn["content"])) for turn in value)


def named_lines(data: bytes) -> list[tuple[str, JsonObject]]:
    """The lines of a file with their ids; for one without an id its own digest, whatever stands around it."""
    lines = ((raw, parse_json(raw)) for raw in data.splitlines())
    return [(str(line.get("id") or f"line {short(digest_bytes(raw))}"), line) for raw, line in lines]


def rewritten(data: bytes, rows: Collection[str], cut: Collection[str], *, lines: bool) -> bytes:
    """The bytes that are left of a file or record, from the ids of lines that are left out, or the places of strings
    that are cut: equal ones get equal other texts, which no other file has. The other lines keep their bytes."""
    gone, known, of = frozenset(rows or cut), dict[str, str](), short(digest_bytes(data))
    if rows:
        raw, named = data.splitlines(keepends=True), named_lines(data)
        # Older statements name a line without an id by the file and its number.
        names = [{name, f"{of}#{number}"} for number, (name, _) in enumerate(named)]
        return b"".join(line for name, line in zip(names, raw, strict=True) if name.isdisjoint(gone))

    def other(place: str, text: str) -> str:
        return known.setdefault(text, f"{CUT} {of} {len(known)}]") if place in gone else text

    whole = with_texts(_parsed(data, lines), other)
    return canonical_lines(whole) if lines else canonical(whole)


def with_texts(value: Any, other: Callable[[str, str], str], place: str = "") -> Any:
    """A JSON value with other strings, keys too. other: a string's place and the string -> what stands there then."""
    if isinstance(value, str):
        return other(place, value)
    if isinstance(value, list):
        return [with_texts(each, other, f"{place}/{number}") for number, each in enumerate(value)]
    if isinstance(value, dict):
        # Places number the keys, since a key may be a text.
        numbered = [(f"{place}/{number}", name) for number, name in enumerate(sorted(value))]
        return {with_texts(name, other, f"{at}#"): with_texts(value[name], other, at) for at, name in numbered}
    return value


def _parsed(data: bytes, lines: bool) -> Any:
    return [parse_json(line) for line in data.splitlines()] if lines else parse_json(data)
