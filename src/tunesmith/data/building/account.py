"""The account of a build: where every row went."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field, fields
from typing import Any, Final

from tunesmith.data.dataset import Example
from tunesmith.data.privacy.scan import Scan

EXACT: Final = "exact duplicate"
PRIVATE: Final = "personal data or a secret"
OVERLONG: Final = "overlong"
OFF_SCHEMA: Final = "answer not valid under the schema"
WITHDRAWN: Final = "withdrawn by a recall"
OUTSIDE_WORDING: Final = "worded as a row of an outside test set"
SPOILT: Final = "answer no longer valid under the schema with pseudonyms"
SPOILT_CALL: Final = "tool call no longer JSON with pseudonyms"


@dataclass(frozen=True, slots=True)
class Kept:
    """An example on its way through the stages. row: its number in the file; changed: it is not as it was read."""

    example: Example
    row: int
    changed: bool


@dataclass
class Account:
    """What became of the rows so far: read = kept + removed. ignored: key -> rows that had it and were read without.

    privacy: entity -> values found; fields: (turn's role, entity) -> findings; originals: example -> its scan's.
    """

    read: int = 0
    removed: list[dict[str, Any]] = field(default_factory=list)
    privacy: Counter[str] = field(default_factory=Counter)
    fields: Counter[tuple[str, str]] = field(default_factory=Counter)
    originals: dict[str, dict[str, str]] = field(default_factory=dict)
    ignored: Counter[str] = field(default_factory=Counter)
    longest: int = 0

    def enter_scan(self, scan: Scan) -> None:
        """Count what a conversation's scan found."""
        self.privacy.update(scan.found)
        self.fields.update(scan.fields)

    def remove(self, source: str, row: int, reason: str, example: str | None = None) -> None:
        """Enter a row that goes no further. example: its id, where it got as far as having one."""
        self.removed.append({"id": example, "source": source, "row": row, "reason": reason})

    def merge(self, other: Account) -> None:
        """Take in another's counts. What is a number adds up, but for the longest."""
        for each in fields(self):
            own, more = getattr(self, each.name), getattr(other, each.name)
            if isinstance(own, int):
                setattr(self, each.name, max(own, more) if each.name == "longest" else own + more)
            elif isinstance(own, list):
                own.extend(more)
            else:
                own.update(more)  # a Counter adds up
