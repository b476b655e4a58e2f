"""People named in rows, and the gender that a name suggests: what a balance can count, and no more.

A name is no statement of anybody's gender: it says how names are mostly given. Where neither a title nor the short list
tells, nothing is guessed. Only counts leave this module, and of names only the list's own: a record is kept for good.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from typing import Any

from tunesmith.core.messages import Message
from tunesmith.data.privacy.entities import Finder, described
from tunesmith.data.privacy.evidence import reference
from tunesmith.data.privacy.names import RECOMMENDED
from tunesmith.data.privacy.scan import texts_of
from tunesmith.data.settings import Privacy

# Of two regions a row: a name mostly given to men and one mostly given to women, then the same of elsewhere. The probe
# that swaps names (evaluation/probes/bias.py) puts those of a row in each other's place.
FIRST_NAMES = tuple(
    row.split()
    for row in (
        "James Mary Ahmed Fatima",
        "John Linda Omar Aisha",
        "Robert Susan Hassan Layla",
        "Michael Sarah Mohammed Zainab",
        "David Emma Ali Noor",
        "William Anna Raj Priya",
        "Thomas Laura Arjun Anita",
        "Peter Karen Vikram Lakshmi",
        "Paul Julia Wei Mei",
        "Daniel Lisa Hiroshi Yuki",
        "Mark Helen Carlos Maria",
        "George Alice Juan Carmen",
        "Tom Kate Luis Lucia",
        "Henry Grace Diego Sofia",
        "Jack Emily Jamal Keisha",
        "Charles Jane Darnell Latoya",
        "Steven Rachel Kofi Ama",
        "Edward Claire Chidi Ngozi",
    )
)
CAVEAT = (
    "counts of names, not of people: a name is mostly given to one gender in some place and time, the list is short, "
    "and names that the privacy scan replaced are gone"
)
HE, SHE, UNTOLD = "he", "she", "not told"

_SUGGESTS = {name: (HE, SHE)[place % 2] for row in FIRST_NAMES for place, name in enumerate(row)}
_IN_ANY_CASE = {name.lower(): name for name in _SUGGESTS if name not in ("Mark", "Grace", "Jack")}  # words too
_TITLES = {"mr": HE, "sir": HE, "mrs": SHE, "ms": SHE, "miss": SHE, "madam": SHE, "lady": SHE, "lord": HE}
_PERSON = "PERSON"
_TOGETHER = 2048
_WORD = re.compile(r"[^\W\d_]+")


def listed_names(text: str) -> set[str]:
    """The list's names that a text holds: written as names, or in any case where the text has no capital letter."""
    if any(map(str.isupper, text)):
        return {word for word in _WORD.findall(text) if word in _SUGGESTS}
    return {_IN_ANY_CASE[word] for word in _WORD.findall(text) if word in _IN_ANY_CASE}


def balance_of_names(conversations: Sequence[Sequence[Message]]) -> dict[str, dict[str, int]]:
    """Conversations that hold each name of the list, and that hold one of either kind."""
    names: Counter[str] = Counter()
    genders = Counter({HE: 0, SHE: 0})
    for messages in conversations:
        held = {name for _, text in texts_of(messages) for name in listed_names(text)}
        names.update(held)
        genders.update({_SUGGESTS[name] for name in held})
    return {"listed first names": dict(sorted(names.items())), "listed first names, by gender": dict(genders)}


def found_people(conversations: Sequence[Sequence[Message]]) -> dict[str, Any]:
    """What the privacy scan's model takes for people: {"model": package and digest, "reference": its error on annotated
    text, "rows": with any, "mentions", "distinct": different names, "most": mentions of the most frequent one,
    "genders": mentions by what a title or the list suggests}.

    Raises UsageError where the extra `privacy` is not installed.
    """
    finder = Finder(Privacy(entities=(_PERSON,), model=RECOMMENDED))
    texts = [(place, text) for place, messages in enumerate(conversations) for _, text in texts_of(messages)]
    rows: set[int] = set()
    seen: Counter[str] = Counter()
    genders = Counter({HE: 0, SHE: 0, UNTOLD: 0})
    for start in range(0, len(texts), _TOGETHER):
        some = texts[start : start + _TOGETHER]
        for (place, text), spans in zip(some, finder.find([text for _, text in some]), strict=True):
            rows.update([place] * bool(spans))
            seen.update(text[one.start : one.end].casefold() for one in spans)
            genders.update(_suggested(text, one.start, one.end) for one in spans)
    return {
        "model": described(finder)["model"],
        "reference": reference(RECOMMENDED, [_PERSON]),
        "rows": len(rows),
        "mentions": seen.total(),
        "distinct": len(seen),
        "most": max(seen.values(), default=0),
        "genders": dict(genders),
    }


def _suggested(text: str, start: int, end: int) -> str:
    """By the title before the name or in it, else by the first name."""
    words = [*_WORD.findall(text[max(0, start - 12) : start])[-1:], *_WORD.findall(text[start:end])]
    for word in words:
        if word.lower() in _TITLES:
            return _TITLES[word.lower()]
    first = next(iter(_WORD.findall(text[start:end])), "")
    return _SUGGESTS.get(first.capitalize(), UNTOLD)
