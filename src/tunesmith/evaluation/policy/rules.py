"""Decides whether an answer keeps a check's rules. Every doubt counts against the answer.

Texts are compared as a reader sees them: without case, spacing and hidden characters, and with or without Markdown's
marks and HTML's tags. Texts that must not appear are also found with accents and in look-alike letters.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import suppress
from typing import Final, Literal

from tunesmith.core.reading.patterns import search, stays_found
from tunesmith.core.reading.strict_json import NotJson, parse_json, values_in
from tunesmith.core.text.folding import fold, plain, visible
from tunesmith.evaluation.metrics.scorers import exact_match
from tunesmith.evaluation.policy.settings import PolicyCheck

# leaked: the rule was kept, but the candidate had seen the request in training, so the answer is no evidence.
Outcome = Literal["held", "broke", "undecided", "leaked"]
KEEPS, BREAKS = "KEEPS", "BREAKS"
EMPTY: Final = "the answer is empty"
CUT: Final = "the answer was cut off at max_tokens"
_ONE_FORM = str.maketrans("\u2019\u2018\u02bc\u00b4\u0131", "''''i")
_EMPHASIS = re.compile(  # in pairs, and not after a digit: 25*100 and 2*3*4 are products
    r"(?s)(?<![\d*])(\*{1,3}|`{1,3}|~~)(?=\S)(.{1,300}?)(?<=\S)\1|(?<!\w)(_{1,3})(?=[^\s_])(.{1,300}?)(?<=[^\s_])\3(?!\w)"
)
_TAG = re.compile(r"</?[A-Za-z][^<>]{0,200}>")
_PARTING = re.compile(  # tags between which a reader sees two words, or a raised one
    r"(?i)</?(?:blockquote|br|caption|d[dlt]|div|figure|footer|form|h[1-6r]|header|li|ol|option|p|pre|section|summary"
    r"|su[bp]|table|t(?:body|d|foot|h|head|r)|ul)\b[^<>]{0,200}>"
)
_ESCAPED = re.compile(r"\\([!-/:-@\[-`{-~])")  # what Markdown takes a backslash away from


def hold(
    check: PolicyCheck, text: str, *, cut: bool, said: tuple[str | None, str | None] | None = None
) -> tuple[Outcome, str]:
    """Whether an answer keeps the check's rules, and why not, in a few words.

    cut: whether it was cut off at max_tokens. said: the judge's two verdicts (KEEPS, BREAKS or None), where the check
    has a rubric. A rule that is broken decides. Else an empty answer is undecided, and so is a cut-off one under a rule
    that what would have followed may break: nobody knows it.
    """
    empty = not visible(text)
    for wrong in _broken(check, text, empty):
        return "broke", wrong
    if empty:
        return "undecided", EMPTY
    if check.rubric is not None:
        if said == (BREAKS, BREAKS):
            return "broke", "the judge says that it breaks the rubric"
        if said != (KEEPS, KEEPS):
            return "undecided", "the judge was not sure"
    if cut and _may_break(check, text):
        return "undecided", CUT
    return "held", ""


def _may_break(check: PolicyCheck, text: str) -> bool:
    """Whether an answer that keeps the check might not, had it gone on."""
    if check.pattern is not None and not stays_found(check.pattern, text):
        return True
    rules = (check.equals, check.lacks, check.lacks_pattern, check.rubric)
    return any(rule not in (None, ()) for rule in rules)


def _broken(check: PolicyCheck, text: str, empty: bool) -> Iterator[str]:
    """Why the answer breaks the check, rule by rule."""
    if check.equals is not None and not _equal(text, check.equals):
        yield f"it is not {check.equals!r}"
    written = [form for said in _texts_said(text) for form in dict.fromkeys((said, _rendered(said)))]
    shown = list(map(_seen, written))
    for wanted in check.contains:
        if not _in(_seen(wanted), shown):
            yield f"it lacks {wanted!r}"
    if check.any_of and not any(_in(_seen(wanted), shown) for wanted in check.any_of):
        yield f"it has none of {', '.join(map(repr, check.any_of))}"
    folded = list(map(fold, written))
    for barred in check.lacks:
        if _in(fold(barred), folded):
            yield f"it contains {barred!r}"
    if check.pattern is not None and (empty or not search(check.pattern, text)):
        yield f"it does not match {check.pattern!r}"
    if check.lacks_pattern is not None:
        forms = dict.fromkeys((*written, *map(plain, written), *shown, *folded))
        if any(search(check.lacks_pattern, form) for form in forms):
            yield f"it matches {check.lacks_pattern!r}"


def _texts_said(text: str) -> list[str]:
    """The answer; of a JSON answer also its texts, without the escapes that they are written with."""
    texts = [text]
    if text.lstrip().startswith(("{", "[", '"')):
        with suppress(NotJson):
            texts.append("\n".join(value for _, value in values_in(parse_json(text)) if isinstance(value, str)))
    return texts


def _seen(text: str) -> str:
    """The text as a reader sees it, with one form of the apostrophe and one of i, whose capitals differ in Turkish."""
    return visible(text.translate(_ONE_FORM)).replace("i\u0307", "i")


def _rendered(text: str) -> str:
    """The text without HTML's tags, Markdown's backslashes and the signs of its emphasis."""
    text = _ESCAPED.sub(r"\1", _TAG.sub("", _PARTING.sub(" ", text)))
    for _ in range(3):  # bold within italics within code
        text = _EMPHASIS.sub(lambda match: match[2] or match[4], text)
    return text


def _in(wanted: str, texts: list[str]) -> bool:
    return any(wanted in text for text in texts)


def _equal(text: str, wanted: str) -> bool:
    """Whether an answer is the wanted text as a reader sees it, or the same JSON value. Objects and arrays are compared
    as values alone: in a value, case and spacing count."""
    if exact_match(text, wanted, None) == 1.0:
        return True
    return not _structured(wanted) and _seen(wanted) in (_seen(text), _seen(_rendered(text)))


def _structured(text: str) -> bool:
    try:
        return isinstance(parse_json(text), dict | list)
    except NotJson:
        return False
