"""Counts the people named in rows, and the gender that their names suggest.

A name does not state a person's gender; it only shows to whom a name is mostly given. Without a title or a listed name,
nothing is guessed. Records are permanent, so this module returns counts only, and no name.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence

from tunesmith.core.messages import Conversation
from tunesmith.data.privacy.detection_recall import reference
from tunesmith.data.privacy.entities import Finder
from tunesmith.data.privacy.names import RECOMMENDED
from tunesmith.data.privacy.scan import texts_of
from tunesmith.data.settings import Privacy
from tunesmith.records.dataset import NamedPeople

# Each line: a man's and a woman's name of one region, then of another. The probe that swaps names
# (evaluation/probes/bias.py) exchanges the names of a line.
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
    "these are counts of names, not of people: which gender a name suggests depends on place and time, the list is "
    "short, and names that the privacy scan replaced are not counted"
)
HE, SHE, UNTOLD = "he", "she", "not told"

_SUGGESTS = {name: (HE, SHE)[place % 2] for row in FIRST_NAMES for place, name in enumerate(row)}
_TITLES = {"mr": HE, "sir": HE, "mrs": SHE, "ms": SHE, "miss": SHE, "madam": SHE, "lady": SHE, "lord": HE}
_PERSON = "PERSON"
_TOGETHER = 2048
_WORD = re.compile(r"[^\W\d_]+")


def found_people(conversations: Sequence[Conversation]) -> NamedPeople:
    """People that the privacy scan's model finds. Raises UsageError where the extra `privacy` is not installed."""
    finder = Finder(Privacy(entities=(_PERSON,), model=RECOMMENDED))
    texts = [(place, text) for place, messages in enumerate(conversations) for *_, text in texts_of(messages)]
    rows: set[int] = set()
    seen: Counter[str] = Counter()
    genders = Counter({HE: 0, SHE: 0, UNTOLD: 0})
    for start in range(0, len(texts), _TOGETHER):
        some = texts[start : start + _TOGETHER]
        for (place, text), spans in zip(some, finder.find([text for _, text in some]), strict=True):
            rows.update([place] * bool(spans))
            seen.update(text[one.start : one.end].casefold() for one in spans)
            genders.update(_suggested(text, one.start, one.end) for one in spans)
    return NamedPeople(
        caveat=CAVEAT,
        model=finder.model,
        reference=reference(RECOMMENDED, [_PERSON]),
        rows=len(rows),
        mentions=seen.total(),
        distinct=len(seen),
        most=max(seen.values(), default=0),
        genders=dict(genders),
    )


def _suggested(text: str, start: int, end: int) -> str:
    """The gender that a title before or in the name suggests, else the first name."""
    words = [*_WORD.findall(text[max(0, start - 12) : start])[-1:], *_WORD.findall(text[start:end])]
    for word in words:
        if word.lower() in _TITLES:
            return _TITLES[word.lower()]
    first = next(iter(_WORD.findall(text[start:end])), "")
    return _SUGGESTS.get(first.capitalize(), UNTOLD)
