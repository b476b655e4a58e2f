"""The rule for names that become parts of paths: plain ASCII, so that no two look alike; versions, tenants, regions."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
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


def check_hub_id(text: str) -> str:
    """An id on the Hugging Face Hub as given. Raises ValueError for what is none."""
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

    try:
        validate_repo_id(text)
    except HFValidationError as error:
        raise ValueError(f"{text[:80]!r} cannot be the name of a repository: write OWNER/NAME") from error
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
        return version_label(self.name, self.number)


def version_label(name: object, number: object) -> str:
    """What people call a version: NAME@v3."""
    return f"{name}@v{number}"


@dataclass(frozen=True, slots=True, order=True)
class Scope:
    """A tenant and a region. "" means all tenants, or all regions.

    Raises UsageError for a tenant or region that is not a name.
    """

    tenant: str = ""
    region: str = ""

    def __post_init__(self) -> None:
        for kind, name in (("tenant", self.tenant), ("region", self.region)):
            if name:
                check_name(name, kind)

    @property
    def unlimited(self) -> bool:
        """Whether it is all tenants and regions."""
        return self == Scope()

    def covers(self, other: Scope) -> bool:
        """Whether this scope includes other; a scope includes itself."""
        return self.tenant in ("", other.tenant) and self.region in ("", other.region)

    def covering(self) -> Iterator[Scope]:
        """Every scope that covers this one, the narrowest first."""
        tenant, region = self.tenant, self.region
        for pair in dict.fromkeys(((tenant, region), (tenant, ""), ("", region), ("", ""))):
            yield Scope(*pair)

    def fields(self) -> dict[str, str]:
        """The tenant and the region by name, for a table's two columns, a record or an audit entry."""
        return {"tenant": self.tenant, "region": self.region}

    def stated(self) -> dict[str, dict[str, str]]:
        """{"scope": fields()} for what is kept apart by scope; nothing for all tenants and regions."""
        return {"scope": self.fields()} if not self.unlimited else {}

    def options(self) -> str:
        """The command-line options that name this scope, each with a space before it."""
        return "".join(f" --{kind} {name}" for kind, name in self.fields().items() if name)

    @property
    def said(self) -> str:
        """Its tenant and region behind the name of what is in it: ", tenant acme"; "" for all tenants and regions."""
        return "".join(f", {kind} {name}" for kind, name in self.fields().items() if name)

    def __str__(self) -> str:
        return f"tenant {self.tenant or 'any'!r}, region {self.region or 'any'!r}"
