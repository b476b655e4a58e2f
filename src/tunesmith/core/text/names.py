"""The rule for names that become parts of paths: plain ASCII, so that no two names look alike."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

from tunesmith.core.errors import UsageError

# Lower-case ASCII only: no case folding, no look-alike letters, no separators, nothing special to a shell or a path.
_NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,62}")
_RULE = "use 1 to 63 of a-z, 0-9, '.', '_' and '-', starting with a letter or digit, without '..'"


def check_name(text: str, what: str) -> str:
    """The name as given. what: its kind, for the message ("version name"). Raises UsageError for a bad name."""
    if not _NAME.fullmatch(text) or ".." in text:
        raise UsageError(f"{text[:80]!r} is not a {what}", fix=_RULE)
    return text


# Controllers and workers act under this name in the audit log when no person does.
CONTROLLER = "controller"
# Names that no user may have: a reader of the log would take a person for the system.
_AUTOMATIC = (CONTROLLER, "rollout-controller", "tunesmith", "system", "server", "scheduler", "automatic")
_ALIKE = (("rn", "m"), ("vv", "w"))


def check_new_name(name: str, taken: Iterable[str]) -> str:
    """The name as given, for a new user. Raises UsageError if it is reserved or looks like one that is taken.

    Letters that are not ASCII are refused by check_name. This refuses what is left: `0` for `o`, `1` for `l`, `rn` for
    `m`, and names that differ only in separators.
    """
    for other in _AUTOMATIC:
        if _looks(name) == _looks(other):
            raise UsageError(f"{name} is reserved: {other} stands for the system in the audit log", fix=_OTHER)
    for other in taken:
        if _looks(name) == _looks(other):
            raise UsageError(f"{name} looks like the user {other}", fix=_OTHER)
    return name


_OTHER = "choose another name"


def _looks(name: str) -> str:
    """The same text for names that a person may confuse (after Unicode's confusables, for the characters allowed)."""
    plain = re.sub(r"[._-]", "", name).translate(str.maketrans("01", "ol"))
    for pair, letter in _ALIKE:
        plain = plain.replace(pair, letter)
    return plain


def bare_label(text: str) -> str:
    """The label in lower case, with single spaces: Positive and positive are one label."""
    return " ".join(text.split()).casefold()


def is_number(text: str) -> bool:
    """Whether text is a number in ASCII digits, few enough for every database's integers."""
    return text.isascii() and text.isdigit() and len(text) < 16


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
