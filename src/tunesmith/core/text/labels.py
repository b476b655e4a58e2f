"""The form in which labels that are a whole answer are compared."""

from __future__ import annotations


def bare_label(text: str) -> str:
    """The label in lower case, with single spaces: Positive and positive are one label."""
    return " ".join(text.split()).casefold()
