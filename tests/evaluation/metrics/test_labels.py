"""Gates on figures of all rows together: macro-F1, calibration error, Brier score."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.evaluation.conftest import evaluated, outcome
from tests.fabricate import Fabricated, fabricate
from tunesmith.core.errors import Inconclusive
from tunesmith.evaluation.metrics.classification import (
    brier_interval,
    calibration,
    calibration_error_interval,
    classes,
    macro_f1_interval,
)
from tunesmith.evaluation.metrics.labels import LABELS, Labelled, read_labels
from tunesmith.evaluation.scores import read_scores
from tunesmith.evaluation.settings import TaskSettings
from tunesmith.evaluation.stats.statistics import interval

WORD = st.sampled_from("abc")


def labelled(rows: list[tuple[str, str, float]]) -> Labelled:
    wanted, given_, sure = (tuple(row[place] for row in rows) for place in range(3))
    names = tuple(f"{n:03d}" for n in range(len(rows)))
    return Labelled(names, tuple(f"g{n // 2}" for n in range(len(rows))), wanted, given_, sure)  # type: ignore[arg-type]


@settings(max_examples=12)
@given(st.lists(st.tuples(WORD, WORD, st.floats(0, 1)), min_size=1, max_size=30))
def test_figures_match_the_record_and_lie_in_intervals(rows: list[tuple[str, str, float]]) -> None:
    found = labelled(rows)
    macro, error, brier = (
        figure(found, 0.9, 0) for figure in (macro_f1_interval, calibration_error_interval, brier_interval)
    )
    shown = classes(found.given, found.wanted, found.groups, 0.9, 0)["macro_f1"]
    assert macro.mean == pytest.approx(shown["mean"], abs=1e-9)
    assert macro.low <= shown["low"] + 0.03, "the worst-case group is added"
    assert macro.high >= shown["high"] - 0.03
    stated = calibration(found.confidences or (), found.right.tolist())
    assert (error.mean, brier.mean) == pytest.approx((stated["ece"], stated["brier"]), abs=1e-8)
    for each in (macro, error, brier):
        assert 0.0 <= each.low <= each.mean <= each.high <= 1.0


@pytest.mark.parametrize("confidence", [0.9, 0.997])
def test_the_calibration_error_of_sure_answers_is_the_share_of_wrong_ones(confidence: float) -> None:
    """With its interval, whose ends are resampled figures: one between two of them would be too narrow."""
    found = labelled([("a", "a" if n % 5 else "b", 1.0) for n in range(40)])
    error = calibration_error_interval(found, confidence, 0)
    share = interval(1.0 - found.right, found.groups, ends=(0.0, 1.0), confidence=confidence, seed=0)
    assert (error.mean, error.low, error.high) == pytest.approx((share.mean, share.low, share.high), abs=1e-9)
    few = labelled([("a", "a", 1.0), ("b", "b", 1.0)] * 5)
    assert macro_f1_interval(few, 0.95, 0).low < 0.7, "five rows that are all right prove little"
    assert calibration_error_interval(few, 0.95, 0).high > 0.3


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> tuple[Fabricated, str]:
    made = fabricate(tmp_path_factory.mktemp("labels"), n=120)
    task = TaskSettings.model_validate({"scorers": ["exact_match", {"name": "intent", "label": "intent"}]})
    return made, evaluated(made, task=task, answer_schema=None)


def test_gates_on_figures_use_their_intervals(measured: tuple[Fabricated, str]) -> None:
    made, digest = measured
    stated = made.store.record(digest).body["candidates"]["tuned"]["classes"]["intent"]["macro_f1"]["mean"]
    for bound, expected in ((stated - 0.3, "pass"), (stated - 0.01, "inconclusive")):
        gate = outcome(made, digest, figure="macro_f1", metric="intent", at_least=bound)
        assert (gate["outcome"], gate["value"]) == (expected, stated)
    for figure, metric, said in (
        ("calibration_error", "intent", "state no confidence"),
        ("brier", "intent", "state no confidence"),
        ("macro_f1", "exact_match", "keeps no labels"),
    ):
        gate = outcome(made, digest, figure=figure, metric=metric, at_most=1.0)
        assert (gate["outcome"], said in gate["reason"]) == ("inconclusive", True)


def test_labels_that_differ_from_the_scores_are_refused(measured: tuple[Fabricated, str]) -> None:
    store, record = measured[0].store, measured[0].store.record(measured[1])
    columns = read_scores(store, record)
    lines = [json.loads(line) for line in store.read_blob(record.blobs[LABELS]).splitlines()]
    assert read_labels(store, record, columns)["tuned", "intent"].ids == columns["tuned", "intent"].ids

    def with_lines(changed: list[Any]) -> Any:
        blob = store.put_bytes(b"\n".join(json.dumps(line).encode() for line in changed))
        return record.model_copy(update={"blobs": {**record.blobs, LABELS: blob}})

    for changed in (
        [{**lines[0], "given": "no such"}, *lines[1:]],
        lines[1:],
        [lines[0], *lines],
        [{**lines[0], "confidence": True}, *lines[1:]],
        [{**lines[0], "group": "other"}, *lines[1:]],
        ["x", *lines],
    ):
        with pytest.raises(Inconclusive):
            read_labels(store, with_lines(changed), columns)
