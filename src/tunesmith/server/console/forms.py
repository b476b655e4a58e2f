"""The form endpoints of the actions that the console offers, made from their list (services/actions.py).

A form is sent to `/console/do` and the action's path. Its field `next` is the page to go to afterwards, in which
`{field}` stands for a field of the result. Where a template has the action's name, it is the answer instead.
"""

from __future__ import annotations

from collections.abc import Callable, Coroutine, Mapping
from functools import cache
from typing import Any

from fastapi import Request, Response
from pydantic import BaseModel

from tunesmith.core.errors import UsageError
from tunesmith.server.actions import FIELD, perform
from tunesmith.server.console.people.session import Changing, field, form
from tunesmith.server.console.rendering import has_template
from tunesmith.server.console.routing import gone_to, local_page, router
from tunesmith.services.actions import Action, all_actions

_OF_THE_FORM = ("csrf", "next")
AT = "/console/do"
routes = router()


def _endpoint(action: Action[Any, Any]) -> Callable[..., Coroutine[Any, Any, Response]]:
    async def endpoint(request: Request, viewer: Changing) -> Response:
        action.check(viewer.user)
        given = await form(request)
        asked = action.request({**fields_of(action.asked, given), **request.path_params})
        done = await perform(viewer.serving, viewer.user, action, asked, session=viewer.session)
        template = action.name.replace(".", "_") + ".html.jinja"
        if has_template(template):
            return viewer.page(template, done=done, asked=asked)
        shown = {name: "" if value is None else str(value) for name, value in dict(done).items()}
        following = FIELD.sub(lambda found: shown.get(found[1], ""), field(given, "next"))
        return gone_to(request, local_page(following.rstrip("/")))

    return endpoint


def fields_of(model: type[BaseModel], given: Mapping[str, list[str]]) -> dict[str, Any]:
    """The fields of a request from those of a form. An empty one is left out; what a list holds is sent repeatedly.

    Text for a number becomes one. A field `changes.my.lora.rank` is the key `rank` of the key `my.lora` of the field
    `changes`. Raises UsageError where a field is both a text and keys.
    """
    found: dict[str, Any] = {}
    for name, texts in given.items():
        values = [text.replace("\r\n", "\n") for text in texts]
        if name in _OF_THE_FORM or values == [""]:
            continue
        first, *inside = name.split(".", 1)
        *path, last = [first, *(part for each in inside for part in each.rsplit(".", 1))]
        inner = found
        for part in path:
            inner = inner.setdefault(part, {})
            if not isinstance(inner, dict):
                raise UsageError("the form cannot be read", where=name)
        kinds = set[str]() if path else _kinds(model).get(last, set())
        number = "integer" in kinds and len(values[0]) < 20 and values[0].isascii() and values[0].isdecimal()
        inner[last] = values if "array" in kinds else int(values[0]) if number else values[0]
    return found


@cache
def _kinds(model: type[BaseModel]) -> Mapping[str, set[str]]:
    """The kinds of JSON values that each field of a request takes."""
    fields = model.model_json_schema()["properties"]
    return {
        name: {each["type"] for each in (one, *one.get("anyOf", ())) if "type" in each} for name, one in fields.items()
    }


for each in all_actions():
    if each.form:
        routes.post(AT + each.at, name=each.name)(_endpoint(each))
