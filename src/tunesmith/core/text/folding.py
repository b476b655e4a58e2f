"""Forms of a text for comparison, in which spellings that look alike to a reader are equal.

`visible` keeps every difference that a reader can see except case, width and spacing: 2⁵ is not 25. `fold` also
removes accents and replaces look-alike letters, so it is for grouping and searching: it makes some different words
equal, "résumé" and "resume" for example. `plain` is for patterns: the text as it stands, without hidden
characters and with plain ones for those that only look different. None is for showing or training.

Unicode's data: default-ignorable characters and scripts from `regex`, decompositions from `unicodedata`, look-alikes
(confusables.txt, UTS 39) from `confusable_homoglyphs`.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence
from functools import cache

import regex

# Not shown: default-ignorable and control characters, marks of interlinear notes, and the Greek iota below a letter,
# which case folding would turn into a letter.
_HIDDEN = regex.compile(r"[[\p{DI}\p{Cc}\uFFF9-\uFFFB\u0345]--\s\x1c-\x1f]", regex.V1)
_BLANK = "\u2800"  # the empty Braille pattern: looks like a space, but is a symbol
# Accents of the general blocks are removed from all letters: no script but Latin, Greek and Cyrillic spells with them.
# Other scripts' marks (vowels, tones, points, voicing) make other words: they are removed where they stand on a Latin,
# Greek or Cyrillic letter only. After a mathematical sign an accent is a negation.
_ACCENTS = r"\u0300-\u036F\u0483-\u0489\u1AB0-\u1AFF\u1DC0-\u1DFF\u20D0-\u20FF\uFE20-\uFE2F"
_MARKS = regex.compile(
    rf"(?<=[\p{{Latin}}\p{{Greek}}\p{{Cyrillic}}&&\p{{L}}])[\p{{M}}{_ACCENTS}]+|(?<!\p{{Sm}}\p{{M}}*)[{_ACCENTS}]+",
    regex.V1,
)
# Letters of these scripts are forged into words of another. Scripts without capital letters are left alone: Arabic alef
# looks like l and Hebrew samekh like o, but nobody mixes up the words. Nor are currencies and CJK marks letters.
_FORGED_WITH = regex.compile(
    r"[[\p{Latin}\p{Greek}\p{Cyrillic}\p{Armenian}\p{Cherokee}\p{Coptic}\p{Lisu}\p{Deseret}\p{Common}]"
    r"--\p{Sc}--[\u3000-\u31FF]]",
    regex.V1,
)
_LATIN = regex.compile(r"\p{Latin}")
_PHONETIC = regex.compile(r"[\u0250-\u02AF\u1D00-\u1DBF\uA720-\uA7FF]")  # Latin letters of no alphabet
# England, Scotland and Wales: a black flag and hidden letters, which choose the flag that is shown.
_FLAG = regex.compile(
    "(\U0001f3f4\U000e0067\U000e0062(?:\U000e0065\U000e006e\U000e0067|\U000e0073\U000e0063\U000e0074"
    "|\U000e0077\U000e006c\U000e0073)\U000e007f)"
)
_RAISED = ("<super>", "<sub>", "<fraction>")  # decompositions that change what a reader sees
_STYLED = regex.compile(r"(?:LATIN (?:CAPITAL |SMALL )?LETTER (?:SMALL CAPITAL )?|SYMBOL LETTER )([A-Z])$")


def visible(text: str) -> str:
    """The text in one Unicode form, lower case, with single spaces and without characters that are not shown.

    The form is NFKC, except that raised and lowered characters and fractions stay as they are.
    """
    if text.isascii():
        return _ascii(text)
    parts = _FLAG.split(text)
    parts[::2] = [part.translate(_VISIBLE) for part in parts[::2]]
    return _spaced(unicodedata.normalize("NFC", "".join(parts)))


def fold(text: str) -> str:
    """The visible text without accents, with look-alike letters and digits of other scripts as ASCII ones.

    fold(fold(text)) == fold(text).
    """
    if text.isascii():
        return _ascii(text)
    return _spaced(unicodedata.normalize("NFC", _MARKS.sub("", text.translate(_FOLDED))))


def plain(text: str) -> str:
    """The text without hidden characters and combining accents, with ASCII for what looks like it or counts as it.

    Case, spacing, accented Latin letters, raised characters and fractions stay. So do words in other scripts: a letter
    is replaced by the Latin one that it looks like only in a word with Latin letters or digits.
    """
    return text if text.isascii() else "".join(_plain_spellings(text))


def plain_with_offsets(text: str) -> tuple[str, Sequence[int]]:
    """(plain(text), offsets): the place in the text that each plain character comes from."""
    if text.isascii():
        return text, range(len(text))
    spellings = _plain_spellings(text)
    return "".join(spellings), [place for place, spelling in enumerate(spellings) for _ in spelling]


_TOKEN = regex.compile(r"\S+|[^\S \t\r\n]+", regex.V1)
_LATIN_OR_DIGIT = regex.compile(r"[A-Za-z0-9@]", regex.V1)


def _plain_spellings(text: str) -> list[str]:
    """For each character of the text what stands for it in the plain text."""
    spellings = list(text)
    for token in _TOKEN.finditer(text):
        if not token[0].isascii():
            alike = _LATIN_OR_DIGIT.search(token[0]) is not None
            spellings[token.start() : token.end()] = (_plainly(letter, alike) for letter in token[0])
    return spellings


def fold_with_offsets(text: str) -> tuple[str, Sequence[int]]:
    """(fold(text), offsets): the place in the text that each folded character comes from, and len(text) at the end.

    What folded[i:j] comes from lies in text[offsets[i]:offsets[j]], with the hidden characters and spaces after it.
    """
    if text.isascii() and len(folded := _ascii(text)) == len(text):
        return folded, range(len(text) + 1)
    spellings = [_FOLDED[point] for point in map(ord, text)]
    spelt = "".join(spellings)
    places = [place for place, spelling in enumerate(spellings) for _ in spelling]
    for match in reversed(list(_MARKS.finditer(spelt))):
        del places[match.start() : match.end()]
    spelt = _MARKS.sub("", spelt)
    if not unicodedata.is_normalized("NFC", spelt):
        parts = [(match.start(), unicodedata.normalize("NFC", match[0])) for match in _COMPOSED.finditer(spelt)]
        places = [places[start] for start, part in parts for _ in part]
        spelt = "".join(part for _, part in parts)
    words = list(_WORD.finditer(spelt))
    offsets = [place for word in words for place in places[word.start() : word.end() + 1]]
    if words and words[-1].end() < len(spelt):  # the space after the last word is not kept
        offsets.pop()
    return " ".join(word[0] for word in words), [*offsets, len(text)]


# What composition may join: a character with the marks, or the Hangul parts, that follow it.
_COMPOSED = regex.compile(r"\X", regex.V1)
_WORD = regex.compile(r"[^\s\x1c-\x1f]+", regex.V1)
_CONTROLS = dict.fromkeys(point for point in (*range(32), 127) if not chr(point).isspace())


def _ascii(text: str) -> str:
    return _spaced((text if text.isprintable() else text.translate(_CONTROLS)).lower())


def _spaced(text: str) -> str:
    return " ".join(text.split())


class _Compatible(dict[int, str]):
    """Code point -> what stands for the character before composition. Characters are worked out when first seen."""

    def __missing__(self, point: int) -> str:
        self[point] = spelling = self.spelling(chr(point))
        return spelling

    def spelling(self, letter: str) -> str:
        for _ in range(2):  # a decomposition may hold capitals, and a lower-case letter may have a decomposition
            letter = _HIDDEN.sub("", self.decomposed(letter)).casefold()
        shown: str = _HIDDEN.sub("", self.decomposed(letter))
        return shown.replace(_BLANK, " ")

    def decomposed(self, text: str) -> str:
        return unicodedata.normalize("NFKD", text)


class _Visible(_Compatible):
    def decomposed(self, text: str) -> str:
        return "".join(map(self._seen, unicodedata.normalize("NFD", text)))

    def _seen(self, letter: str) -> str:
        kind, *points = unicodedata.decomposition(letter).split() or [""]
        return letter if kind in ("", *_RAISED) else self.decomposed("".join(chr(int(one, 16)) for one in points))


class _Folded(_Compatible):
    def spelling(self, letter: str) -> str:
        return "".join(_plain(one) for one in super().spelling(letter))


def _plain(letter: str) -> str:
    """The ASCII letter or digit that a character looks like or counts as; otherwise the character. Marks stay: which
    marks are removed depends on the letters that they stand on."""
    if letter.isascii() or unicodedata.category(letter).startswith("M"):
        return letter
    value = unicodedata.decimal(letter, None)
    if value is not None:
        return str(value)
    styled = _STYLED.search(unicodedata.name(letter, ""))  # small capitals, and letters in boxes, circles and flags
    return styled[1].lower() if styled else _lookalikes().get(letter, letter)


@cache
def _plainly(letter: str, alike: bool) -> str:
    """How a character is written plainly. alike: whether a letter of another script becomes the Latin one that it looks
    like."""
    if letter.isascii() or letter.isspace():
        return letter if letter.isascii() else " "
    folded = fold(letter)
    if not folded or unicodedata.decimal(letter, None) is not None:
        return folded
    if unicodedata.decomposition(letter).startswith(_RAISED):
        return letter
    compatible = unicodedata.normalize("NFKC", letter)
    accented = unicodedata.name(letter, "").startswith("LATIN") and not _PHONETIC.match(letter)
    if compatible != letter or accented or not alike:
        return compatible
    return folded.upper() if letter.isupper() else folded


@cache
def _lookalikes() -> dict[str, str]:
    """Character in lower case -> the ASCII text that it looks like, or that its capital letter looks like.

    Only Latin letters stand for several letters or lose a stroke: in other scripts such letters are others.
    """
    from confusable_homoglyphs.confusables import confusables_data

    alike: dict[str, str] = {}
    for letter, others in confusables_data.items():
        name = _COMPATIBLE.spelling(letter)
        if len(name) != 1 or name.isascii() or not _FORGED_WITH.fullmatch(name):
            continue
        for other in others:
            text = _COMPATIBLE.spelling(other["c"])
            if _LATIN.match(name):
                text = _MARKS.sub("", text)
            single = len(text) == 1 and not text.isdigit() and not text.isspace()
            if not text.isascii() or not (single or (_LATIN.match(name) and text.isalpha())):
                continue
            if letter == name:
                alike[name] = text
            else:  # a capital: only where the small letter looks like nothing
                alike.setdefault(name, text)
    return alike


_COMPATIBLE, _VISIBLE, _FOLDED = _Compatible(), _Visible(), _Folded()
