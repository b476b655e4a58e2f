"""Numbers as people read them, and text that strangers wrote as it may be shown."""

from __future__ import annotations

import unicodedata
from collections.abc import Callable, Mapping
from datetime import datetime
from typing import Any

from tunesmith.core.digests import is_digest, short

_SHOWN_CHARACTERS = 900
_HIDING = frozenset(("Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp"))


def percent(share: float) -> str:
    """A share as a percentage that never rounds to all or nothing unless it is: 0.9996 is 99.9%, not 100%."""
    if share in (0.0, 1.0):
        return f"{share:.0%}"
    return f"{min(max(share * 100, 0.1), 99.9):.1f}%"


def points(difference: float) -> str:
    """A difference of shares in points, signed: 0.05 is +5.0."""
    text = f"{difference * 100:+.1f}"
    return "0.0" if text in ("+0.0", "-0.0") else text.replace("-", "−")


def visible(text: str) -> str:
    """Text as it may be shown: what hides or reorders is written as its code point, the end of a long text is cut."""
    shown = "".join(_written(letter) for letter in text[:_SHOWN_CHARACTERS])
    more = len(text) - _SHOWN_CHARACTERS
    return f"{shown} … and {more:,} more characters" if more > 0 else shown


def detail_text(detail: Any) -> str:
    """An audit entry's detail in a line: names and plain values, digests shortened."""
    if isinstance(detail, Mapping):
        return ", ".join(
            f"{key}: {detail_text(value)}" for key, value in detail.items() if value not in (None, "", {}, [])
        )
    if isinstance(detail, list | tuple):
        return " ".join(detail_text(value) for value in detail)
    text = str(detail)
    return short(text) if is_digest(text) else text


def gigabytes(count: float) -> str:
    """Bytes as GB."""
    return f"{count / 1e9:.2f} GB"


def duration(seconds: float) -> str:
    """Seconds as people say them."""
    if seconds < 120:
        return f"{seconds:.1f} s" if seconds < 10 else f"{seconds:.0f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes < 120 else f"{minutes // 60} h {minutes % 60} min"


def expected(measured: float, estimate: float, written: Callable[[float], str]) -> str:
    """What was expected of a measurement, and how far off that was."""
    if estimate <= 0:
        return "nothing was expected"
    return f"{written(estimate)} expected, {abs(measured / estimate - 1):.0%} off"


def moment(stamp: str) -> str:
    """An ISO 8601 moment to the second, as people read it."""
    try:
        return datetime.fromisoformat(stamp).strftime("%Y-%m-%d %H:%M:%S %Z")
    except ValueError:
        return stamp


def p_value(probability: float) -> str:
    """A p-value without false precision."""
    return "< 0.0001" if probability < 0.0001 else f"{probability:.2g}"


def money(amount: float | None) -> str:
    """An amount with the digits that matter; a dash where no price is stated."""
    if amount is None:
        return "–"
    return f"{amount:,.2f}" if amount == 0 or amount >= 1 else f"{amount:.2g}"


def signed_money(amount: float) -> str:
    """An amount with its sign."""
    return f"−{money(-amount)}" if amount < 0 else money(amount)


def count(number: float) -> str:
    """A count with separators for thousands."""
    return f"{number:,.0f}"


def _written(letter: str) -> str:
    if letter in "\n\t" or unicodedata.category(letter) not in _HIDING:
        return letter
    return f"⟨U+{ord(letter):04X}⟩"
