"""A forecast in the report: which one is shown, and what it is compared with."""

from __future__ import annotations

from typing import Any

import pytest
from sqlalchemy import update

from tests.evaluation.report.test_report import check_whole, verdict_of
from tests.fabricate import Fabricated
from tunesmith.candidates.candidate import load_candidate
from tunesmith.evaluation.report.data import report_data
from tunesmith.evaluation.report.html import render
from tunesmith.evaluation.report.markdown import report_markdown
from tunesmith.store import database
from tunesmith.store.records import Record
from tunesmith.store.tables import RecordRow


def _interval(median: float) -> dict[str, float]:
    return {"median": median, "low": median - 0.1, "high": median + 0.1}


def put_forecast(made: Fabricated, **changes: Any) -> str:
    """A forecast of the tuned candidate's training: 90% right, 56 points over rag."""
    tuned = load_candidate(made.store, made.candidates["tuned"]).untrained_digest
    settings = made.store.record(made.training).body["settings"]
    parents = {"base": made.base, "dataset": made.dataset}
    curve = made.store.put_record(Record(kind="curve", parents=parents, body={"tuned": tuned, "settings": settings}))
    training = {"seconds": 170.0, "epochs": 1.0, "money": None}
    body = {
        "name": "tuned", "metric": "exact_match", "rows": 80, "test": 120, "budget": 60.0, "seconds": 55.0,
        "held": {"validation": 10, "train": 30, "test": 0}, "confidence": 0.9, "goal": 0.05, "within": None,
        "decision": "train", "likely": 0.99, "score": _interval(0.9), "lift": _interval(0.56), "rival": "rag",
        "rival_named": False, "rivals": {"zero-shot": 0.0, "few-shot": 0.1, "rag": 0.34}, "training": training,
        "needed": {end: {"rows": 12, **training} for end in ("low", "median", "high")} | {"never": 0.0}, "pays": None,
        "subsets": [{"rows": 12, "epochs": 3.0, "mean": 0.3}, {"rows": 40, "epochs": 3.0, "mean": 0.6}],
        "curve": [{"rows": 6, **_interval(0.2)}, {"rows": 80, **_interval(0.9)}],
    }  # fmt: skip
    return made.store.put_record(Record(kind="forecast", parents={"curve": curve}, body={**body, **changes}))


@pytest.mark.parametrize(
    ("changes", "over"),
    [
        ({}, "rag"),
        ({"rival": "zero-shot", "rival_named": True, "rivals": {"zero-shot": 0.0}}, "zero-shot"),
        ({"rival": "elsewhere", "rivals": {"elsewhere": 0.4, "rag": 0.34}}, None),
    ],
)
def test_a_forecast_s_lift_is_compared_over_its_own_rival(
    made: Fabricated, evaluation: str, changes: dict[str, Any], over: str | None
) -> None:
    """The report's rival is another: the one that the verdict's first lift gate names."""
    put_forecast(made, **changes)
    gates = {"champion": {"metric": "exact_match", "over": "few-shot", "at_least": 0.0}}
    data = report_data(made.store, evaluation, verdict_of(made, evaluation, gates=gates))
    assert (data["rival"], data["rival_gate"]) == ("few-shot", "champion")
    found = data["forecast_outcome"]
    assert found["over"] == over
    if over is None:
        assert (found["lift"], found["lift_error"], found["right"]) == (None, None, None)
    else:
        means = {row["name"]: row["metrics"]["exact_match"]["mean"] for row in data["candidates"]}
        assert found["lift"]["mean"] == pytest.approx(means["tuned"] - means[over], abs=1e-6)
        assert f"The lift over {over} is +" in " ".join(found["sentences"])
    page = render(data)
    check_whole(page)
    assert "is the one that the gate champion names." in page
    assert "best untuned candidate on these same requests" not in page


def test_a_forecast_that_was_made_after_the_training_is_not_foresight(made: Fabricated, evaluation: str) -> None:
    late = put_forecast(made, goal=0.5)
    shown = report_data(made.store, evaluation)
    assert (shown["forecast"]["forecast"], shown["forecast"]["before_training"]) == (late, False)
    assert "Made after the training: Train tuned" in render(shown)
    assert "Forecast made after the training: Train tuned" in report_markdown(shown)
    early = put_forecast(made)
    with database.writing(made.store.engine) as session:
        session.execute(update(RecordRow).where(RecordRow.digest == early).values(created_at="2000-01-01T00:00:00Z"))
    shown = report_data(made.store, evaluation)
    assert (shown["forecast"]["forecast"], shown["forecast"]["before_training"]) == (early, True)
    assert "Before the training: Train tuned" in render(shown)
    assert "Forecast before the training: Train tuned" in report_markdown(shown)


def test_the_best_untuned_candidate_is_called_that(made: Fabricated, evaluation: str) -> None:
    data = report_data(made.store, evaluation, verdict_of(made, evaluation))
    assert (data["rival"], data["rival_gate"]) == ("rag", None)
    assert "is the best untuned candidate on these same requests" in render(data)
