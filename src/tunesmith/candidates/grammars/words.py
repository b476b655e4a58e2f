"""Words of a request: the pieces that a copied value may begin and end with.

A piece is a word (letters and digits, with their accents), or one symbol, as a reader sees it. Decimals, thousands and
times of day are one piece (5.5, 1,000, 10:30), so a number is never cut. In scripts that put no spaces between words,
such as Chinese or Thai, each letter is a piece; so is each syllable of Korean, which writes endings onto names. What is
longer than any word, such as a pasted key, is cut into several pieces: the automaton of a grammar cannot hold a piece
of a thousand characters.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Sequence
from itertools import accumulate
from typing import Final

import regex

# What belongs to the letter before it: also signs for a long or voiced sound in Japanese, and the further letters of a
# Korean syllable that is spelled out, and the hidden letters of a flag.
_MARKS: Final = (
    r"[\p{M}\u200c\u200d\U0001f3fb-\U0001f3ff\U000e0020-\U000e007f"
    r"\u30fc\uff70\uff9e\uff9f\u1160-\u11ff\ud7b0-\ud7ff]*+"
)
_UNSPACED: Final = r"\p{Han}\p{Hiragana}\p{Katakana}\p{Hangul}\p{Thai}\p{Lao}\p{Khmer}\p{Myanmar}"
_IN_NUMBERS: Final = r"[.,:\uff0e\uff0c\uff1a\u066b\u066c]"  # full-width and Arabic ones too
_PIECES: Final = regex.compile(
    rf"(?P<space>[\s\p{{Z}}]++)|(?P<half>\p{{Cs}})"
    rf"|[[{_UNSPACED}]--[\p{{Nd}}]]{_MARKS}"
    rf"|(?:\p{{Nd}}++(?:{_IN_NUMBERS}\p{{Nd}}++)*+[\ufe0f\u20e3]*+|[[\p{{L}}\p{{N}}_]--[\p{{Nd}}{_UNSPACED}]]{_MARKS})++"
    # The two letters of a flag, or a symbol with those that are joined to it, such as the members of a family.
    rf"|[\U0001f1e6-\U0001f1ff]{{2}}|.{_MARKS}(?:(?<=\u200d)\p{{Extended_Pictographic}}{_MARKS})*+",
    regex.V1 | regex.DOTALL,
)
SPACE: Final = " "
_LONGEST: Final = 100  # characters of a piece
END: Final = "\n"  # between turns, and in place of half of a surrogate pair: no value goes across
_NEVER: Final = 1 << 40  # the length of an END: longer than any value


def pieces(texts: Iterable[str]) -> list[str]:
    """The pieces of texts in order. SPACE stands for any whitespace between two pieces, END for the end of a text."""
    parts: list[str] = []
    for text in texts:
        for match in _PIECES.finditer(text):
            piece = SPACE if match["space"] else END if match["half"] else match[0]
            parts += [piece[at : at + _LONGEST] for at in range(0, len(piece), _LONGEST)]
        parts.append(END)
    return parts


def is_copied(value: str, given: Sequence[str]) -> bool:
    """Whether a value is a run of one or more of the given pieces, without whitespace at its ends.

    Whitespace between its pieces must be single spaces, whatever stands there in the text.
    """
    if not value or SPACE in (value[0], value[-1]) or END in value:
        return False
    text, ends = "".join(given), {0, *accumulate(map(len, given))}
    return any(start + len(value) in ends and text.startswith(value, start) for start in ends)


def has_run(given: Sequence[str], least: int, most: int | None) -> bool:
    """Whether a run of the given pieces, without whitespace at its ends, has from least to most characters."""
    longest = _NEVER - 1 if most is None else most
    places = [0, *accumulate(_NEVER if piece == END else len(piece) for piece in given)]
    for first, piece in enumerate(given):
        if piece in (SPACE, END):
            continue
        last = bisect_left(places, places[first] + least, lo=first + 1)
        last += last < len(places) and given[last - 1] == SPACE
        if last < len(places) and places[last] - places[first] <= longest:
            return True
    return False
