"""Read and validate a request's body, within limits of size, time and depth."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from fastapi import Request
from pydantic import BaseModel, ValidationError
from starlette.requests import ClientDisconnect

from tunesmith.core.reading.strict_json import NotJson, parse_json
from tunesmith.server import limits
from tunesmith.server.errors import INVALID_SCHEMA, ApiError, bad_request
from tunesmith.server.limits import ServerSettings

Body = TypeVar("Body", bound=BaseModel)
# Bytes of a body that is parsed in less time than it takes to wake a thread.
_SMALL = 4096
# Of several errors, what a person should read first: others follow from these, such as "not text" for a long list.
_TOLD_FIRST = {"extra_forbidden": 0, "too_long": 1, "string_too_long": 1}


async def read_body(
    request: Request,
    model: type[Body],
    settings: ServerSettings,
    count: Callable[[int], None],
    *,
    nul: bool = False,
    in_path: Mapping[str, Any] | None = None,
) -> Body:
    """The body as a model. Raises ApiError: 413 too large, 408 too slow, 400 not JSON, nested too deep or not valid.

    in_path: fields of the model that the request's path holds; the body may then be empty.
    nul: take texts with a NUL character, which not every database stores.
    count: called with the size of each piece (`Arriving.one`).
    JSON is read strictly: a repeated key, NaN, a lone surrogate and a field that the model does not have are errors.
    """
    data = await read_bytes(request, settings, count)
    if len(data) <= _SMALL:
        return _parsed(data, model, nul, in_path)
    # In a thread, so that a large body does not keep the server from other requests' bytes.
    return await asyncio.to_thread(_parsed, data, model, nul, in_path)


def _parsed(data: bytes, model: type[Body], nul: bool, in_path: Mapping[str, Any] | None) -> Body:
    try:
        value = {} if in_path is not None and not data else parse_json(data)
    except NotJson as error:
        raise bad_request(f"The body is not valid JSON: {error}", code="invalid_json") from error
    if _more_values_than(limits.VALUES, value):
        raise bad_request(f"The body has more than {limits.VALUES} JSON values.", code="too_many_values")
    if not nul and b"\\u0000" in data and _holds_nul(value):
        raise bad_request("The body holds a NUL character.")
    if not isinstance(value, dict):
        raise bad_request("The body must be a JSON object.", code="invalid_json")
    if twice := sorted(value.keys() & (in_path or {}).keys()):
        raise bad_request(f"The address holds {twice[0]!r} already.", twice[0])
    try:
        return model.model_validate(value | dict(in_path or {}))
    except ValidationError as error:
        raise _told(error) from error


def _more_values_than(most: int, value: Any) -> bool:
    waiting, seen = [value], 1
    while waiting and seen <= most:
        one = waiting.pop()
        inside = one.values() if isinstance(one, dict) else one if isinstance(one, list) else ()
        seen += len(inside)
        waiting += inside if seen <= most else ()
    return seen > most


def _holds_nul(value: Any) -> bool:
    if isinstance(value, str):
        return "\0" in value
    inside = (*value, *value.values()) if isinstance(value, dict) else value if isinstance(value, list) else ()
    return any(_holds_nul(each) for each in inside)


async def read_bytes(request: Request, settings: ServerSettings, count: Callable[[int], None]) -> bytes:
    """The body as it is. Raises ApiError: 413 too large, 408 too slow, 400 for a client that leaves."""
    message = f"The body is larger than {settings.body_bytes} bytes."
    too_large = ApiError(413, message, "body_too_large", closes=True)
    stated = request.headers.get("content-length", "0")
    if stated.isdecimal() and int(stated) > settings.body_bytes:
        raise too_large
    data = bytearray()
    try:
        async with asyncio.timeout(settings.body_seconds):
            async for piece in request.stream():
                count(len(piece))
                data += piece
                if len(data) > settings.body_bytes:
                    raise too_large
    except TimeoutError:
        message = f"The body did not arrive within {settings.body_seconds:g} s."
        raise ApiError(408, message, "body_too_slow", closes=True) from None
    except ClientDisconnect:
        raise bad_request("The client left before its body had arrived.", code="incomplete_body") from None
    return bytes(data)


def _told(error: ValidationError) -> ApiError:
    """The first of pydantic's errors, with the field named as OpenAI does: messages[0].content."""
    errors = error.errors(include_url=False, include_context=False)
    first = min(errors, key=lambda one: _TOLD_FIRST.get(one["type"], len(_TOLD_FIRST)))
    path = _path(first["loc"])
    if first["type"] == "extra_forbidden":
        return bad_request(f"Unrecognized request argument supplied: {path}", path, code="unknown_parameter")
    if first["type"] == "missing":
        return bad_request(f"Missing required parameter: {path!r}.", path, code="missing_required_parameter")
    if first["type"] == INVALID_SCHEMA:
        return bad_request(first["msg"], path, code=INVALID_SCHEMA)
    said = first["msg"].removeprefix("Value error, ")
    return bad_request(f"Invalid {path!r}: {said}" if path else said, path or None)


def _path(loc: tuple[int | str, ...]) -> str:
    """The field's path, without the names that pydantic gives to the members of a union."""
    path = ""
    for part in loc:
        if isinstance(part, int):
            path += f"[{part}]"
        elif part.isidentifier() and part not in ("str", "list", "NamedChoice"):
            path += f".{part}" if path else part
    return path[: limits.SHOWN]
