"""The base class of what does not change, and that of typed results, which commands print and HTTP routes answer."""

from __future__ import annotations

from typing import Annotated, Any, Self, TypeVar

from pydantic import BaseModel, ConfigDict, Field

from tunesmith.core.scope import Scope

Value = TypeVar("Value")


def _is_none(value: object) -> bool:
    return value is None


# A key that the JSON leaves out when there is nothing to say.
Omitted = Annotated[Value | None, Field(exclude_if=_is_none)]


class Frozen(BaseModel):
    """Values that do not change. Keys that it does not name are errors."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class View(Frozen):
    """A typed result. Its JSON is `model_dump(mode="json", by_alias=True)`."""

    model_config = ConfigDict(validate_by_name=True, validate_by_alias=True)

    @classmethod
    def of(cls, source: object, **more: Any) -> Self:
        """The view of an object: its attributes that are named as fields are, and what else is given."""
        named = [name for name in cls.model_fields if name not in more and hasattr(source, name)]
        return cls(**{name: getattr(source, name) for name in named}, **more)

    def document(self) -> dict[str, Any]:
        """The result as JSON values, under the keys that scripts rely on."""
        return self.model_dump(mode="json", by_alias=True)


class ScopedView(View):
    """A typed result about what is for a tenant and a region; "" stands for all."""

    tenant: str
    region: str

    @property
    def scope(self) -> Scope:
        """Whom it is for."""
        return Scope(self.tenant, self.region)


class Page(View):
    """A part of a longer list. total: how many there are on all pages. page: from 1."""

    total: int
    page: int
    pages: int

    @classmethod
    def within(cls, page: int, total: int, each: int) -> Page:
        """The page of that number, with so many each; one beyond the last is the last."""
        pages = max(1, -(-total // each))
        return Page(total=total, page=min(max(1, page), pages), pages=pages)


class Problem(View):
    """What is wrong with a file, record or entry. path: where; relative to the store's root if the file is in it."""

    path: str
    reason: str
