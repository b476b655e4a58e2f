"""A version's name and number, written NAME@v3."""

from __future__ import annotations

import re
from dataclasses import dataclass

from tunesmith.core.errors import UsageError
from tunesmith.core.text.names import check_name

_TEXT = re.compile(r"(?P<name>[^@]+)@v(?P<number>[1-9][0-9]{0,8})")


@dataclass(frozen=True, slots=True, order=True)
class VersionRef:
    """One version of a name. Raises UsageError for a name with a bad spelling or a number below 1."""

    name: str
    number: int

    def __post_init__(self) -> None:
        check_name(self.name, "version name")
        if self.number < 1:
            raise UsageError(f"{self.number} is not a version's number", fix="versions are numbered from 1")

    @classmethod
    def parse(cls, text: str) -> VersionRef:
        """The reference that text names. Raises UsageError where text is not NAME@vNUMBER."""
        match = _TEXT.fullmatch(text)
        if match is None:
            raise UsageError(f"{text[:80]!r} is not a version", fix="write NAME@vNUMBER, such as home-intents@v1")
        return cls(match["name"], int(match["number"]))

    def __str__(self) -> str:
        return f"{self.name}@v{self.number}"
