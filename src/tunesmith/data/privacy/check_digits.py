"""Finds card numbers and IBANs however they are spaced or cased: their check digits tell them from other numbers."""

from __future__ import annotations

import functools
import itertools
import re
from collections.abc import Iterator

from tunesmith.data.privacy.names import without_torch

# Up to three characters between digits, as in "4111 - 1111" or over a line's end.
_GAP = r"[\W_]{0,3}"
_MAY_BE_CARD = re.compile(rf"(?:\d{_GAP}){{12}}\d")
_DIGITS = re.compile(rf"\d+(?:{_GAP}\d+)*")
_GROUP = re.compile(r"\d+")
# The first digits that issuers of cards use -> the lengths of their numbers.
_ISSUED = (
    (re.compile("4"), (13, 16, 19)),  # Visa
    (re.compile("5[1-5]|2(?:22[1-9]|2[3-9]|[3-6]|7[01]|720)"), (16,)),  # Mastercard
    (re.compile("3[47]"), (15,)),  # American Express
    (re.compile("6(?:011|4[4-9]|5|2)"), (16, 19)),  # Discover, UnionPay
    (re.compile("35(?:2[89]|[3-8])"), (16,)),  # JCB
    (re.compile("3(?:0[0-5]|[689])"), (14, 16)),  # Diners
)
_LENGTHS = frozenset(length for _, lengths in _ISSUED for length in lengths)
_GROUPS = frozenset(
    ((4, 4, 4, 4), (4, 6, 5), (4, 6, 4), (4, 4, 4, 4, 3), (4, 3, 3, 3), (8, 8), (6, 10), (16,), (15,), (14,))
)

_CHECK = re.compile(rf"\d{_GAP}\d(?=(?:{_GAP}[A-Za-z0-9]){{11}})")
_COUNTRY = re.compile(rf"(?:(?<![^\W_])|(?<=(?i:iban)))[A-Za-z]{_GAP}[A-Za-z]{_GAP}$")
_BEFORE = 12  # characters that hold the country, and the word IBAN before it
_LETTER = re.compile(r"[A-Za-z0-9]")
_LONGEST, _WIDEST = 34 * 4, 4  # characters of an IBAN; from one letter to the next


def find_cards(text: str) -> Iterator[tuple[int, int]]:
    """(start, end) of card numbers whose digits are grouped in a usual way, evenly, or cut by line breaks."""
    if _MAY_BE_CARD.search(text) is None:
        return
    for run in _DIGITS.finditer(text):
        groups = [group.span() for group in _GROUP.finditer(text, *run.span())]
        done = -1
        for first, (start, _) in enumerate(groups):
            if start < done or text[start] not in "23456":
                continue
            digits, sizes = "", list[int]()
            for low, high in groups[first:]:
                digits += text[low:high]
                sizes.append(high - low)
                if len(digits) > 19:
                    break
                if len(digits) in _LENGTHS and _luhn(digits) and _issued(digits) and _grouped(sizes, text[start:high]):
                    yield start, high
                    done = high
                    break


def _issued(digits: str) -> bool:
    return any(first.match(digits) and len(digits) in lengths for first, lengths in _ISSUED)


def _grouped(sizes: list[int], text: str) -> bool:
    even = len(set(sizes[:-1])) <= 1 and 0 < sizes[-1] <= sizes[0] <= 5
    return tuple(sizes) in _GROUPS or even or all("\n" in gap for gap in re.findall(r"\D+", text))


def _luhn(digits: str) -> bool:
    """Whether the last digit is the check digit of the others (ISO/IEC 7812-1)."""
    places = [int(digit) for digit in reversed(digits)]
    return (sum(places[::2]) + sum(_DOUBLED[place] for place in places[1::2])) % 10 == 0


_DOUBLED = (0, 2, 4, 6, 8, 1, 3, 5, 7, 9)  # the sum of the digits of twice a digit


def find_ibans(text: str) -> Iterator[tuple[int, int]]:
    """(start, end) of IBANs in any case and spacing, with their country's length and form and valid check digits."""
    for check in _CHECK.finditer(text):
        country = _COUNTRY.search(text, max(0, check.start() - _BEFORE), check.start())
        if country is None:
            continue
        start = country.start()
        places = [one.start() for one in _LETTER.finditer(text, start, start + _LONGEST)]
        letters = "".join(text[place] for place in places).upper()
        form = _forms().get(letters[:2])
        whole = form.match(letters) if form is not None else None
        if whole is None:
            continue
        used = places[: whole.end()]
        tight = all(right - left <= _WIDEST for left, right in itertools.pairwise(used))
        if tight and int("".join(str(int(letter, 36)) for letter in whole[0][4:] + whole[0][:4])) % 97 == 1:
            yield start, used[-1] + 1


@functools.cache
def _forms() -> dict[str, re.Pattern[str]]:
    """Country -> the form of its IBANs without spaces (presidio's table)."""
    with without_torch():
        from presidio_analyzer.predefined_recognizers.generic.iban_patterns import regex_per_country

    return {country: re.compile(form.rstrip("$")) for country, form in regex_per_country.items()}
