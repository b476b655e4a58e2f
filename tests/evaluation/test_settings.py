"""Task and gates in the project file: what they mean, and what is refused by name."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError

from tunesmith.candidates.settings import TokenPrice
from tunesmith.core.errors import UsageError
from tunesmith.evaluation.gates.settings import GATES, check_gates
from tunesmith.evaluation.settings import PriceSettings, TaskSettings


@pytest.mark.parametrize(
    ("gate", "message"),
    [
        ({"metric": "exact_match", "ovre": "best-untuned", "at_least": 0.05}, "ovre"),
        ({"metric": "exact_match", "at_least": 0.1, "at_most": 0.2}, "one of them"),
        ({"metric": "exact_match", "over": "x"}, "at_least"),
        ({"metric": "exact_match", "over": "x", "at_least": 0.1, "confidence": 1.0}, "less than 1"),
        ({"suite": "generall", "drop_at_most": 0.1}, "general"),
        ({}, "metric"),
        ("lift", "valid dictionary|instance"),
    ],
)
def test_gates_that_are_refused(gate: Any, message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        GATES.validate_python({"g": gate})


def test_task() -> None:
    task = TaskSettings.model_validate({"schema": "answer.json", "scorers": ["json_valid", "exact_match"]})
    assert str(task.schema_path) == "answer.json"
    assert task.leading == "exact_match"
    assert TaskSettings(scorers=("json_valid", "field_f1")).leading == "json_valid"
    assert TaskSettings(scorers=("json_valid", "field_f1"), primary="field_f1").leading == "field_f1"
    assert TaskSettings().scorers == ("exact_match",)
    for price in (-1.0, 1e13, float("nan")):
        with pytest.raises(ValidationError):
            PriceSettings(machine_hour=price)
        for prices in ({"prompt": price, "answer": 1.0}, {"prompt": 1.0, "answer": price}):
            with pytest.raises(ValidationError):
                TokenPrice.model_validate(prices)


@pytest.mark.parametrize(
    ("task", "message"),
    [
        ({"scorers": ["json_vald"]}, "did you mean 'json_valid'"),
        ({"scorers": ["json_valid", "json_valid"]}, "twice"),
        ({"scorers": ["json_valid"], "primary": "exact_match"}, "not among scorers"),
        ({"scorers": [{"name": "date", "pattern": "(?=a)b"}]}, "not a regular expression that is supported"),
        ({"scorers": [{"name": "total", "tolerance": -1}]}, "greater than or equal to 0"),
        ({"scorers": [{"name": "exact_match", "label": ""}]}, "built-in scorer"),
        ({"scorers": [{"name": "x", "label": "a", "calibrate": True}]}, "labels and nothing else"),
        ({"scorers": [{"name": "mine", "function": "mine.txt:f"}]}, "pattern"),
        ({"scorers": [{"name": "j", "judge": {"url": "http://u:p@h/v1", "model": "m"}}]}, "secret"),
        ({"scorers": ["exact_match", {"name": "x", "label": ""}, {"name": "x", "tolerance": 1}]}, "twice"),
    ],
)
def test_tasks_that_are_refused(task: Any, message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        TaskSettings.model_validate(task)


def test_a_figure_of_labels_needs_a_scorer_that_classifies() -> None:
    gates = GATES.validate_python({"even": {"figure": "macro_f1", "metric": "exact_match", "at_least": 0.8}})
    check_gates(gates, ["exact_match", "intent"], [], ["exact_match"])
    check_gates(gates, ["exact_match"], [])
    for metrics, labels, said in (
        (["exact_match", "intent", "room"], ["intent", "room"], "scorers with labels: intent, room"),
        (["exact_match"], [], "no scorer has labels"),
        (["json_valid"], None, "not measured"),
    ):
        with pytest.raises(UsageError, match=said) as caught:
            check_gates(gates, metrics, [], labels)
        assert caught.value.where == "gates.even.metric"
