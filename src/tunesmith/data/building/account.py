"""Counts what happens to every row of a build, and names the reasons for which rows are removed."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Final

EXACT: Final = "exact duplicate"
PRIVATE: Final = "personal data or a secret"
OVERLONG: Final = "overlong"
OFF_SCHEMA: Final = "answer not valid under the schema"
WITHDRAWN: Final = "withdrawn by a recall"
OUTSIDE_WORDING: Final = "same wording as a row of an outside test set"
HAS_CONTROL: Final = "holds the control token"  # the token follows
SPOILT: Final = "after pseudonymisation"  # follows the reason
EDITED: Final = "in a row that was edited in a review"  # follows the reason
SPOILT_CALL: Final = "tool call not valid JSON after pseudonymisation"


@dataclass
class Account:
    """Counts of some rows. read: source file -> kept and removed ones. ignored: key that no format reads -> rows that
    have it.

    privacy: entity -> values found. fields: (turn's role, entity) -> findings. originals: example id -> pseudonym ->
    original. longest: the most tokens of a row. reviewed: id of a reviewed row -> rows that its decision applied to.
    withdrawn: content keys of recalled rows whose copies are recalled too. edits: id of an edited row -> content keys
    before and after. respelled: rows read whose JSON answers were written as constrained decoding writes them.
    """

    read: Counter[str] = field(default_factory=Counter)
    privacy: Counter[str] = field(default_factory=Counter)
    fields: Counter[tuple[str, str]] = field(default_factory=Counter)
    originals: dict[str, dict[str, str]] = field(default_factory=dict)
    ignored: Counter[str] = field(default_factory=Counter)
    longest: int = 0
    reviewed: Counter[str] = field(default_factory=Counter)
    withdrawn: set[str] = field(default_factory=set)
    edits: dict[str, set[str]] = field(default_factory=dict)
    respelled: int = 0

    def merge(self, other: Account) -> None:
        """Add another account's counts; `longest` becomes the larger one."""
        self.respelled += other.respelled
        self.longest = max(self.longest, other.longest)
        for name in ("read", "privacy", "fields", "originals", "ignored", "reviewed", "withdrawn"):
            getattr(self, name).update(getattr(other, name))
        for row, contents in other.edits.items():
            self.edits.setdefault(row, set()).update(contents)
