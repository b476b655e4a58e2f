"""The rule for numbers that name a record of the database, such as a rollout or an audit entry."""

from __future__ import annotations


def is_number(text: str) -> bool:
    """Whether text is a number in ASCII digits, few enough for every database's integers."""
    return text.isascii() and text.isdigit() and len(text) < 16
