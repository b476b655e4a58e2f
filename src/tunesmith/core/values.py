"""The base classes of values that do not change, of settings and of typed results, which are printed and answered."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Self, TypeAlias, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, GetJsonSchemaHandler, ValidationError
from pydantic.json_schema import JsonSchemaValue
from pydantic_core import CoreSchema

from tunesmith.core.errors import UsageError
from tunesmith.core.text.names import Scope

Value = TypeVar("Value")

# A JSON Schema.
Schema: TypeAlias = Mapping[str, Any]

# A complete digest.
Digest = Annotated[str, Field(pattern="^sha256:[0-9a-f]{64}$")]

# A key that the JSON leaves out when there is nothing to say.
Omitted = Annotated[Value | None, Field(exclude_if=lambda value: value is None)]


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

    @classmethod
    def __get_pydantic_json_schema__(cls, schema: CoreSchema, handler: GetJsonSchemaHandler) -> JsonSchemaValue:
        """The JSON schema, without the fields that JSON leaves out always."""
        document = handler(schema)
        stated = handler.resolve_ref_schema(document)
        for name in (name for name, field in cls.model_fields.items() if field.exclude):
            stated["properties"].pop(name, None)
            stated["required"] = [each for each in stated.get("required", ()) if each != name]
        return document

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

    @classmethod
    def cut(cls, items: Sequence[Value], page: int, each: int) -> tuple[Page, Sequence[Value]]:
        """The page as `within` has it, and its items."""
        at = cls.within(page, len(items), each)
        return at, items[(at.page - 1) * each : at.page * each]


class Problem(View):
    """What is wrong with a file, record or entry. path: where; relative to the store's root if the file is in it."""

    path: str
    reason: str


_UNITS = {"d": 86400, "h": 3600, "m": 60, "s": 1}


Part = TypeVar("Part", bound="Settings")


class Settings(Frozen):
    """A part of the project file. Unknown keys are errors; NaN and infinities are errors; values do not change."""

    model_config = ConfigDict(allow_inf_nan=False, validate_default=True)


def first_problem(error: ValidationError) -> tuple[str, str]:
    """(where, what is wrong) of the first of pydantic's errors: keys with dots between them, and words."""
    first = error.errors(include_url=False)[0]
    return ".".join(map(str, first["loc"])), first["msg"].removeprefix("Value error, ")


def changed(part: Part, changes: Mapping[str, Any], where: str) -> Part:
    """Settings with other values, checked. Raises UsageError, where: as given."""
    given = {name: getattr(part, name) for name in part.model_fields_set}
    try:
        return type(part).model_validate({**given, **changes})
    except ValidationError as error:
        place, said = first_problem(error)
        raise UsageError(f"{place}: {said}" if place else said, where=where) from error


def _seconds(given: Any) -> Any:
    """Seconds of a duration such as 30d, 1h30m or 45s; other values as they are."""
    if isinstance(given, bool):
        raise ValueError("write a duration such as 20m, 1h30m or 45s, not true or false")
    if not isinstance(given, str):
        return given
    parts = re.findall(r"(\d+(?:\.\d+)?)([dhms])", given)
    if not parts or "".join(number + unit for number, unit in parts) != given.replace(" ", ""):
        raise ValueError("write a duration such as 20m, 1h30m or 45s")
    return sum(float(number) * _UNITS[unit] for number, unit in parts)


# Seconds. A project file may say 30d or 1h30m instead.
Duration = Annotated[float, BeforeValidator(_seconds)]
