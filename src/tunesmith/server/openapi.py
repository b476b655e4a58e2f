"""What the routes share to describe themselves in the OpenAPI document."""

from __future__ import annotations

from collections.abc import Collection, Iterable

from fastapi.openapi.utils import get_openapi
from pydantic import BaseModel
from starlette.routing import BaseRoute

from tunesmith.core.reading.strict_json import JsonObject
from tunesmith.server.errors import ErrorDocument

_REFERENCE = "#/components/schemas/{model}"
BEARER: JsonObject = {"security": [{"bearer": []}]}
_MEANINGS = {
    400: "The request is not valid.",
    401: "No valid token.",
    403: "The user lacks the permission, or the token the scope; or the answer waits for a reviewer (answer_held) or "
    "was refused (answer_refused).",
    404: "There is no such model, request, rollout, job, file, token or held answer for this user (model_not_found, "
    "request_not_found, job_not_found, fine_tune_not_found, file_not_found, token_not_found, "
    "held_not_found), no such version, record or the like (not_found), or no version of the model may serve now "
    "(model_not_available); or the server has no project (no_project).",
    408: "The body arrived too slowly.",
    409: "The request was scored before, or its answer is no longer in memory; or the job's or version's state "
    "does not allow it; or the held answer is decided (already_decided); or a service says no (refused), or the "
    "evidence does not decide (inconclusive).",
    413: "The body is too large.",
    429: "The queue is full, the user has too many requests at once, or the token or tenant sent too many within a "
    "minute.",
    500: "The engine failed.",
    503: "The server is shutting down, or its database cannot be used (storage_failed), or its queue "
    "of held answers is full (held_queue_full).",
    504: "No answer in time.",
    507: "The server's disk or database is full.",
}
_schemas: JsonObject = {}


def errors(*statuses: int) -> dict[int | str, JsonObject]:
    """The error answers of a route."""
    return {status: {"model": ErrorDocument, "description": _MEANINGS[status]} for status in statuses}


def answers(model: type[BaseModel], *statuses: int, extra: JsonObject = BEARER) -> JsonObject:
    """How a route for tokens describes itself. statuses: of its errors, besides those of tokens (401, 403, 429)."""
    responses = errors(*sorted({401, 403, 429, *statuses}))
    return {"response_model": model, "responses": responses, "openapi_extra": extra}


def body(model: type[BaseModel], in_path: Collection[str] = ()) -> JsonObject:
    """Describe a body that the route reads itself, within the server's bounds. in_path: fields that its path holds."""
    schema = model.model_json_schema(ref_template=_REFERENCE)
    _schemas.update(schema.pop("$defs", {}))
    parameters = [
        {"name": name, "in": "path", "required": True, "schema": schema["properties"].pop(name)} for name in in_path
    ]
    required = schema["required"] = [name for name in schema.get("required", ()) if name not in in_path]
    described: JsonObject = {**BEARER, "parameters": parameters} if parameters else {**BEARER}
    if schema["properties"]:
        _schemas[model.__name__] = schema
        content = {"application/json": {"schema": {"$ref": _REFERENCE.format(model=model.__name__)}}}
        described["requestBody"] = {"required": bool(required), "content": content}
    return described


def document(routes: Iterable[BaseRoute], version: str) -> JsonObject:
    """The OpenAPI document of routes, as a JSON object."""
    api = get_openapi(title="Tunesmith", version=version, routes=list(routes), separate_input_output_schemas=False)
    components = api.setdefault("components", {})
    schemas = components.setdefault("schemas", {})
    schemas.update(_schemas)
    for operation in [each for path in api["paths"].values() for each in path.values()]:
        operation["responses"].pop("422", None)  # FastAPI's own checks; the routes do theirs and answer 400
    for name in ("HTTPValidationError", "ValidationError"):
        schemas.pop(name, None)
    components["securitySchemes"] = {"bearer": {"type": "http", "scheme": "bearer"}}
    return api
