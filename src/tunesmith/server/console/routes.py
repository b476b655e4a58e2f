"""All routes of the console: its pages, static files, and the form endpoints of the actions that it offers.

A form endpoint is made from the list of actions (services/actions.py). The form is sent to `/console/do` and the
action's path. Its field `next` is the page to go to afterwards, in which `{field}` stands for a field of the result.
Where a template has the action's name, it is the answer instead.
"""

from __future__ import annotations

import mimetypes
from collections.abc import Mapping
from functools import cache, partial
from typing import Any

from fastapi import Request, Response
from fastapi.responses import FileResponse, RedirectResponse
from pydantic import BaseModel

from tunesmith.core.errors import UsageError
from tunesmith.server.console import changes, evidence, jobs, login, operations, releases, rows
from tunesmith.server.console.rendering import FILES, HEADERS, has_template
from tunesmith.server.console.routing import Changing, Pages, field, form, gone_to, local_page
from tunesmith.server.errors import missing
from tunesmith.server.serving import FIELD, PUBLIC
from tunesmith.services.actions import Action, all_actions

_KEPT = {**HEADERS, "Cache-Control": "public, max-age=31536000, immutable"}
_OF_THE_FORM = ("csrf", "next")
routes = Pages()


@routes.get("/console", dependencies=[PUBLIC])
async def console() -> Response:
    """The console begins at the root."""
    return RedirectResponse("/", 308)


@routes.get("/console/static/{name}", dependencies=[PUBLIC])
async def static(name: str) -> Response:
    """A file that ships with the console. Pages name it with a digest, so that browsers may keep it."""
    if name not in FILES:
        raise missing("page")
    return FileResponse(FILES[name], media_type=mimetypes.guess_type(name)[0] or "text/plain", headers=_KEPT)


async def _perform(action: Action[Any, Any], request: Request, viewer: Changing) -> Response:
    action.check(viewer.user)
    given = await form(request)
    asked = action.request({**fields_of(action.asked, given), **request.path_params})
    done = await viewer.serving.perform(viewer, action, asked)
    template = action.name.replace(".", "_") + ".html.jinja"
    if has_template(template):
        return viewer.page(template, done=done)
    shown = {name: "" if value is None else str(value) for name, value in dict(done).items()}
    following = FIELD.sub(lambda match: shown.get(match[1], ""), field(given, "next"))
    return gone_to(request, local_page(following.rstrip("/")))


def fields_of(model: type[BaseModel], given: Mapping[str, list[str]]) -> dict[str, Any]:
    """The fields of a request from those of a form. An empty one is left out; what a list holds is sent repeatedly.

    Text for a number becomes one. A field `changes.my.lora.rank` is the key `rank` of the key `my.lora` of the field
    `changes`. Raises UsageError where a field is both a text and keys.
    """
    fields: dict[str, Any] = {}
    for name, texts in given.items():
        values = [text.replace("\r\n", "\n") for text in texts]
        if name in _OF_THE_FORM or values == [""]:
            continue
        first, *inside = name.split(".", 1)
        *path, last = [first, *(part for each in inside for part in each.rsplit(".", 1))]
        inner = fields
        for part in path:
            inner = inner.setdefault(part, {})
            if not isinstance(inner, dict):
                raise UsageError("the form cannot be read", where=name)
        kinds = set[str]() if path else _kinds(model).get(last, set())
        number = "integer" in kinds and len(values[0]) < 20 and values[0].isascii() and values[0].isdecimal()
        inner[last] = values if "array" in kinds else int(values[0]) if number else values[0]
    return fields


@cache
def _kinds(model: type[BaseModel]) -> Mapping[str, set[str]]:
    """The kinds of JSON values that each field of a request takes."""
    fields = model.model_json_schema()["properties"]
    return {
        name: {each["type"] for each in (one, *one.get("anyOf", ())) if "type" in each} for name, one in fields.items()
    }


for each in all_actions():
    if each.form:
        routes.post("/console/do" + each.at, name=each.name)(partial(_perform, each))
for part in (login, changes, jobs, evidence, releases, rows, operations):
    routes.include_router(part.routes)


@routes.get("/console/{rest:path}", dependencies=[PUBLIC])
async def no_page(request: Request) -> Response:
    """Any other address of the console."""
    raise missing("page")
