"""Regular expressions that settings and schemas name, run over texts of strangers.

RE2 runs them: its time grows with the text's length times the pattern's, and both are bounded, so no pattern and no
answer can make a search hang, and a score never depends on how busy the machine is. The price is that lookarounds and
back references do not exist.
"""

from __future__ import annotations

import re
from functools import lru_cache
from typing import Any, Final

import re2

from tunesmith.core.errors import UsageError

_SHOWN: Final = 120
_ESCAPE: Final = re.compile(r"\\(?:u([0-9a-fA-F]{4})|.)", re.DOTALL)
_OPTIONS: Final = re2.Options()
_OPTIONS.log_errors = False
_OPTIONS.max_mem = 1 << 21  # of one pattern, for its program and the states that it keeps
_MOST_INSTRUCTIONS: Final = 5_000
_KEPT: Final = 128


def check_pattern(pattern: str, where: str) -> None:
    """Raise UsageError for a pattern that RE2 does not support, or that is too large to be fast."""
    try:
        instructions = _compiled(pattern).programsize
    except (re2.error, UnicodeError) as error:
        said = error.args[0].decode(errors="replace") if isinstance(error, re2.error) else "half of a surrogate pair"
        raise UsageError(
            f"the pattern {pattern[:_SHOWN]!r} is not a regular expression that is supported: {said[:_SHOWN]}",
            where=where,
            fix="patterns run in linear time, by RE2: without lookarounds, back references and counts above 1000",
        ) from None
    if instructions > _MOST_INSTRUCTIONS:
        raise UsageError(
            f"the pattern {pattern[:_SHOWN]!r} is too large: {instructions} instructions, and the most are"
            f" {_MOST_INSTRUCTIONS}",
            where=where,
            fix="use smaller counts, such as {1,50}, or count with minLength and maxLength instead",
        )


def work(pattern: str, text: str) -> int:
    """The most that a search can cost: the pattern's instructions times the text's bytes; about 10 ns each."""
    return int(_compiled(pattern).programsize) * (len(text) if text.isascii() else len(text.encode(errors="replace")))


def search(pattern: str, text: str) -> bool:
    """Whether a pattern that check_pattern let through occurs in a text; `$` is the text's end."""
    return _compiled(pattern).search(text.encode(errors="replace").decode()) is not None


def stays_found(pattern: str, text: str) -> bool:
    """Whether a pattern occurs in every text that begins with this one: a match ends before the text does.

    So no `$` and no `\\b` was decided by the text's end. May be False for a pattern that would stay found.
    """
    text = text.encode(errors="replace").decode()
    # The shortest match is wanted; with U, `*` is lazy and `*?` is not.
    matches = (_compiled(each).search(text) for each in (pattern, f"(?U:{pattern})"))
    return any(match is not None and match.end() < len(text) for match in matches)


@lru_cache(maxsize=_KEPT)
def _compiled(pattern: str) -> Any:
    # RE2 writes ECMAScript's \uXXXX as \x{XXXX}.
    said = _ESCAPE.sub(lambda escape: f"\\x{{{escape[1]}}}" if escape[1] else escape[0], pattern)
    return re2.compile(said, _OPTIONS)
