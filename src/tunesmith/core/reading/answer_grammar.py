"""Lark grammars and regular expressions of whole answers. llguidance reads both, to decode and to check.

So what decoding allows and what counts as valid never differ. Model output is untrusted: llguidance bounds its work,
and an answer that it cannot check within its bounds is not valid.
"""

from __future__ import annotations

import re
from functools import cache, lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Final

from tunesmith.core.errors import UsageError
from tunesmith.core.reading.text_files import read_text_file

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer

_LARGEST: Final = 1 << 20
# Texts, comments and regular expressions of a grammar, and, outside of these, what only a model's tokens can satisfy.
_OF_TOKENS: Final = re.compile(
    r'"(?:[^"\\\n]|\\.)*"|(?://|\#)[^\n]*|/(?:[^/\\\n]|\\.)+/|(max_tokens\s*=|<(?:\||\[)[^>\n]*>)'
)


def load_answer_grammar(path: Path) -> str:
    """The Lark grammar in a file. Raises UsageError, naming the file, where it cannot be read or used."""
    grammar = read_text_file(path, "the answer grammar", _LARGEST)
    check_answer_grammar(grammar, str(path))
    return grammar


def pattern_grammar(pattern: str, where: str) -> str:
    """The grammar of answers that a regular expression matches as a whole. Raises UsageError for one that is not valid.

    The syntax is that of Rust's regex crate. `^` at its beginning and `$` at its end change nothing.
    """
    body = pattern.removeprefix("^")
    if body.endswith("$") and (len(body) - len(body[:-1].rstrip("\\"))) % 2:
        body = body[:-1]
    plain = {"/": "\\/", "\n": "\\n", "\r": "\\r"}
    escaped = re.sub(r"\\.|[/\n\r]", lambda each: plain.get(each[0], each[0]), body, flags=re.DOTALL)
    grammar = f"start: /({escaped})/\n"
    check_answer_grammar(grammar, where)
    return grammar


def check_answer_grammar(grammar: str, where: str) -> None:
    """Raise UsageError for a grammar that llguidance does not read."""
    from llguidance import LLMatcher

    if said := LLMatcher.validate_grammar(grammar, _bytes()):
        raise UsageError(
            f"not a grammar of answers: {' '.join(said.split())[:300]}",
            where=where,
            fix="the syntax is llguidance's dialect of Lark, with the regular expressions of Rust's regex crate",
        )
    if token := next((each[1] for each in _OF_TOKENS.finditer(grammar) if each[1]), None):
        raise UsageError(
            f"not a grammar of answers: {token[:80]} counts or names a model's tokens, and answers are checked as text",
            where=where,
            fix="bound a text by its characters, as in /[a-z]{1,20}/, and leave control tokens out",
        )


def matches(grammar: str, answer: str) -> bool:
    """Whether a whole answer matches a checked grammar. Linear in the answer for a regular expression."""
    matcher = _matcher(grammar).deep_copy()
    data = list(answer.encode(errors="replace"))
    return matcher.try_consume_tokens(data) == len(data) and bool(matcher.is_accepting())


@cache
def _bytes() -> LLTokenizer:
    from llguidance import LLTokenizer

    return LLTokenizer("byte")


@lru_cache(maxsize=16)
def _matcher(grammar: str) -> LLMatcher:
    from llguidance import LLMatcher

    return LLMatcher(_bytes(), grammar, log_level=0)
