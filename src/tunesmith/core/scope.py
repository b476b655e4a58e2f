"""Whom something is for: a tenant and a region."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from tunesmith.core.text.names import check_name


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
