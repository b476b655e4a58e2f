"""Counts what happens to every row of a build, and names the reasons for which rows are removed."""

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
OUTSIDE_WORDING: Final = "same wording as a row of an outside test set"
SPOILT: Final = "answer not valid under the schema after pseudonymisation"
SPOILT_CALL: Final = "tool call not valid JSON after pseudonymisation"


@dataclass(frozen=True, slots=True)
class Kept:
    """An example that passed the checks. row: its number in the file; changed: whether it differs from what was
    read."""

    example: Example
    row: int
    changed: bool


@dataclass
class Account:
    """Counts of the rows so far. read: kept and removed ones. ignored: key that no format reads -> rows that have it.

    privacy: entity -> values found. fields: (turn's role, entity) -> findings. originals: example id -> pseudonym ->
    original. longest: the most tokens of a row.
    """

    read: int = 0
    removed: list[dict[str, Any]] = field(default_factory=list)
    privacy: Counter[str] = field(default_factory=Counter)
    fields: Counter[tuple[str, str]] = field(default_factory=Counter)
    originals: dict[str, dict[str, str]] = field(default_factory=dict)
    ignored: Counter[str] = field(default_factory=Counter)
    longest: int = 0

    def enter_scan(self, scan: Scan) -> None:
        """Add what a conversation's scan found."""
        self.privacy.update(scan.found)
        self.fields.update(scan.fields)

    def remove(self, source: str, row: int, reason: str, example: str | None = None) -> None:
        """Note a removed row. example: its id, where it was computed already."""
        self.removed.append({"id": example, "source": source, "row": row, "reason": reason})

    def merge(self, other: Account) -> None:
        """Add another account's counts; `longest` becomes the larger one."""
        for each in fields(self):
            own, more = getattr(self, each.name), getattr(other, each.name)
            if isinstance(own, int):
                setattr(self, each.name, max(own, more) if each.name == "longest" else own + more)
            elif isinstance(own, list):
                own.extend(more)
            else:
                own.update(more)  # a Counter adds
