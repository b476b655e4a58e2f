"""Schemas that a request brings: which can be held, and that the candidate's own is never loosened."""

from __future__ import annotations

import json
import random
from functools import reduce
from typing import Any

import jsonschema
import numpy as np
import pytest
from llguidance import LLMatcher, LLTokenizer
from llguidance.numpy import allocate_token_bitmask, fill_next_token_bitmask

from tests.tiny import write_model
from tunesmith.candidates.candidate import Candidate
from tunesmith.candidates.grammars.copying import Constraint
from tunesmith.candidates.grammars.request_schemas import ANY_OBJECT, both, check_schema
from tunesmith.core.errors import UsageError
from tunesmith.core.messages import Message
from tunesmith.engines.decoding.constraint import Constraints
from tunesmith.engines.decoding.json_text import restricted
from tunesmith.engines.protocol import Generation
from tunesmith.models.rendering import Renderer

Schema = dict[str, Any]
TURNS = (Message(role="user", content="switch on the lamp"),)


def closed(properties: Schema, **more: Any) -> Schema:
    """An object with these properties and no other."""
    names = {"required": list(properties), "additionalProperties": False}
    return {"type": "object", "properties": properties, **names, **more}


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


def walked(schema: Schema, seed: int, most: int = 120) -> str | None:
    """An answer that random allowed bytes make, None where it has not ended by then."""
    draw, tokenizer = random.Random(seed), LLTokenizer("byte")
    matcher = LLMatcher(tokenizer, LLMatcher.grammar_from_json_schema(restricted(schema)), log_level=0)
    assert not matcher.is_error(), matcher.get_error()
    bits, said = allocate_token_bitmask(1, tokenizer.vocab_size), bytearray()
    while len(said) < most:
        fill_next_token_bitmask(matcher, bits)
        allowed = np.flatnonzero(np.unpackbits(bits.view(np.uint8), bitorder="little")[: tokenizer.vocab_size])
        plain = [int(each) for each in allowed if 32 <= each < 127] or [int(each) for each in allowed]
        ends = [each for each in plain if chr(each) in '"}],']
        token = draw.choice(ends if ends and draw.random() < 0.5 else plain)
        if token == tokenizer.eos_token:
            return said.decode()
        said.append(token)
        matcher.consume_token(token)
        if matcher.is_stopped():
            return said.decode()
    return None


PAIRS = [
    (OWN, closed({"level": {"type": "number", "minimum": 3}, "intent": {"type": "string", "pattern": "^o"}})),
    (OWN, closed({"intent": {"anyOf": [{"const": "dim"}, {"const": "on"}, {"const": "else"}]}})),
    (OWN, dict(ANY_OBJECT)),
    ({"anyOf": [OWN, {"type": "array"}], "$defs": OWN["$defs"]}, dict(ANY_OBJECT)),
    ({"additionalProperties": {"type": "string", "maxLength": 3}}, closed({"a": {"type": ["string", "null"]}})),
    (
        closed({"a": {"type": "array", "items": {"enum": [1, 2, 3]}, "maxItems": 3}}),
        closed({"a": {"type": "array", "items": {"type": "integer", "minimum": 2}, "minItems": 1}}),
    ),
    ({"type": "object"}, TREE),
    (
        closed({"$ref": {"enum": ["#/a", "#"]}}),
        closed({"$ref": {"$ref": "#/$defs/t"}}, **{"$defs": {"t": {"type": "string"}}}),
    ),
]


@pytest.mark.parametrize("pair", range(len(PAIRS)))
def test_answers_fit_the_candidates_schema_and_the_requests(pair: int) -> None:
    own, requested = PAIRS[pair]
    check_schema(requested, strict=False)
    made = {said for seed in range(6) if (said := walked(both(own, requested), seed)) is not None}
    assert made
    for said in made:
        jsonschema.validate(json.loads(said), own)
        jsonschema.validate(json.loads(said), requested)
        if pair == 0:
            assert list(json.loads(said)) == ["level", "intent"], "in the requested order"


PLAIN = closed({"a": {"type": "string"}})
REFUSED = [
    ([], "not a schema"),
    ({"type": "object", "oneOf": []}, "'oneOf' is not supported"),
    (closed({"a": {"not": {}}}), "schema.properties.a: 'not' is not supported"),
    ({"type": "object", "patternProperties": {}}, "'patternProperties' is not supported"),
    ({"allOf": [PLAIN]}, "'allOf' is not supported"),
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
    (closed({"a": {"type": "integer", "multipleOf": 9999991}}), "multipleOf"),
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


@pytest.mark.parametrize("place", range(len(REFUSED)))
def test_what_cannot_be_held_is_refused_by_name(place: int) -> None:
    schema, said = REFUSED[place]
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
    assert walked(json.loads(both_.schema or ""), 0) in ('{"intent":"on"}', '{"intent": "on"}')


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


def test_the_schemas_of_requests_do_not_pile_up(constraints: Constraints) -> None:
    for number in range(66):
        constraints.guide(held(closed({f"k{number}": {"type": "string"}})))
    assert constraints._of_request.cache_info().currsize == 64
    assert constraints._of_schema.cache_info().currsize == 0
