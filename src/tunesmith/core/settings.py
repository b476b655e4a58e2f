"""The base class of every settings model: frozen, strict about unknown keys, finite numbers only."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from typing import Annotated, Any, TypeVar

from pydantic import BeforeValidator, ConfigDict, ValidationError

from tunesmith.core.errors import UsageError
from tunesmith.core.view import Frozen

_UNITS = {"h": 3600, "m": 60, "s": 1}


Part = TypeVar("Part", bound="Settings")


class Settings(Frozen):
    """A part of the project file. Unknown keys are errors; NaN and infinities are errors; values do not change."""

    model_config = ConfigDict(allow_inf_nan=False, validate_default=True)


def changed(part: Part, changes: Mapping[str, Any], where: str, without: Collection[str] = ()) -> Part:
    """Settings with other values, checked. without: settings that count as not stated. Raises UsageError, where: as
    given."""
    given = {name: getattr(part, name) for name in part.model_fields_set if name not in without}
    try:
        return type(part).model_validate({**given, **changes})
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        place = ".".join(str(each) for each in first["loc"])
        said = first["msg"].removeprefix("Value error, ")
        raise UsageError(f"{place}: {said}" if place else said, where=where) from error


def _seconds(given: Any) -> Any:
    """Seconds of a duration such as 1h30m, 20m or 45s; other values as they are."""
    if isinstance(given, bool):
        raise ValueError("write a duration such as 20m, 1h30m or 45s, not true or false")
    if not isinstance(given, str):
        return given
    parts = re.findall(r"(\d+(?:\.\d+)?)([hms])", given)
    if not parts or "".join(number + unit for number, unit in parts) != given.replace(" ", ""):
        raise ValueError("write a duration such as 20m, 1h30m or 45s")
    return sum(float(number) * _UNITS[unit] for number, unit in parts)


# Seconds. A project file may say 20m or 1h30m instead.
Duration = Annotated[float, BeforeValidator(_seconds)]
