"""What answers are held to: schemas that a request brings, schemas as grammars, and calls of tools."""

import json
from functools import reduce
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from llguidance import LLMatcher

from tests.candidates.test_copying import fits
from tests.schemas import closed
from tests.tiny import write_model
from tunesmith.candidates.candidate import Candidate
from tunesmith.candidates.grammars.copying import Constraint
from tunesmith.candidates.grammars.request_schemas import ANY_OBJECT, both, call_grammar, check_schema
from tunesmith.candidates.grammars.schema_rules import SchemaRules, orders_keys
from tunesmith.core.errors import UsageError
from tunesmith.core.messages import Message
from tunesmith.core.reading.answer_schema import satisfies
from tunesmith.core.reading.strict_json import NotJson, parse_json
from tunesmith.engines.decoding.constraint import Constraints
from tunesmith.engines.protocol import Generation, restricted
from tunesmith.models.call_format import CallFormat
from tunesmith.models.rendering import Renderer
from tunesmith.services.versions import _notes

Schema = dict[str, Any]
TURNS = (Message(role="user", content="switch on the lamp"),)


TREE = closed({"v": {"type": "string", "maxLength": 2}, "c": {"type": "array", "items": {"$ref": "#"}, "maxItems": 2}})
LEAVES: Schema = {"v": {"type": "string"}, "c": {"type": "array", "items": {"$ref": "#/$defs/tree"}}}
DEFINED: Schema = {"$ref": "#/$defs/tree", "$defs": {"tree": closed(LEAVES)}}
OWN = closed(
    {"intent": {"enum": ["on", "off", "dim"]}, "level": {"$ref": "#/$defs/level"}},
    required=["intent"],
    **{
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "$defs": {"level": {"type": "integer", "maximum": 9}},
    },
)


def grammar_of(schema: Schema) -> str:
    return LLMatcher.grammar_from_json_schema(restricted(schema))


@pytest.mark.parametrize(
    ("own", "requested", "allowed", "refused"),
    [
        (
            OWN,
            closed({"level": {"type": "number", "minimum": 3}, "intent": {"type": "string", "pattern": "^o"}}),
            ['{"level": 5, "intent": "on"}'],
            [
                '{"intent": "on", "level": 5}',  # not in the requested order
                *('{"level": 2, "intent": "on"}', '{"level": 10, "intent": "on"}', '{"level": 5, "intent": "dim"}'),
            ],
        ),
        (
            OWN,
            closed({"intent": {"anyOf": [{"const": "dim"}, {"const": "on"}, {"const": "else"}]}}),
            ['{"intent": "dim"}', '{"intent": "on"}'],
            ['{"intent": "off"}', '{"intent": "else"}'],
        ),
        (OWN, dict(ANY_OBJECT), ['{"intent": "on", "level": 5}'], ['{"level": 5}', '{"intent": "on", "more": 1}']),
        (
            {"anyOf": [OWN, {"type": "array"}], "$defs": OWN["$defs"]},
            dict(ANY_OBJECT),
            ['{"intent": "on"}'],
            ["[]", '{"intent": "on", "level": 10}'],
        ),
        (
            closed({"a": {"type": "array", "items": {"enum": [1, 2, 3]}, "maxItems": 3}}),
            closed({"a": {"type": "array", "items": {"type": "integer", "minimum": 2}, "minItems": 1}}),
            ['{"a": [2, 3, 2]}'],
            ['{"a": []}', '{"a": [1]}', '{"a": [4]}', '{"a": [2, 2, 2, 2]}'],
        ),
        (
            {"type": "object"},
            TREE,
            ['{"v": "ab", "c": [{"v": "", "c": []}]}'],
            ['{"v": "abc", "c": []}', '{"v": "a", "c": [{"v": "abc", "c": []}]}'],
        ),
        (
            closed({"$ref": {"enum": ["#/a", "#"]}}),
            closed({"$ref": {"$ref": "#/$defs/t"}}, **{"$defs": {"t": {"type": "string"}}}),
            ['{"$ref": "#"}'],
            ['{"$ref": "x"}'],
        ),
    ],
)
def test_answers_fit_the_candidates_schema_and_the_requests(
    own: Schema, requested: Schema, allowed: list[str], refused: list[str]
) -> None:
    check_schema(requested, strict=False)
    grammar = grammar_of(both(own, requested))
    for answer in (*allowed, *refused):
        assert fits(grammar, answer) is (answer in allowed), answer


PLAIN = closed({"a": {"type": "string"}})
REFUSED = [
    ([], "not a schema"),
    ({"type": "object", "oneOf": []}, "'oneOf' is not supported"),
    (closed({"a": {"not": {}}}), "schema.properties.a: 'not' is not supported"),
    ({**PLAIN, "x-guidance": {"whitespace_flexible": True}}, "'x-guidance' is not supported"),
    (closed({"a": {"type": "array", "items": {"uniqueItems": True}}}), "'uniqueItems' is not supported"),
    (closed({"a": {"type": "array", "items": []}}), "schema.properties.a.items: not a schema"),
    (closed({"a": {"type": "text"}}), "'text' is not a type"),
    (closed({"a": {"type": [["string"]]}}), "not a list of names"),
    ({"type": "object", "required": "a"}, "required: not a list of names"),
    ({"type": "object", "properties": []}, "properties: not an object"),
    (closed({"a": {"enum": "a"}}), "enum: not a list"),
    (closed({"a": {"anyOf": []}}), "anyOf: not a list of schemas"),
    (closed({"a": {"type": "string", "pattern": 3}}), "pattern: not text"),
    (closed({"a": {"type": "string", "maxLength": -1}}), "maxLength: not a number"),
    (closed({"a": {"type": "string", "maxLength": 10**9}}), "maxLength: supported is at most"),
    (closed({"a": {"type": "number", "maximum": True}}), "maximum: not a number"),
    (closed({"a": {"type": "number", "maximum": 1e300}}), "maximum: supported is at most"),
    (closed({"a": {"type": "number", "multipleOf": 0.9999991}}), "multipleOf"),
    (closed({"a": {"type": "number", "multipleOf": 0}}), "multipleOf"),
    ({"$ref": "#"}, "back to itself"),
    ({"$ref": "#/$defs/a", "$defs": {"a": {"$ref": "#/$defs/b"}, "b": {"$ref": "#/$defs/a"}}}, "back to itself"),
    (closed({"a": {"$ref": "#/$defs/none"}}), "there is no schema"),
    (closed({"a": {"$ref": "https://example.com/s.json"}}), "only '#'"),
    (closed({"a": {"$ref": "#/properties/b/enum/0"}, "b": {"enum": [{"oneOf": []}]}}), "there is no schema"),
    (closed({"a": {"$ref": "#", "minLength": 2}}), "'minLength' is not supported beside '$ref'"),
    (closed({"a": {"type": "integer", "anyOf": [{"multipleOf": 7}]}}), "'type' is not supported beside 'anyOf'"),
    (closed({f"k{n}": {} for n in range(5_001)}), "more than 5000 properties"),
    (closed({"a": {"enum": list(range(1_001))}}), "more than 1000 enum values"),
    (closed({"k" * 120_001: {}}), "more than 120000 letters"),
]  # fmt: skip


@pytest.mark.parametrize(("schema", "said"), REFUSED)
def test_what_cannot_be_held_is_refused_by_name(schema: Any, said: str) -> None:
    with pytest.raises(ValueError, match=said.replace("$", r"\$")):
        check_schema(schema, strict=False)


def test_deep_schemas_are_refused_and_recursive_ones_are_not() -> None:
    deep: Schema = reduce(lambda inner, _: closed({"a": inner}), range(11), {"type": "string"})
    with pytest.raises(ValueError, match="more than 10 levels"):
        check_schema(deep, strict=False)
    check_schema(deep["properties"]["a"], strict=True)
    check_schema(TREE, strict=True)


@pytest.mark.parametrize(
    ("schema", "said"),
    [
        ({"type": "object", "properties": {"a": {}}, "required": ["a"]}, "'additionalProperties' must be false"),
        (closed({"a": {}, "b": {}}, required=["a"]), "'b' is missing"),
        (closed({"a": {"type": ["object", "null"]}}), "schema.properties.a: strict"),
        ({"type": "array", "items": PLAIN}, "type must be 'object'"),
        ({"anyOf": [PLAIN]}, "type must be 'object'"),
    ],
)
def test_strict_refuses_what_openai_refuses_and_its_absence_does_not(schema: Schema, said: str) -> None:
    check_schema(schema, strict=False)
    with pytest.raises(ValueError, match=said):
        check_schema(schema, strict=True)


# What a candidate's own rule becomes


def held(requested: Schema, **candidate: Any) -> Generation:
    made = Candidate(name="c", base="b", max_tokens=9, **candidate)
    return Constraint(made).hold(Generation(messages=TURNS), TURNS, requested)


def test_a_candidates_own_rule_stays_where_it_implies_the_requests() -> None:
    alone = held(PLAIN)
    assert (json.loads(alone.schema or ""), alone.constrained_by) == (PLAIN, "response_format.json_schema")
    for requested in (dict(ANY_OBJECT), json.loads(json.dumps(OWN))):
        request = held(requested, answer_schema=json.dumps(OWN))
        assert (request.schema, request.constrained_by) == (json.dumps(OWN), "constrain")
        assert request.grammar is not None, "keys may still come in any order"
    copied = held(dict(ANY_OBJECT), answer_schema=json.dumps(PLAIN), copied=("a",))
    assert copied.constrained_by == "messages"
    both_ = held(closed({"intent": {"const": "on"}}), answer_schema=json.dumps(OWN))
    assert (both_.grammar, both_.constrained_by) == (None, "response_format.json_schema")
    grammar = grammar_of(json.loads(both_.schema or ""))
    assert [fits(grammar, f'{{"intent": "{intent}"}}') for intent in ("on", "off")] == [True, False]


@pytest.mark.parametrize(
    ("candidate", "requested", "said"),
    [
        ({"answer_grammar": 'start: "a"'}, dict(ANY_OBJECT), "a grammar"),
        ({"answer_schema": json.dumps(PLAIN), "copied": ("a",)}, OWN, "copied from the request"),
        ({"answer_schema": json.dumps({"multipleOf": 7})}, closed({"a": {"multipleOf": 5}}), "multipleOf"),
        ({"answer_schema": '{"$ref": "other.json"}'}, PLAIN, "refers to"),
        ({"answer_schema": '{"items": {"$id": "x"}}'}, PLAIN, r"\$id"),
    ],
)  # fmt: skip
def test_rules_that_cannot_be_held_together_are_refused(candidate: Schema, requested: Schema, said: str) -> None:
    with pytest.raises(UsageError, match=said) as caught:
        held(requested, **candidate)
    assert caught.value.where == "response_format"


@pytest.fixture(scope="module")
def constraints(tmp_path_factory: pytest.TempPathFactory) -> Constraints:
    renderer = Renderer(write_model(tmp_path_factory.mktemp("m")))
    return Constraints(renderer.tokenizer, len(renderer.tokenizer), renderer.stop_ids)


@pytest.mark.parametrize(
    ("candidate", "requested", "said"),
    [
        ({}, closed({"a": {"type": "string", "format": "secret"}}), "Unknown format"),
        ({}, closed({"a": {"type": "string", "pattern": "("}}), "cannot be held to this response_format"),
        ({"answer_schema": json.dumps(DEFINED)}, TREE, "stack level exceeded"),
        ({"answer_schema": json.dumps(OWN)}, closed({"other": {"type": "string"}}), "Unsatisfiable schema"),
        ({"answer_schema": json.dumps(OWN)}, {"type": "array"}, "Unsatisfiable schema"),
    ],
)
def test_a_schema_that_does_not_compile_is_the_requests_fault(
    constraints: Constraints, candidate: Schema, requested: Schema, said: str
) -> None:
    check_schema(requested, strict=False)
    with pytest.raises(UsageError, match=said) as caught:
        constraints.guide(held(requested, **candidate))
    assert caught.value.where == "response_format.json_schema"
    assert "dim" not in str(caught.value), "the candidate's own schema is not told"


# Schemas as grammars: the same answers as the schema allows, with keys in any order


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
    parts = {"a": {"$ref": "#/$defs/a"}, "b": {**INNER, "required": ["x", "y"], "minProperties": 2}}
    closed_ = {"additionalProperties": False, "$defs": {"a": {**INNER, "additionalProperties": False}}}
    grammar = SchemaRules({**_object(**parts, c={"type": "null"}), **closed_}).write()
    assert grammar is not None
    assert fits(grammar, '{"c": null, "b": {"x": 1, "y": "a"}, "a": {"x": 1, "y": "a"}}')
    assert not fits(grammar, '{"b": {"x": 1}}')
    assert not fits(grammar, '{"a": {"z": 1}}')


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


# Answers that are held to calls: which are allowed, and which tools cannot be held


TAGGED = CallFormat("<call>\n", "\n</call>\n<call>\n", "\n</call>", "name", "arguments", exact=True)
BARE = CallFormat("", None, "", "name", "parameters", exact=True)
LISTED = CallFormat("[", ", ", "]", "name", "arguments", exact=True)
CITY = {"type": "object", "properties": {"city": {"$ref": "#/$defs/c"}}, "required": ["city"]}
CITY |= {"additionalProperties": False, "$defs": {"c": {"enum": ["Oslo", "Rome"]}}}
WEATHER: dict[str, Any] = {"name": "weather", "parameters": CITY, "strict": True}
TIME: dict[str, Any] = {"name": "time", "parameters": None, "strict": None}
OSLO, NOW = '{"name": "weather", "arguments": {"city": "Oslo"}}', '{"name": "time", "arguments": {}}'
FREE = '{"name": "time", "arguments": {"any": [1]}}'


def one(call: str) -> str:
    return f"<call>\n{call}\n</call>"


@pytest.mark.parametrize(
    ("answer", "forced", "several", "allowed"),
    [
        (one(OSLO), True, False, True),
        (f"{one(OSLO)}\n{one(NOW)}", True, True, True),
        (f"{one(OSLO)}\n{one(NOW)}", True, False, False),
        (one(OSLO.replace("Oslo", "Bonn")), True, True, False),
        (one(FREE), True, True, False),
        (one(NOW.replace("time", "delete")), True, True, False),
        ("Hello", True, True, False),
        ("", True, True, False),
        ("", False, True, True),
        ("a < b, <cal> and </call>", False, True, True),
        (f"I look.\n{one(OSLO)}\n{one(NOW)}", False, True, True),
        (f"I look.\n{one(OSLO)}\n{one(NOW)}", False, False, False),
        (f"I look.\n{one(OSLO.replace('Oslo', 'Bonn'))}", False, True, False),
        (one(FREE), False, True, True),  # its function is not strict
        (one(FREE.replace("time", "delete")), False, True, False),
        (f"{one(OSLO)} and more", False, True, False),
    ],
)
def test_answers_are_held_to_calls(answer: str, forced: bool, several: bool, allowed: bool) -> None:
    assert fits(call_grammar(TAGGED, [WEATHER, TIME], forced=forced, several=several), answer) == allowed


def test_other_formats_are_held_too() -> None:
    bare, listed = (call_grammar(form, [WEATHER, TIME], forced=True, several=True) for form in (BARE, LISTED))
    for city in ("Rome", "Bonn"):
        answer = json.dumps({"name": "weather", "parameters": {"city": city}})
        assert fits(bare, answer) is (city == "Rome")
    assert fits(listed, f"[{OSLO}, {NOW}]")
    assert not fits(listed, "[]")


@pytest.mark.parametrize(
    ("form", "tool", "forced", "where"),
    [
        (BARE, WEATHER, False, "tool_choice"),
        (CallFormat("", "", "", "name", "arguments", exact=False), WEATHER, True, "tool_choice"),
        (TAGGED, {"name": "f", "parameters": {"oneOf": []}}, True, "tools"),
        (TAGGED, {"name": "f", "parameters": {"type": "object", "properties": 3}}, True, "tools"),
    ],
)
def test_calls_that_cannot_be_held_are_refused_by_name(form: CallFormat, tool: Any, forced: bool, where: str) -> None:
    with pytest.raises(UsageError) as caught:
        call_grammar(form, [tool], forced=forced, several=True)
    assert caught.value.where == where
