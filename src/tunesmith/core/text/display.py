"""Text of strangers for a terminal, a log or a page: rows, names, reasons, file names, answers of models.

Escape sequences, marks that reorder a line and characters that nobody sees become code points: ⟨U+202E⟩. So a text
cannot clear the screen, imitate another line, or look like something that it is not.
"""

from __future__ import annotations

import json
import logging
import re
import time
from difflib import SequenceMatcher
from typing import Any, Literal, NamedTuple

import regex

from tunesmith.core.errors import TunesmithError

# Control, format, private, unassigned and lone surrogate characters (C), line and paragraph separators (Zl, Zp), and
# whatever else Unicode lets a renderer ignore (DI). Line feeds, tabs and the selector of a coloured emoji stay.
_HIDDEN = regex.compile(
    r"[[\p{C}\p{Zl}\p{Zp}\p{DI}\u2800]--[\n\t\uFE0F]]|(?<!\p{Extended_Pictographic})\uFE0F", regex.V1
)


def printable(text: str) -> str:
    """The text with hidden, controlling and reordering characters as code points. Line feeds and tabs stay."""
    return str(_HIDDEN.sub(lambda match: f"⟨U+{ord(match[0]):04X}⟩", text))


def printable_line(text: str) -> str:
    """The printable text for a place of one line: what follows a line feed inside it is indented.

    So a name or a reason with line feeds cannot imitate a line of its own. Line feeds at either end stay.
    """
    inner = text.strip("\n")
    start = text.index(inner)
    return text[:start] + printable(inner).replace("\n", "\n    ") + text[start + len(inner) :]


class LogFormatter(logging.Formatter):
    """Formats a log record so that each begins a line of its own, and nothing else does: names can hold line feeds."""

    def format(self, record: logging.LogRecord) -> str:
        """The record, with its message and traceback printable and indented."""
        return printable_line(super().format(record))

    def formatException(self, ei: Any) -> str:  # noqa: N802 - logging's own name
        """A traceback. Of an error that says what to do only its text: nobody need look into the code."""
        return str(ei[1]) if isinstance(ei[1], TunesmithError) else super().formatException(ei)


class NoRepeats(logging.Filter):
    """Keeps back errors of the same kind and reason as one of the last minute, and says later how many they were.

    Else a full disk or a database that is away would write some lines for each request.
    """

    seconds = 60.0

    def __init__(self) -> None:
        super().__init__()
        self._said: dict[tuple[str, str], tuple[float, int]] = {}

    def filter(self, record: logging.LogRecord) -> bool:
        """Whether to write a record."""
        error = record.exc_info[1] if record.exc_info else None
        if not isinstance(error, TunesmithError):
            return True
        key, now = (str(record.msg), error.what.partition(":")[0]), time.monotonic()
        at, times = self._said.get(key, (-self.seconds, 0))
        if now - at < self.seconds:
            self._said[key] = (at, times + 1)
            return False
        if len(self._said) > 1000:  # reasons that name what callers sent
            self._said.clear()
        self._said[key] = (now, 0)
        if times:
            record.msg = f"{record.msg} (and {times} times more since {now - at:.0f} s ago)"
        return True


def json_text(document: Any, **options: Any) -> str:
    """The document as JSON that is safe to show: hidden characters are escaped, other letters stay readable.

    It reads back as the same document. Raises ValueError for NaN. options: for json.dumps.
    """
    return str(_HIDDEN.sub(_escaped, json.dumps(document, ensure_ascii=False, allow_nan=False, **options)))


def _escaped(match: Any) -> str:
    return json.dumps(match[0])[1:-1] if match[0] != "\x7f" else "\\u007f"


# A word, a mark, or white space. Texts with more of them are compared by lines: the time grows with their square.
_PIECE = re.compile(r"\w+|\s+|[^\w\s]")
_MOST_PIECES = 2000

Kind = Literal["same", "added", "removed"]


class Change(NamedTuple):
    """A piece of the new text (same, added) or of the old one (removed)."""

    kind: Kind
    text: str


def differences(old: str, new: str) -> list[Change]:
    """How old becomes new, in the order of reading. Joined without `added` it is old, without `removed` it is new."""
    left, right = _PIECE.findall(old), _PIECE.findall(new)
    if max(len(left), len(right)) > _MOST_PIECES:
        left, right = old.splitlines(keepends=True), new.splitlines(keepends=True)
    if max(len(left), len(right)) > _MOST_PIECES:
        left, right = [old], [new]
    changes: list[Change] = []
    for tag, a, b, c, d in SequenceMatcher(None, left, right).get_opcodes():
        if tag == "equal":
            changes.append(Change("same", "".join(left[a:b])))
            continue
        both = (Change("removed", "".join(left[a:b])), Change("added", "".join(right[c:d])))
        changes += [change for change in both if change.text]
    return changes
