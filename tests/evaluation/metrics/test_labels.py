"""Gates on figures of all rows together: macro-F1, calibration error, Brier score."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.fabricate import fabricate
from tunesmith.core.errors import Inconclusive
from tunesmith.evaluation.evaluate import evaluate
from tunesmith.evaluation.gates.settings import GATES
from tunesmith.evaluation.gates.verdict import judge, replay
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


@given(st.lists(st.tuples(WORD, WORD, st.floats(0, 1)), min_size=1, max_size=30))
def test_figures_match_the_record_and_lie_in_intervals(rows: list[tuple[str, str, float]]) -> None:
    found = labelled(rows)
    macro = macro_f1_interval(found, 0.9, 0)
    shown = classes(found.given, found.wanted, found.groups, 0.9, 0)["macro_f1"]
    assert macro.mean == pytest.approx(shown["mean"], abs=1e-9)
    assert macro.low <= shown["low"] + 0.03, "the worst-case group is added"
    assert macro.high >= shown["high"] - 0.03
    error, stated = (
        calibration_error_interval(found, 0.9, 0),
        calibration(found.confidences or (), found.right.tolist()),
    )
    assert error.mean == pytest.approx(stated["ece"], abs=1e-8)
    brier = brier_interval(found, 0.9, 0)
    assert brier.mean == pytest.approx(stated["brier"], abs=1e-8)
    for each in (macro, error, brier):
        assert 0.0 <= each.low <= each.mean <= each.high <= 1.0


def test_five_rows_that_are_all_right_prove_little() -> None:
    found = labelled([("a", "a", 1.0), ("b", "b", 1.0)] * 5)
    assert macro_f1_interval(found, 0.95, 0).low < 0.7
    assert calibration_error_interval(found, 0.95, 0).high > 0.3


@pytest.mark.parametrize("confidence", [0.9, 0.95, 0.997])
def test_the_calibration_error_of_sure_answers_is_the_share_of_wrong_ones(confidence: float) -> None:
    """With its interval, whose ends are resampled figures: one between two of them would be too narrow."""
    found = labelled([("a", "a" if n % 5 else "b", 1.0) for n in range(40)])
    error = calibration_error_interval(found, confidence, 0)
    share = interval(1.0 - found.right, found.groups, ends=(0.0, 1.0), confidence=confidence, seed=0)
    assert (error.mean, error.low, error.high) == pytest.approx((share.mean, share.low, share.high), abs=1e-9)


@pytest.mark.parametrize(("rows", "off", "least", "most"), [(100, 0.0, 0, 2), (200, 0.0, 0, 2), (200, 0.15, 12, 20)])
def test_only_wrong_confidences_have_a_calibration_error_that_is_surely_high(
    rows: int, off: float, least: int, most: int
) -> None:
    """Of twenty candidates. off: by how much their confidences are too high."""
    random, sure = np.random.RandomState(1), 0
    for _ in range(20):
        stated = random.uniform(0.3, 1.0, rows)
        right = random.rand(rows) < stated - off
        found = [
            ("a", "a" if each else "b", confidence) for each, confidence in zip(right, stated.tolist(), strict=True)
        ]
        sure += calibration_error_interval(labelled(found), 0.95, 0).low > 0.03
    assert least <= sure <= most


def test_coverage_of_the_macro_f1_interval() -> None:
    random, held = np.random.RandomState(1), 0
    for _ in range(60):
        wanted = random.choice(["a", "b"], 80, p=[0.7, 0.3])
        given_ = [w if random.rand() < 0.8 else ("b" if w == "a" else "a") for w in wanted]
        found = macro_f1_interval(labelled([(w, g, 0.5) for w, g in zip(wanted, given_, strict=True)]), 0.9, 0)
        # F1 of a: 2*.56 / (.7 + .56 + .06); of b: 2*.24 / (.3 + .24 + .14)
        held += found.low <= (1.12 / 1.32 + 0.48 / 0.68) / 2 <= found.high
    assert held >= 50


def _evaluated(tmp_path: Path) -> tuple[Any, str]:
    made = fabricate(tmp_path / "store", n=120)
    task = TaskSettings.model_validate({"scorers": ["exact_match", {"name": "intent", "label": "intent"}]})
    more: dict[str, Any] = {"probes": {}, "task": task, "answer_schema": None}
    return made.store, evaluate(made.store, dataset=made.dataset, answers=made.answers, **more)


def test_a_macro_f1_gate_uses_its_interval_and_replays(tmp_path: Path) -> None:
    store, digest = _evaluated(tmp_path)
    stated = store.record(digest).body["candidates"]["tuned"]["classes"]["intent"]["macro_f1"]["mean"]
    outcomes = {}
    for name, bound in {"low": stated - 0.3, "near": stated - 0.01, "high": 1.0}.items():
        gates = GATES.validate_python({"f": {"figure": "macro_f1", "metric": "intent", "at_least": max(0.0, bound)}})
        verdict = judge(store, evaluation=digest, candidate="tuned", gates=gates)
        gate = store.record(verdict).body["gates"][0]
        outcomes[name] = gate["outcome"]
        assert gate["value"] == stated
        assert replay(store, verdict)
    assert outcomes["low"] == "pass"
    assert outcomes["near"] == "inconclusive"


def test_calibration_that_was_not_measured_is_inconclusive(tmp_path: Path) -> None:
    store, digest = _evaluated(tmp_path)
    for figure in ("calibration_error", "brier"):
        gates = GATES.validate_python({"c": {"figure": figure, "metric": "intent", "at_most": 1.0}})
        gate = store.record(judge(store, evaluation=digest, candidate="tuned", gates=gates)).body["gates"][0]
        assert (gate["outcome"], "state no confidence" in gate["reason"]) == ("inconclusive", True)
    gates = GATES.validate_python({"c": {"figure": "macro_f1", "metric": "exact_match", "at_least": 0.0}})
    gate = store.record(judge(store, evaluation=digest, candidate="tuned", gates=gates)).body["gates"][0]
    assert (gate["outcome"], "keeps no labels" in gate["reason"]) == ("inconclusive", True)


def test_labels_that_differ_from_the_scores_are_refused(tmp_path: Path) -> None:
    store, digest = _evaluated(tmp_path)
    record = store.record(digest)
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
