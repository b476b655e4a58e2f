"""Schemas that must be refused before any answer is judged by them."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest

from tests.fabricate import SCHEMA
from tunesmith.core.answer_schema import check_answer_schema, load_answer_schema, satisfies
from tunesmith.core.errors import UsageError


@pytest.mark.parametrize(
    ("schema", "message"),
    [
        ([], "not a JSON object"),
        (True, "not a JSON object"),
        ({"type": "objekt"}, "not valid JSON Schema"),
        ({"properties": {"a": {"minimum": "low"}}}, r"not valid JSON Schema"),
        ({"$ref": "https://example.com/answer.json"}, "outside itself"),
        ({"properties": {"a": {"$ref": "file:///etc/passwd"}}}, "outside itself"),
        ({"allOf": [{"items": {"$dynamicRef": "other.json"}}]}, "outside itself"),
        ({"$ref": "#/$defs/missing"}, "to nothing"),
        ({"$ref": "#"}, "without end"),
        ({"properties": {"a": {"pattern": "(a|aa)+$"}}}, "needs more than"),
        ({"patternProperties": {"^(a|a)*$": {}}}, "needs more than"),
        ({"$defs": {"x": {"pattern": "^(([a-z]|[a-y])+)+$"}}}, "needs more than"),
        ({"pattern": "("}, "not"),
        ({"patternProperties": {"a": {}}, "unevaluatedProperties": False}, "not supported"),
        ({"$schema": 7}, "not a known version"),
        ({"$schema": "https://example.com/mine"}, "not a known version"),
    ],
)
def test_refused(schema: Any, message: str) -> None:
    began = time.process_time()
    with pytest.raises(UsageError, match=message) as caught:
        check_answer_schema(schema, "task.schema")
    assert caught.value.where is not None
    assert caught.value.where.startswith("task.schema")
    assert time.process_time() - began < 5


def test_data_inside_a_schema_is_not_taken_for_schema() -> None:
    check_answer_schema({"const": {"$ref": "https://example.com"}, "examples": [{"pattern": "("}]}, "x")
    check_answer_schema({"properties": {"pattern": {"type": "string"}, "$ref": {"type": "string"}}}, "x")


def test_a_pattern_that_explodes_on_an_answer_stops_it() -> None:
    schema = {"pattern": "^(ab|abab)+$"}  # harmless on one repeated letter, so it passes the check
    check_answer_schema(schema, "x")
    began = time.process_time()
    with pytest.raises(UsageError, match="needs more than"):
        satisfies("ab" * 60 + "!", schema)
    assert time.process_time() - began < 5


def test_patterns_work_as_they_do_in_json_schema() -> None:
    schema = {"properties": {"x": {}}, "patternProperties": {"^s_": {"type": "string"}}, "additionalProperties": False}
    check_answer_schema(schema, "x")
    assert satisfies({"x": 1, "s_a": "b"}, schema)
    assert not satisfies({"s_a": 1}, schema)
    assert not satisfies({"y": 1}, schema)
    assert satisfies({"y": 1}, {"additionalProperties": {"type": "integer"}})
    assert not satisfies({"y": "a"}, {"additionalProperties": {"type": "integer"}})
    assert satisfies({"y": "a"}, {"additionalProperties": True})
    assert satisfies("xaby", {"pattern": "ab"})


@pytest.mark.parametrize("content", [b"", b"{", b"\xff\xfe", b"[" * 100_000, b"{} {}"])
def test_a_file_that_is_not_json(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "answer.schema.json"
    path.write_bytes(content)
    with pytest.raises(UsageError, match="not JSON") as caught:
        load_answer_schema(path)
    assert caught.value.where == str(path)


def test_a_file_that_is_not_there_or_not_a_file(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="does not exist"):
        load_answer_schema(tmp_path / "missing.json")
    with pytest.raises(UsageError, match="cannot be read"):
        load_answer_schema(tmp_path)


def test_a_good_file(tmp_path: Path) -> None:
    path = tmp_path / "answer.schema.json"
    path.write_text(json.dumps(SCHEMA))
    assert load_answer_schema(path) == SCHEMA
