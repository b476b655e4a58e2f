"""Schemas that must be refused before any answer is judged by them."""

import contextlib
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.attack_table import Happened
from tests.fabricate import SCHEMA
from tunesmith.core.errors import UsageError
from tunesmith.core.reading.answer_schema import check_answer_schema, load_answer_schema, satisfies

DRAFT_3 = "http://json-schema.org/draft-03/schema#"


def nested(key: str, depth: int, inner: Any) -> Any:
    """An object inside an object, `depth` times."""
    for _ in range(depth):
        inner = {key: inner}
    return inner


def doubling(depth: int) -> dict[str, Any]:
    """Definitions a0, a1, ... of which each refers twice to the next: 2^depth checks of one value."""
    parts: dict[str, Any] = {
        f"a{n}": {"allOf": [{"$ref": f"#/$defs/a{n + 1}"}, {"$ref": f"#/$defs/a{n + 1}"}]} for n in range(depth)
    }
    return {"$defs": {**parts, f"a{depth}": {}, "a": {"$ref": "#/$defs/a0"}}}


@pytest.mark.attack("settings", "a schema that hangs, fetches or is not valid", "refused when it is read")
@pytest.mark.parametrize(
    ("schema", "message"),
    [
        (True, "not a JSON object"),
        ({"type": "objekt"}, "not valid JSON Schema"),
        ({"properties": {"a": {"minimum": "low"}}}, r"not valid JSON Schema"),
        ({"properties": {"a": {"$ref": "file:///etc/passwd"}}}, "outside itself"),
        ({"allOf": [{"items": {"$dynamicRef": "other.json"}}]}, "outside itself"),
        ({"$ref": "#/$defs/missing"}, "to nothing"),
        ({"$ref": "#"}, "without end"),
        ({"pattern": "("}, "not a regular expression"),
        ({"properties": {"a": {"pattern": "^(?!b)"}}}, "not a regular expression that is supported"),
        ({"patternProperties": {r"(a)\1": {}}}, "not a regular expression that is supported"),
        ({"$defs": {"x": {"pattern": "a{1,5000}"}}}, "not a regular expression that is supported"),
        ({"const": {"pattern": "a"}, "properties": {"k": {"$ref": "#/const"}}}, "to nothing"),
        ({"properties": {"k": {"$schema": "http://json-schema.org/draft-07/schema#"}}}, "only the whole schema"),
        ({"$ref": "#/$defs/a"} | doubling(40), "too many steps"),
        ({"pattern": "a" * 2_000_000 + "("}, "not a regular expression"),
        ({"patternProperties": {"a": {}}, "unevaluatedProperties": False}, "not supported"),
        ({"$schema": 7}, "not a known version"),
        ({"$schema": "https://example.com/mine"}, "not a known version"),
        ({"$ref": "#/a/b", "a": {"b": {"$ref": "#/c"}}, "c": {"items": {"$ref": "#/nothing"}}}, "to nothing"),
        ({"$schema": DRAFT_3, "properties": {"room": {"type": "foo"}}}, "draft-03"),
        ({"patternProperties": {"(x.{0,900})y": {}}}, "too large"),
    ],
)
def test_refused(schema: Any, message: str) -> None:
    with pytest.raises(UsageError, match=message) as caught:
        check_answer_schema(schema, "task.schema")
    assert str(caught.value.where).startswith("task.schema")


@pytest.mark.attack("input", "an answer that makes a pattern backtrack")
@pytest.mark.parametrize(
    "pattern", ["^(ab|a|b|[c-z])*$", "^(a+)+$", "(x+x+)+y", r"^(([a-z])+.)+[A-Z]([a-z])+$", "(a?){200}a{200}$"]
)
def test_patterns_are_linear_in_the_answer(pattern: str, happened: Happened) -> None:
    draft = "https://json-schema.org/draft/2020-12/schema"
    recursive = {"$schema": draft, "properties": {"next": {"$ref": "#"}, "text": {"pattern": pattern}}}
    named = {"patternProperties": {pattern: {}}}
    for schema in ({"pattern": pattern}, recursive, named, {**named, "additionalProperties": False}):
        check_answer_schema(schema, "x")
        for letters in ("a", "ab", "x"):
            text = letters * (50_000 // len(letters)) + "!"
            value = text if "pattern" in schema else {"next": {"text": text}} if schema is recursive else {text: 1}
            assert satisfies(value, schema) is (schema is named)
    happened("answered in linear time", 12)


@pytest.mark.attack("input", "a long answer to a pattern of many instructions")
def test_a_search_costs_steps_by_the_pattern_and_the_text(happened: Happened) -> None:
    pattern = "(a?){900}b"
    schemas: list[tuple[Any, Any]] = [
        ({"pattern": pattern}, "a" * 10_000_000),
        ({"items": {"pattern": pattern}}, ["a" * 20_000] * 1000),
        ({"patternProperties": {pattern: False}}, {"a" * 2000 + str(n): 1 for n in range(4000)}),
        ({"propertyNames": {"pattern": pattern}}, {"b" + "a" * 20_000 + str(n): 1 for n in range(4000)}),
    ]
    for schema, value in schemas:
        check_answer_schema(schema, "x")
        assert not satisfies(value, schema)
    assert satisfies("a" * 1000 + "b", {"pattern": pattern})
    assert satisfies(["room 12"] * 5000, {"items": {"pattern": "^[a-z]{1,64} [0-9]{1,3}$"}})
    happened("ended after its steps, not valid", len(schemas))
    items = [{"n": n} for n in range(10_000)]
    assert satisfies(items, {"uniqueItems": True})
    assert not satisfies([*items, {"n": 5}], {"uniqueItems": True})
    many = {"$schema": "http://json-schema.org/draft-04/schema#", "enum": [f"label {n}" for n in range(20_000)]}
    check_answer_schema(many, "x")
    assert all(satisfies("label 19999", many) for _ in range(20))
    assert not satisfies("label", many)


@pytest.mark.attack("input", "an answer that makes a schema's check explode", "ended after its steps, not valid")
@pytest.mark.parametrize(
    ("schema", "value"),
    [
        ({"properties": {"x": {"anyOf": [{"$ref": "#"}] * 4}}, "required": ["x"]}, nested("x", 60, {})),
        ({"properties": {"z": {"$ref": "#/properties/z"}}}, {"z": 1}),
        ({"unevaluatedProperties": False, "allOf": [{"properties": {"x": {"$ref": "#"}}}] * 4}, nested("x", 60, {})),
        ({"not": {"not": {"properties": {"x": {"not": {"not": {"$ref": "#"}}}}}}}, nested("x", 60, {})),
    ],
)
def test_an_exploding_check_ends_and_the_answer_is_not_valid(schema: Any, value: Any) -> None:
    check_answer_schema(schema, "x")
    assert not satisfies(value, schema)


@pytest.mark.parametrize(
    ("value", "listed", "valid"),
    [(1, [1.0], True), (True, [1], False), (1, [True], False), ([1], [[1.0]], True), ({"a": 0}, [{"a": False}], False),
     (None, [None], True), (0, [False, None], False), ("1", [1], False)],
)  # fmt: skip
def test_listed_values_are_equal_as_in_json(value: Any, listed: list[Any], valid: bool) -> None:
    assert satisfies(value, {"enum": listed}) is valid
    assert satisfies([value, *listed], {"uniqueItems": True}) is not valid


def test_multiples_are_those_of_decimals() -> None:
    cents = {"multipleOf": 0.01}
    assert all(satisfies(count / 100, cents) for count in range(10_000)), "as quotients of doubles 14% are not"
    assert not satisfies(0.015, cents)
    assert satisfies(True, cents), "no number"
    assert satisfies(-6, {"multipleOf": 3})
    assert not satisfies(10**300, {"multipleOf": 7.0})
    assert satisfies(1e300, {"multipleOf": 1e-300})
    assert not satisfies(1e-300, {"multipleOf": 1e300})


@given(st.recursive(
    st.none() | st.booleans() | st.integers(-5, 5) | st.text(max_size=3),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from([
        "type", "properties", "items", "anyOf", "allOf", "oneOf", "not", "$ref", "$defs", "enum", "const", "pattern",
        "required", "additionalProperties", "patternProperties", "uniqueItems", "if", "then", "$schema", "$id", "a",
    ]) | st.text(max_size=2), inner, max_size=4),
    max_leaves=12,
))  # fmt: skip
def test_any_json_is_a_schema_or_an_error_of_ours(schema: Any) -> None:
    with contextlib.suppress(UsageError):
        check_answer_schema(schema, "x")
        satisfies({"a": [1, {"a": "b"}]}, schema)


NAMED = {"properties": {"x": {}}, "patternProperties": {"^s_": {"type": "string"}}, "additionalProperties": False}


@pytest.mark.parametrize(
    ("schema", "valid", "wrong"),
    [
        (NAMED, {"x": 1, "s_a": "b"}, {"s_a": 1}),
        (NAMED, {}, {"y": 1}),
        ({"additionalProperties": {"type": "integer"}}, {"y": 1}, {"y": "a"}),
        ({"additionalProperties": True, "pattern": "ab"}, "xaby", "xay"),
        # Data inside a schema are not taken for schema.
        (
            {"const": {"$ref": "https://example.com"}, "examples": [{"pattern": "("}]},
            {"$ref": "https://example.com"},
            1,
        ),
        ({"properties": {"pattern": {"type": "string"}, "$ref": {"type": "string"}}}, {"$ref": "a"}, {"pattern": 1}),
    ],
)
def test_schemas_work_as_the_standard_says(schema: dict[str, Any], valid: Any, wrong: Any) -> None:
    check_answer_schema(schema, "x")
    assert satisfies(valid, schema)
    assert not satisfies(wrong, schema)
    for part in ({"$ref": "#/nothing"}, {"type": "foo"}):  # which was not checked
        with pytest.raises(UsageError, match="cannot be followed"):
            satisfies({"room": 1}, {"properties": {"room": part}})


def test_a_file_of_a_schema(tmp_path: Path) -> None:
    path = tmp_path / "answer.schema.json"
    with pytest.raises(UsageError, match="does not exist"):
        load_answer_schema(path)
    with pytest.raises(UsageError, match="cannot be read"):
        load_answer_schema(tmp_path)
    path.write_text(json.dumps(SCHEMA))
    assert load_answer_schema(path) == SCHEMA
    path.write_bytes(b'{"a": 1, "a": 2}')
    with pytest.raises(UsageError, match="not JSON") as caught:
        load_answer_schema(path)
    assert caught.value.where == str(path)


def test_commands_that_read_no_schema_do_not_load_its_library() -> None:
    shown = "import sys; from tunesmith.services import audit, home, versions; print('jsonschema' in sys.modules)"
    shown += "; from tunesmith.core.reading import answer_schema; print('lark' in sys.modules)"  # its slowest part
    shown += "; from jsonschema import Draft7Validator as all; check = all.FORMAT_CHECKER.conforms"
    shown += "; print(check('a b<', 'iri-reference'), check('urn:a', 'iri-reference'), 'lark' in sys.modules)"
    told = subprocess.run([sys.executable, "-c", shown], capture_output=True, text=True, check=True).stdout
    assert told == "False\nFalse\nFalse True True\n"
