"""What differs between two texts, word by word."""

from __future__ import annotations

import re
from collections.abc import Iterator
from difflib import SequenceMatcher
from typing import Literal, NamedTuple

# A word, a mark, or white space. Texts with more of them are compared by lines: the time grows with their square.
_PIECE = re.compile(r"\w+|\s+|[^\w\s]")
_MOST_PIECES = 2000

Kind = Literal["same", "added", "removed"]


class Change(NamedTuple):
    """A piece of the new text (same, added) or of the old one (removed)."""

    kind: Kind
    text: str


def differences(old: str, new: str) -> list[Change]:
    """How old becomes new, in the order of reading. Joined without `added` it is old, without `removed` it is new."""
    left, right = _PIECE.findall(old), _PIECE.findall(new)
    if max(len(left), len(right)) > _MOST_PIECES:
        left, right = old.splitlines(keepends=True), new.splitlines(keepends=True)
    if max(len(left), len(right)) > _MOST_PIECES:
        left, right = [old], [new]
    return list(_changes(left, right))


def _changes(left: list[str], right: list[str]) -> Iterator[Change]:
    for tag, a, b, c, d in SequenceMatcher(None, left, right).get_opcodes():
        if tag == "equal":
            yield Change("same", "".join(left[a:b]))
            continue
        if a < b:
            yield Change("removed", "".join(left[a:b]))
        if c < d:
            yield Change("added", "".join(right[c:d]))
