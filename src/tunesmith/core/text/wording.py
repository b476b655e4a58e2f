"""Formats numbers for readers, and makes untrusted text safe to show."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from datetime import datetime
from decimal import Decimal
from typing import Any

from tunesmith.core.digests import is_digest, short
from tunesmith.core.text.display import printable

_SHOWN_CHARACTERS = 900


def percent(share: float) -> str:
    """A share as a percentage. Only 0 and 1 become 0% and 100%: 0.9996 is 99.9%."""
    if share in (0.0, 1.0):
        return f"{share:.0%}"
    return f"{min(max(share * 100, 0.1), 99.9):.1f}%"


def points(difference: float) -> str:
    """A difference of two shares in percentage points, with its sign: 0.05 is +5.0."""
    text = f"{difference * 100:+.1f}"
    return "0.0" if text in ("+0.0", "-0.0") else text.replace("-", "−")


def visible(text: str) -> str:
    """Untrusted text for display: invisible and reordering characters become code points; long text is cut."""
    shown = printable(text[:_SHOWN_CHARACTERS])
    more = len(text) - _SHOWN_CHARACTERS
    return f"{shown} … and {more:,} more characters" if more > 0 else shown


def detail_text(detail: Any) -> str:
    """An audit entry's detail in one line, with short digests."""
    if isinstance(detail, Mapping):
        return ", ".join(
            f"{key}: {detail_text(value)}" for key, value in detail.items() if value not in (None, "", {}, [])
        )
    if isinstance(detail, list | tuple):
        return " ".join(detail_text(value) for value in detail)
    text = str(detail)
    return short(text) if is_digest(text) else text


def gigabytes(count: float) -> str:
    """Bytes as GB, or as MB where they are few."""
    return f"{count / 1e9:.2f} GB" if count >= 1e7 else f"{count / 1e6:.1f} MB"


def duration(seconds: float) -> str:
    """Seconds as seconds, minutes, hours or days."""
    if seconds < 120:
        return f"{seconds:.0f} s" if seconds >= 10 else f"{seconds:.1f} s" if seconds >= 0.1 else f"{seconds:.2g} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes >= 2 * 24 * 60:
        return f"{minutes / (24 * 60):.1f} days"
    return f"{minutes} min {rest} s" if minutes < 120 else f"{minutes // 60} h {minutes % 60} min"


def expected(measured: float, estimate: float, written: Callable[[float], str]) -> str:
    """The estimate of a measurement, and its error."""
    if estimate <= 0:
        return "no estimate"
    return f"estimate {written(estimate)}, {abs(measured / estimate - 1):.0%} off"


def moment(stamp: str) -> str:
    """An ISO 8601 time stamp, to the second."""
    try:
        return datetime.fromisoformat(stamp).strftime("%Y-%m-%d %H:%M:%S %Z")
    except ValueError:
        return stamp


def p_value(probability: float) -> str:
    """A p-value with two digits."""
    return "< 0.0001" if probability < 0.0001 else f"{probability:.2g}"


def money(amount: float | None) -> str:
    """An amount of money with two digits, never as 4e-05; a dash for None."""
    if amount is None:
        return "–"
    return f"{amount:,.2f}" if amount == 0 or amount >= 1 else f"{Decimal(f'{amount:.2g}'):f}"


def signed_money(amount: float) -> str:
    """An amount of money with its sign."""
    return f"−{money(-amount)}" if amount < 0 else money(amount)


def count(number: float) -> str:
    """A count with thousands separators."""
    return f"{number:,.0f}"
