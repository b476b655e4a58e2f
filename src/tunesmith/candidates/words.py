"""Words of a request: the pieces that a copied value may begin and end with.

A piece is a word (letters and digits, with their accents), or one symbol. Decimals, thousands and times of day are one
piece (5.5, 1,000, 10:30), so a number is never cut. In scripts that put no spaces between words, such as Chinese or
Thai, each letter is a piece.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Final

import regex

_MARKS: Final = r"[\p{M}\u200c\u200d\U0001f3fb-\U0001f3ff]*+"
_UNSPACED: Final = r"\p{Han}\p{Hiragana}\p{Katakana}\p{Thai}\p{Lao}\p{Khmer}\p{Myanmar}"
_PIECES: Final = regex.compile(
    rf"(?P<space>[\s\p{{Z}}]++)|(?P<half>\p{{Cs}})"
    rf"|[{_UNSPACED}]{_MARKS}"
    rf"|(?:\p{{Nd}}++(?:[.,:]\p{{Nd}}++)*+|[[\p{{L}}\p{{N}}_]--[\p{{Nd}}{_UNSPACED}]]{_MARKS})++"
    rf"|.{_MARKS}",
    regex.V1 | regex.DOTALL,
)
SPACE: Final = " "
END: Final = "\n"  # between turns, and in place of half of a surrogate pair: no value goes across


def pieces(texts: Iterable[str]) -> list[str]:
    """The pieces of texts in order. SPACE stands for any whitespace between two pieces, END for the end of a text."""
    found: list[str] = []
    for text in texts:
        for match in _PIECES.finditer(text):
            found.append(SPACE if match["space"] else END if match["half"] else match[0])
        found.append(END)
    return found


def is_copied(value: str, given: Sequence[str]) -> bool:
    """Whether a value is a run of one or more of the given pieces, without whitespace at its ends.

    Whitespace between its pieces must be single spaces, whatever stands there in the text.
    """
    wanted = pieces([value])[:-1]
    if not wanted or "".join(wanted) != value or SPACE in (wanted[0], wanted[-1]):
        return False
    return any(given[start : start + len(wanted)] == wanted for start in range(len(given) - len(wanted) + 1))
