"""response_format: the engine gets it, the answer fits it, and what cannot be held is a 400 of the request's own."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal

import openai
import pytest
from pydantic import BaseModel

from tests.fabricate import NAME, Scene
from tests.server.conftest import HELLO, Served, running
from tests.server.fake_engine import FakeEngine
from tests.server.tiny_engine import TinyEngine
from tunesmith.registry.versions import Version

Versions = dict[int, Version]


class Command(BaseModel):
    intent: Literal["on", "off"]
    level: int | None


def schema_format(schema: Any, **more: Any) -> dict[str, Any]:
    return {"type": "json_schema", "json_schema": {"name": "command", "schema": schema, **more}}


def closed(properties: dict[str, Any]) -> dict[str, Any]:
    """An object with these properties and no other."""
    names = {"required": list(properties), "additionalProperties": False}
    return {"type": "object", "properties": properties, **names}


ONE = closed({"intent": {"enum": ["on", "off"]}})


def test_any_object_and_a_schema_reach_the_engine(served: Served) -> None:
    served.ask(response_format={"type": "json_object"})
    assert json.loads(served.engine.seen[-1].schema or "") == {"type": "object", "additionalProperties": True}
    served.ask(response_format=schema_format(ONE, strict=True, description="what to do"), stream=True).close()
    assert json.loads(served.engine.seen[-1].schema or "") == ONE
    served.ask(response_format={"type": "text"})
    assert served.engine.seen[-1].schema is None
    # Nobody measured the version with these formats, so such answers are no evidence about it.
    assert [(row.cut, bool(row.scores)) for row in served.rows()] == [(True, False), (True, False), (False, True)]


def test_the_clients_own_helper_for_schemas_works(served: Served) -> None:
    served.engine.answer = lambda _request, _adapter: '{"intent":"off","level":null}'
    parsed = served.client().chat.completions.parse(model=NAME, messages=HELLO, response_format=Command)
    assert parsed.choices[0].message.parsed == Command(intent="off", level=None)
    asked = json.loads(served.engine.seen[-1].schema or "")
    assert asked["properties"].keys() == {"intent", "level"}


@pytest.mark.parametrize(
    ("value", "param", "code"),
    [
        ({"type": "xml"}, "response_format.type", "invalid_value"),
        ({"type": "json_object", "schema": {}}, "response_format.schema", "unknown_parameter"),
        ({"type": "json_schema"}, "response_format", "invalid_value"),
        ({"type": "text", "json_schema": {"name": "a", "schema": {}}}, "response_format", "invalid_value"),
        (schema_format(ONE, name="a b"), "response_format.json_schema.name", "invalid_value"),
        (schema_format(ONE, name="a" * 65), "response_format.json_schema.name", "invalid_value"),
        (schema_format({"type": "object"}, strict=True), "response_format.json_schema", "invalid_json_schema"),
        (schema_format({"oneOf": [ONE]}), "response_format.json_schema", "invalid_json_schema"),
    ],
)
def test_a_format_that_is_not_valid_is_refused_by_name(shared: Served, value: Any, param: str, code: str) -> None:
    asked = len(shared.engine.seen)
    response = shared.post(response_format=value)
    error = response.json()["error"]
    assert (response.status_code, error["param"], error["code"]) == (400, param, code)
    assert len(shared.engine.seen) == asked


@pytest.fixture
def tiny(scene: Scene, versions: Versions, tmp_path: Path) -> Any:
    """A server whose champion answers by a tiny random model."""
    engine: Any = TinyEngine(scene.base, tmp_path / "tiny")
    engine.gate = FakeEngine(scene.base).gate
    with running(scene, engine) as server:
        server.begin(versions[1])
        yield server


def test_a_real_engine_holds_answers_whole_and_streamed(tiny: Served) -> None:
    asked = {"response_format": schema_format(ONE, strict=True), "temperature": 1.5, "seed": 3}
    whole = tiny.ask(**asked).choices[0]
    assert (json.loads(whole.message.content)["intent"] in ("on", "off"), whole.finish_reason) == (True, "stop")
    chunks = list(tiny.ask(**asked, stream=True))
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == whole.message.content


@pytest.mark.parametrize("part", [{"type": "string", "pattern": "("}, {"const": 10**20}], ids=["pattern", "number"])
def test_a_schema_that_does_not_compile_is_a_400_and_no_failure_of_the_version(tiny: Served, part: Any) -> None:
    bad = schema_format(closed({"a": part}))
    for stream in (False, True):
        with pytest.raises(openai.BadRequestError, match="cannot be held to this response_format") as caught:
            tiny.ask(response_format=bad, stream=stream)
        assert (caught.value.code, caught.value.param) == ("invalid_json_schema", "response_format.json_schema")
    assert tiny.rows() == []
