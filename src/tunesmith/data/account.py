"""The account of a build: where every row went."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any, Final

from tunesmith.data.dataset import Example

EXACT: Final = "exact duplicate"
PRIVATE: Final = "personal data or a secret"
OVERLONG: Final = "overlong"
OFF_SCHEMA: Final = "answer not valid under the schema"
OUTSIDE_WORDING: Final = "worded as a row of an outside test set"
SPOILT: Final = "answer no longer valid under the schema with pseudonyms"


@dataclass(frozen=True, slots=True)
class Kept:
    """An example on its way through the stages. row: its number in the file; changed: it is not as it was read."""

    example: Example
    row: int
    changed: bool


@dataclass
class Account:
    """read = kept + removed, always. ignored: key -> rows that had it and were read without it."""

    read: int = 0
    removed: list[dict[str, Any]] = field(default_factory=list)
    privacy: Counter[str] = field(default_factory=Counter)
    ignored: Counter[str] = field(default_factory=Counter)
    longest: int = 0

    def remove(self, source: str, row: int, reason: str, example: str | None = None) -> None:
        """Enter a row that goes no further. example: its id, where it got as far as having one."""
        self.removed.append({"id": example, "source": source, "row": row, "reason": reason})

    def remove_kept(self, one: Kept, reason: str) -> None:
        """Enter a row that was kept until now."""
        self.remove(one.example.source, one.row, reason, one.example.id)

    def reasons(self) -> dict[str, int]:
        """Reason -> number of rows."""
        return dict(sorted(Counter(entry["reason"] for entry in self.removed).items()))
