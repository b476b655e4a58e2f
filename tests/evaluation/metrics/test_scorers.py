"""Scorers on what models really write, and on what they could."""

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from tests.attack_table import Happened
from tests.data.rows import build, many_rows, write_jsonl
from tests.fabricate import SCHEMA
from tunesmith.core.reading.answer_schema import check_answer_schema
from tunesmith.data.building.examine import Examiner, RowRules
from tunesmith.data.building.staging import OFF_SCHEMA
from tunesmith.data.settings import DataSettings
from tunesmith.evaluation.metrics import declared
from tunesmith.evaluation.metrics.declared import LabelScorer, NumberScorer, PatternScorer, References
from tunesmith.evaluation.metrics.scorers import SCORERS, exact_match, field_f1, json_valid

NUMBERS = st.integers(-(2**40), 2**40) | st.floats(allow_nan=False, allow_infinity=False)
JSON = st.recursive(
    st.none() | st.booleans() | NUMBERS | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=12,
)  # fmt: skip


def test_json_valid_holds_the_answer_against_the_schema() -> None:
    assert json_valid(' {"intent": "HassTurnOn", "slots": {"area": "hall"}}\n', "", SCHEMA) == 1.0
    assert json_valid('{"intent": "HassTurnOn"}', "", SCHEMA) == 0.0
    assert json_valid('{"intent": "TurnOn", "slots": {}}', "", SCHEMA) == 0.0
    assert json_valid('{"intent": "HassTurnOn", "slots": {}, "note": 1}', "", SCHEMA) == 0.0
    for metric in ("json_valid", "exact_match", "field_f1"):
        for text in ("", '```json\n{"a": 1}\n```', '{"a": 1, "a": 1}', '{"a": NaN}', "[" * 100_000):
            assert SCORERS[metric](text, '{"a": 1}', None) == 0.0
    nested = {"$defs": {"n": {"items": {"$ref": "#/$defs/n"}}}, "$ref": "#/$defs/n"}
    assert json_valid("[" * 60 + "]" * 60, "", nested) == 1.0


@pytest.mark.parametrize(
    ("answer", "reference", "expected"),
    [
        ('{"b": [1, 2.0], "a": "x"}', '{"a":"x","b":[1.0,2]}', 1.0),
        ('{"a": true}', '{"a": 1}', 0.0),
        ('{"a": null}', "{}", 0.0),
        ("[1, 2]", "[2, 1]", 0.0),
        ('{"a": 9007199254740993}', '{"a": 9007199254740992}', 0.0),
        ("  turn it\n off ", "turn it off", 1.0),
        ("Turn it off", "turn it off", 0.0),
        ("42", "42.0", 1.0),
    ],
)
def test_exact_match(answer: str, reference: str, expected: float) -> None:
    assert exact_match(answer, reference, None) == expected


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ('{"intent": "A", "slots": {"x": 1, "y": 2}}', 1.0),
        ('{"intent": "A", "slots": {"x": 1}}', 2 * 2 / (2 + 3)),
        ('{"intent": "A", "slots": {"x": 1, "y": 3}}', 2 * 2 / (3 + 3)),
        ('{"intent": "A", "slots": {"x": 1, "y": 2, "z": 3}}', 2 * 3 / (4 + 3)),
        ('{"intent": "B"}', 0.0),
    ],
)
def test_field_f1(answer: str, expected: float) -> None:
    assert field_f1(answer, '{"intent": "A", "slots": {"x": 1, "y": 2}}', None) == pytest.approx(expected)


@settings(max_examples=50, deadline=None)
@given(JSON, JSON)
def test_all_fields_right_and_exact_match_are_one(left: Any, right: Any) -> None:
    answer, reference = json.dumps(left, indent=1), json.dumps(right)
    exact, fields = exact_match(answer, reference, None), field_f1(answer, reference, None)
    assert 0.0 <= fields <= 1.0
    assert (fields == 1.0) == (exact == 1.0)
    assert exact_match(reference, answer, None) == exact
    assert exact_match(answer, answer, None) == field_f1(answer, answer, None) == 1.0
    precision, recall = (SCORERS[f"field_{share}"](answer, reference, None) for share in ("precision", "recall"))
    assert fields == pytest.approx(2 * precision * recall / (precision + recall) if precision + recall else 0.0)


# What the build keeps, every scorer of the evaluation can score: both use one reader and one validator


BROKEN = [
    *('{"a":1,"a":2}', '{"a":NaN}', '{"a":-Infinity}', r'{"a":"\ud800"}', '{"a":1e999}', '{"a":1} {"a":1}'),
    *('{"a":' + "9" * 200_000 + "}", '{"a":' * 70 + "1" + "}" * 70, '{"a":' * 20_000, "", "{", "\ufeff{}"),
]
BY_LIBRARIES = ("chrf", "bleu", "rouge1", "rouge2", "rougeL")
ALL = (
    *(name for name in (*SCORERS, *declared.CONTEXT_SCORERS) if name not in BY_LIBRARIES),
    LabelScorer(name="kind", label="a.b"),
    LabelScorer(name="whole", label=""),
    NumberScorer(name="near", tolerance=0.5),
    PatternScorer(name="shape", pattern=r"^(ab|a|b|[c-z])*$"),
)
NESTED: dict[str, Any] = {
    "properties": {"a": {"anyOf": [{"$ref": "#"}, {"type": "number"}, {"pattern": "^(a+)+$"}]}},
    "additionalProperties": {"type": ["object", "string", "number"]},
}
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=4) | st.just("\ud800"),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from("ab"), inner, max_size=2),
    max_leaves=6,
)
ANSWERS = (
    VALUES.map(json.dumps)
    | st.text('{}[]"ab:, 019.eEN\\ud8', max_size=30)
    | st.sampled_from(BROKEN)
    | st.integers(-9, 9).map(lambda number: json.dumps({"a": {"b": number}}))
)


def examiner(schema: Any = None, scorers: Any = ALL) -> Examiner:
    data = DataSettings.model_validate({"sources": [{"path": "rows.jsonl", "licence": "MIT"}]})
    return Examiner(RowRules(data, answer_schema=schema, unscorable=References.of(scorers)))


@pytest.mark.attack("input", "an answer that the build keeps and a scorer refuses")
@pytest.mark.parametrize("schema", [None, NESTED])
@pytest.mark.parametrize("alone", [None, *range(len(ALL))])
def test_what_the_build_keeps_every_scorer_scores(schema: Any, alone: int | None, happened: Happened) -> None:
    scorers = ALL if alone is None else (ALL[alone],)
    if schema is not None:
        check_answer_schema(schema, "x")
    judge = examiner(schema, scorers)
    scorings = {declared.metric_of(one): declared.make_scoring(one, schema, Path()) for one in scorers}
    kept = [0]

    @settings(max_examples=100 if alone is None else 30)
    @given(ANSWERS, ANSWERS)
    @example("{}", '{"a": {"b": 1}}')
    def each(answer: str, reference: str) -> None:
        if judge.answer_objection(reference) is None:
            kept[0] += 1
            for metric, scoring in scorings.items():
                declared.checked(scoring(declared.Answered(answer, reference)), metric, "x")

    each()
    assert kept[0]
    happened("scored", kept[0])


@pytest.mark.attack("input", "answers that readers of JSON disagree about, in rows")
@pytest.mark.parametrize(
    ("schema", "scorers", "reason"),
    [
        ({"type": "object"}, ("exact_match",), OFF_SCHEMA),
        (None, ("exact_match", "field_f1"), "answer that field_f1 cannot score"),
        (None, ("json_valid",), "answer that json_valid cannot score"),
        (None, (LabelScorer(name="kind", label="a"),), "answer that kind cannot score"),
    ],
)
def test_such_rows_are_removed_and_counted(
    tmp_path: Path, schema: Any, scorers: Any, reason: str, happened: Happened
) -> None:
    rows = many_rows(40)
    bad = [text for text in BROKEN if text.strip()]
    for number, one in enumerate(rows):
        text = bad[number] if number < len(bad) else json.dumps({"a": number})
        one["messages"][-1]["content"] = text
    write_jsonl(tmp_path / "rows.jsonl", rows)
    dataset = build(tmp_path, answer_schema=schema, unscorable=References.of(scorers))
    assert dataset.record.body["rows"]["removed"] == {reason: len(bad)}
    happened("removed and counted with its reason", len(bad))
