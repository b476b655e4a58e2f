"""Scorers on what models really write, and on what they could."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.fabricate import SCHEMA
from tunesmith.core.errors import UsageError
from tunesmith.core.reading.strict_json import NotJson, parse_json
from tunesmith.evaluation.metrics.scorers import SCORERS, score

NUMBERS = st.integers(-(2**40), 2**40) | st.floats(allow_nan=False, allow_infinity=False)
JSON = st.recursive(
    st.none() | st.booleans() | NUMBERS | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=12,
)  # fmt: skip


@pytest.mark.parametrize(
    "text",
    [
        *("", "Sure! Here is the JSON:", '```json\n{"a": 1}\n```', '{"a": 1} {"b": 2}', '{"a": 1', "{'a': 1}"),
        *('{"a": 1, "a": 2}', '{"a": {"b": 1, "b": 1}}', '{"a": NaN}', '{"a": -Infinity}', '{"a": 1e999}'),
        *('{"a": "\\ud800"}', '"\ud800"', "\ufeff{}", "[" * 100_000, "[" * 65 + "1" + "]" * 65, "1" * 5000),
    ],
)
def test_what_readers_would_not_agree_on_is_not_json(text: str) -> None:
    with pytest.raises(NotJson):
        parse_json(text)
    assert score("json_valid", text, "{}") == 0.0
    assert score("exact_match", text, '{"a": 1}') == 0.0
    assert score("field_f1", text, '{"a": 1}') == 0.0


def test_json_valid_holds_the_answer_against_the_schema() -> None:
    assert score("json_valid", ' {"intent": "HassTurnOn", "slots": {"area": "hall"}}\n', "", SCHEMA) == 1.0
    assert score("json_valid", '{"intent": "HassTurnOn"}', "", SCHEMA) == 0.0
    assert score("json_valid", '{"intent": "TurnOn", "slots": {}}', "", SCHEMA) == 0.0
    assert score("json_valid", '{"intent": "HassTurnOn", "slots": {}, "note": 1}', "", SCHEMA) == 0.0
    nested = {"$defs": {"n": {"items": {"$ref": "#/$defs/n"}}}, "$ref": "#/$defs/n"}
    assert score("json_valid", "[" * 60 + "]" * 60, "", nested) == 1.0


@pytest.mark.parametrize(
    ("answer", "reference", "expected"),
    [
        ('{"b": [1, 2.0], "a": "x"}', '{"a":"x","b":[1.0,2]}', 1.0),
        ('{"a": true}', '{"a": 1}', 0.0),
        ('{"a": null}', "{}", 0.0),
        ('{"a": "1"}', '{"a": 1}', 0.0),
        ("[1, 2]", "[2, 1]", 0.0),
        ('{"a": 9007199254740993}', '{"a": 9007199254740992}', 0.0),
        ("  turn it\n off ", "turn it off", 1.0),
        ("Turn it off", "turn it off", 0.0),
        ("", "turn it off", 0.0),
        ("42", "42.0", 1.0),
    ],
)
def test_exact_match(answer: str, reference: str, expected: float) -> None:
    assert score("exact_match", answer, reference) == expected


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ('{"intent": "A", "slots": {"x": 1, "y": 2}}', 1.0),
        ('{"intent": "A", "slots": {"x": 1}}', 2 * 2 / (2 + 3)),
        ('{"intent": "A", "slots": {"x": 1, "y": 3}}', 2 * 2 / (3 + 3)),
        ('{"intent": "A", "slots": {"x": 1, "y": 2, "z": 3}}', 2 * 3 / (4 + 3)),
        ('{"intent": "B"}', 0.0),
        ("[]", 0.0),
    ],
)
def test_field_f1(answer: str, expected: float) -> None:
    assert score("field_f1", answer, '{"intent": "A", "slots": {"x": 1, "y": 2}}') == pytest.approx(expected)


def test_field_f1_needs_json_references_and_a_mistyped_scorer_is_named() -> None:
    with pytest.raises(UsageError, match="needs references that are JSON"):
        score("field_f1", "{}", "turn it off")
    with pytest.raises(UsageError, match="did you mean 'exact_match'"):
        score("exact_mach", "", "")


@settings(max_examples=50, deadline=None)
@given(JSON, JSON)
def test_all_fields_right_and_exact_match_are_one(left: Any, right: Any) -> None:
    answer, reference = json.dumps(left, indent=1), json.dumps(right)
    exact, fields = score("exact_match", answer, reference), score("field_f1", answer, reference)
    assert 0.0 <= fields <= 1.0
    assert (fields == 1.0) == (exact == 1.0)
    assert score("exact_match", reference, answer) == exact
    assert score("exact_match", answer, answer) == score("field_f1", answer, answer) == 1.0
    precision, recall = score("field_precision", answer, reference), score("field_recall", answer, reference)
    assert fields == pytest.approx(2 * precision * recall / (precision + recall) if precision + recall else 0.0)


@settings(max_examples=40, deadline=None)
@given(st.text(), st.text())
def test_every_scorer_gives_0_to_1_or_says_why_not(answer: str, reference: str) -> None:
    for name in SCORERS:
        try:
            assert 0.0 <= score(name, answer, reference, SCHEMA) <= 1.0
        except UsageError as error:
            assert "needs references" in error.what  # noqa: PT017
