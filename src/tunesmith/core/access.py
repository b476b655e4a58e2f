"""Who may see a document: the labels that it carries, and the caller that they are compared with."""

from __future__ import annotations

from typing import Annotated, NamedTuple

from pydantic import AfterValidator, Field

from tunesmith.core.errors import UsageError
from tunesmith.core.text.names import Scope, check_name
from tunesmith.core.values import Settings


def _name(text: str) -> str:
    try:
        return check_name(text, "name")
    except UsageError as error:
        raise ValueError(f"{error.what}: {error.fix}") from error


Name = Annotated[str, AfterValidator(_name)]
OptionalName = Annotated[str, AfterValidator(lambda text: text and _name(text))]


class Caller(NamedTuple):
    """Whom passages are retrieved for. scope: the caller's tenant and region, "" where there is none."""

    scope: Scope = Scope()
    groups: frozenset[str] = frozenset()


ANYONE = Caller()  # sees only what everybody may see


class Labels(Settings):
    """Who may see a document. Without labels everybody may; with several, a caller must match each of them."""

    tenant: OptionalName = Field(default="", description="only callers of this tenant see it")
    region: OptionalName = Field(default="", description="only servers of this region show it")
    groups: Annotated[tuple[Name, ...], Field(min_length=1)] | None = Field(
        default=None, description="only callers who are in one of these groups see it"
    )

    def visible_to(self, caller: Caller) -> bool:
        """Whether a caller may see it. A caller without a tenant sees no tenant's documents."""
        in_group = self.groups is None or not caller.groups.isdisjoint(self.groups)
        return in_group and Scope(self.tenant, self.region).covers(caller.scope)
