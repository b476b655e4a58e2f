"""Texts that make a backtracking pattern slow: its own beginnings and short strings, repeated."""

from __future__ import annotations

import itertools
import random
import re
import re._parser as sre  # type: ignore[import-not-found]  # how Python reads a pattern; `re` has no other way
from collections.abc import Iterator
from typing import Any

LETTERS = "a1 \n./@-:"
# Beginnings after which many places look alike: of addresses, names, telephone numbers, web addresses, tokens.
UNITS = ("a 1", "Aa 1 ", "1 Aa ", "12 Aa Rd, ", "12345 ", "12/", "www1.a.", "a.a@", "eyJ", "eyJa-", "sk-A", "0x41 ",
         "&#64;", "%41", "[at]", "a dot ", "+1 (", "aaaa\n", "password is ", "aws a", "1.1.1.1 ",
         "a.com ", "4 ")  # fmt: skip
_KINDS = {"CATEGORY_DIGIT": "1", "CATEGORY_SPACE": " ", "CATEGORY_NOT_WORD": "-"}


def short_units() -> list[str]:
    """Strings of one and two letters, and UNITS."""
    pairs = ["".join(pair) for pair in itertools.permutations(LETTERS, 2)]
    return [*LETTERS, *pairs, *UNITS]


def pumped(unit: str, size: int) -> str:
    """The unit, repeated up to a size."""
    return (unit * (size // len(unit) + 1))[:size]


def own_texts(pattern: str, size: int, samples: int) -> Iterator[str]:
    """Texts of the pattern's own beginnings: one repeated, and one followed by many equal letters."""
    draw = random.Random(pattern)
    tree = sre.parse(re.sub(r"^\(\?[a-z]+\)", "", pattern))
    found = {_matching(tree, draw)[:120] for _ in range(samples)} - {""}
    for text in sorted(found):
        for end in {len(text), *draw.sample(range(1, len(text) + 1), min(3, len(text)))}:
            begun = text[:end]
            yield pumped(begun, size)
            for letter in {begun[-1], *" \n1"}:
                yield begun + letter * size


def _matching(tree: Any, draw: random.Random) -> str:
    """A text that the pattern matches, but for its lookarounds."""
    text = ""
    for code, value in tree:
        kind = str(code)
        if kind == "LITERAL":
            text += chr(value)
        elif kind in ("ANY", "NOT_LITERAL"):
            text += "a"
        elif kind == "IN":
            text += _letter(value, draw)
        elif kind == "BRANCH":
            text += _matching(draw.choice(value[1]), draw)
        elif kind == "SUBPATTERN":
            text += _matching(value[3], draw)
        elif kind in ("MAX_REPEAT", "MIN_REPEAT", "POSSESSIVE_REPEAT"):
            least, most, inner = value
            text += "".join(_matching(inner, draw) for _ in range(draw.randint(least, min(int(most), least + 2))))
        elif kind == "ATOMIC_GROUP":
            text += _matching(value, draw)
    return text


def _letter(choices: Any, draw: random.Random) -> str:
    code, value = draw.choice(choices)
    if str(code) == "LITERAL":
        return chr(value)
    if str(code) == "RANGE":
        return chr(value[0])
    return _KINDS.get(str(value), "a")
