"""What clients may read of a job's log and errors."""

from __future__ import annotations

import re

_TRACEBACK = "Traceback (most recent call last)"
# An absolute path: between quotes, after file://, or as a word. Not the path of another URL.
_PATH = re.compile(
    r"""(?<=')/[^'\n]+(?=')|(?<=")/[^"\n]+(?=")|file://\S+|(?<![\w./:])/[^\s'"`,;:()]+|(?<=:)/(?!/)[^\s'"`,;:()]+"""
)


def for_client(text: str) -> str:
    """A text without what is the operators' alone: tracebacks, and paths of this machine."""
    return "an internal error; its traceback is in the operators' log" if _TRACEBACK in text else _PATH.sub("...", text)
