"""Schemas as grammars: the same answers as the schema allows, with keys in any order."""

from __future__ import annotations

import json
import random
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.candidates.test_copying import fits
from tunesmith.candidates.candidate import Candidate
from tunesmith.candidates.grammars.copying import Constraint, copied_fields
from tunesmith.candidates.grammars.schema_rules import SchemaRules, orders_keys
from tunesmith.core.messages import Message
from tunesmith.core.reading.answer_schema import satisfies
from tunesmith.core.reading.strict_json import NotJson, parse_json
from tunesmith.engines.protocol import Generation
from tunesmith.services.releases.export import _notes

Schema = dict[str, Any]
INNER: Schema = {"type": "object", "properties": {"x": {"type": "integer"}, "y": {"enum": ["a", "b"]}}}
KEYS = ("k0", 'a "b"\\', "é", "inner", "list", "maybe")
PARTS: tuple[Schema, ...] = (
    {"type": "string"},
    {"type": "integer", "minimum": 0, "maximum": 9},
    {"enum": ["one", "two"]},
    {**INNER, "required": ["y"], "additionalProperties": False},
    {"type": "array", "items": {**INNER, "additionalProperties": False}, "maxItems": 2},
    {"type": ["object", "null"], "properties": {"x": {}, "y": {}}, "additionalProperties": False},
)
VALUES: tuple[Any, ...] = (
    *("one", "", 3, 12, None, {}, [], {"y": "a"}, {"y": "b", "x": 1}, {"x": 1}, [{"y": "b", "x": 2}]),
)


@given(
    required=st.sets(st.sampled_from(KEYS)),
    further=st.sampled_from([False, {"type": "string"}]),
    members=st.lists(st.tuples(st.sampled_from([*KEYS, "other"]), st.sampled_from(VALUES)), max_size=7),
)
@settings(max_examples=60, deadline=None)
def test_the_grammar_allows_what_the_schema_allows(required: set[str], further: Any, members: list[Any]) -> None:
    schema: Schema = {
        "type": "object",
        "properties": dict(zip(KEYS, PARTS, strict=True)),
        "required": sorted(required),
        "additionalProperties": further,
    }
    grammar = SchemaRules(schema).write()
    assert grammar is not None
    written = "{" + ", ".join(f"{_written(key)}: {_written(value)}" for key, value in members) + "}"
    try:
        expected = satisfies(parse_json(written), schema)
    except NotJson:  # a key twice
        twice = [key for key, _ in members]
        expected = False
        if all(twice.count(key) == 1 for key in KEYS if key in twice):
            return  # only keys that the schema does not list may come twice: no grammar can count those
    assert fits(grammar, written) is expected


def _written(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)


def test_what_the_rules_cannot_say_stays_json_schema() -> None:
    schema: Schema = {
        "type": "object",
        "properties": {
            "a": {"$ref": "#/$defs/a"},
            "b": {**INNER, "required": ["x", "y"], "minProperties": 2},
            "c": {"type": "null"},
        },
        "additionalProperties": False,
        "$defs": {"a": {**INNER, "additionalProperties": False}},
    }
    grammar = SchemaRules(schema).write()
    assert grammar is not None
    assert fits(grammar, '{"c": null, "b": {"x": 1, "y": "a"}, "a": {"x": 1, "y": "a"}}')
    assert not fits(grammar, '{"b": {"x": 1}}')
    assert not fits(grammar, '{"a": {"z": 1}}')


def test_a_constrained_candidate_may_write_keys_in_any_order() -> None:
    own = (Message(role="user", content="x"),)

    def held(schema: Schema) -> Generation:
        candidate = Candidate(name="c", base="b", max_tokens=9, answer_schema=json.dumps(schema))
        return Constraint(candidate).hold(Generation(own), own)

    request = held(INNER)
    assert request.schema == json.dumps(INNER), "for engines without grammars"
    assert request.grammar is not None
    assert fits(request.grammar, '{"y": "a", "x": 1}')
    assert request.constrained_by == "constrain"
    assert held({"type": "string"}).grammar is None
    branches = {"type": "array", "items": {"$ref": "#"}}
    tree: Schema = {"type": "object", "properties": {"name": {"type": "string"}, "branches": branches}}
    assert copied_fields(tree, (), "constrain.copy") == ()
    assert held(tree).grammar is None, "rules cannot follow it, so keys come in the schema's order"


def test_an_export_says_what_other_programs_do_not_hold() -> None:
    def notes(**facts: Any) -> tuple[str, ...]:
        return _notes(Candidate(name="c", base="b", max_tokens=9, **facts))

    order = "other programs write keys in the schema's order"
    assert order in str(notes(answer_schema=json.dumps(INNER)))
    copying = '{"type": "object", "properties": {"name": {"type": "string"}}}'
    assert order in str(notes(answer_schema=copying, copied=("name",)))
    assert order not in str(notes(answer_schema='{"type": "string"}'))
    assert len(notes(answer_grammar='start: "a"\n')) == 1
    assert notes() == ()


SIXTY_FOUR: Schema = {"type": "object", "properties": {f"k{n}": {"type": "null"} for n in range(64)}}


def test_every_key_once_in_any_order() -> None:
    schema = {**SIXTY_FOUR, "required": [f"k{n}" for n in range(0, 64, 2)], "additionalProperties": False}
    grammar = SchemaRules(schema).write()
    assert grammar is not None
    keys = list(schema["properties"])
    random.Random(0).shuffle(keys)
    assert fits(grammar, json.dumps(dict.fromkeys(keys)))
    assert not fits(grammar, json.dumps(dict.fromkeys(key for key in keys if key != "k2"))), "k2 is required"
    assert not fits(grammar, json.dumps(dict.fromkeys(keys))[:-1] + ', "k1": null}')


def _object(**properties: Any) -> Schema:
    return {"type": "object", "properties": properties}


@pytest.mark.parametrize(
    ("schema", "orders", "kept_by"),
    [
        (INNER, True, None),
        ({"type": "array", "items": INNER}, True, None),
        ({"type": ["null", "object"], "properties": {"a": INNER}}, True, None),
        ({**INNER, "x-note": "n", "readOnly": True, "$anchor": "inner"}, True, None),
        (SIXTY_FOUR, True, None),
        ({"type": "string"}, False, None),
        (_object(a={"anyOf": [{"type": "string"}, {"type": "null"}]}), False, None),
        ({**INNER, "minProperties": 1}, False, "the answer: minProperties is not supported"),
        (_object(a={**INNER, "minProperties": 1}), False, "a: minProperties is not supported"),
        ({"$ref": "#/$defs/a", "$defs": {"a": INNER}}, False, "the answer: $ref is not supported"),
        (_object(**{f"k{n}": {} for n in range(65)}), False, "an object of more than 64 keys"),
        (_object(a={"type": "string"}, b={"$ref": "#/properties/a"}), True, "b: $ref: #/properties/a is not supported"),
        (
            {**_object(x={}, z={"$ref": "#/$defs/z"}), "$defs": {"z": {"items": {"$ref": "#"}}}},
            True,
            "z: $ref: # is not supported",
        ),
    ],
)
def test_why_keys_keep_the_schemas_order(schema: Schema, orders: bool, kept_by: str | None) -> None:
    """In a part of a grammar "#" would mean that part, so another schema would be followed."""
    assert orders_keys(schema) is orders
    constraint = Constraint(Candidate(name="c", base="b", max_tokens=9, answer_schema=json.dumps(schema)))
    assert constraint.order_kept_by is None if kept_by is None else kept_by in str(constraint.order_kept_by)
    assert constraint.any_order is (orders and kept_by is None)
