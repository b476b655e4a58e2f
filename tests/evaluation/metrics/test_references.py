"""What the build keeps, every scorer of the evaluation can score: both use one reader and one validator."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from tests.attack_table import Happened
from tests.data.rows import build, many_rows, write_jsonl
from tunesmith.core.reading.answer_schema import check_answer_schema
from tunesmith.data.building.account import OFF_SCHEMA
from tunesmith.data.building.examine import Examiner, RowRules
from tunesmith.data.settings import DataSettings
from tunesmith.evaluation.metrics.declared import (
    CONTEXT_SCORERS,
    Answered,
    LabelScorer,
    NumberScorer,
    PatternScorer,
    checked,
    make_scoring,
    metric_of,
)
from tunesmith.evaluation.metrics.references import References
from tunesmith.evaluation.metrics.scorers import SCORERS

BROKEN = [
    *('{"a":1,"a":2}', '{"a":NaN}', '{"a":-Infinity}', r'{"a":"\ud800"}', '{"a":1e999}', '{"a":1} {"a":1}'),
    *('{"a":' + "9" * 200_000 + "}", '{"a":' * 70 + "1" + "}" * 70, '{"a":' * 20_000, "", "{", "\ufeff{}"),
]
ALL = (
    *(name for name in (*SCORERS, *CONTEXT_SCORERS) if name not in ("chrf", "bleu", "rouge1", "rouge2", "rougeL")),
    LabelScorer(name="kind", label="a.b"),
    LabelScorer(name="whole", label=""),
    NumberScorer(name="near", tolerance=0.5),
    PatternScorer(name="shape", pattern=r"^(ab|a|b|[c-z])*$"),
)
SCHEMA: dict[str, Any] = {
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
@pytest.mark.parametrize("schema", [None, SCHEMA])
@pytest.mark.parametrize("alone", [None, *range(len(ALL))])
def test_what_the_build_keeps_every_scorer_scores(schema: Any, alone: int | None, happened: Happened) -> None:
    scorers = ALL if alone is None else (ALL[alone],)
    if schema is not None:
        check_answer_schema(schema, "x")
    judge = examiner(schema, scorers)
    scorings = {metric_of(one): make_scoring(one, schema, Path()) for one in scorers}
    kept = [0]

    @settings(max_examples=100 if alone is None else 30)
    @given(ANSWERS, ANSWERS)
    @example("{}", '{"a": {"b": 1}}')
    def each(answer: str, reference: str) -> None:
        if judge.answer_objection(reference) is None:
            kept[0] += 1
            for metric, scoring in scorings.items():
                checked(scoring(Answered(answer, reference)), metric, "x")

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
