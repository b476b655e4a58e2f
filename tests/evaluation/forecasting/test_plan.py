"""What a forecast does within its budget."""

from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tunesmith.core.errors import Refused
from tunesmith.evaluation.forecasting.plan import RATIO, START, epochs_of, held_rows, subset_sizes


def _advised(error: Refused) -> float:
    found = re.search(r"set it to (\d+)s", str(error.fix))
    assert found is not None
    return float(found[1])


def test_as_many_rows_are_asked_as_half_of_the_budget_allows() -> None:
    assert held_rows(300, 60.0, {START: 0.05, "rag": 0.25}) == 66
    assert held_rows(40, 60.0, {START: 0.05, "rag": 0.25}) == 40


@given(budget=st.floats(0.1, 20.0), start=st.floats(0.01, 5.0), rag=st.floats(0.01, 5.0))
def test_a_budget_too_short_for_answers_is_refused_with_one_that_suffices(
    budget: float, start: float, rag: float
) -> None:
    seconds = {START: start, "rag": rag}
    try:
        rows = held_rows(300, budget, seconds)
    except Refused as error:
        rows = held_rows(300, _advised(error), seconds)
    assert rows >= 30


@given(
    rows=st.integers(100, 5000),
    budget=st.floats(1.0, 200.0),
    spent=st.floats(0.0, 50.0),
    row=st.floats(0.001, 1.0),
    answers=st.floats(0.0, 5.0),
    epochs=st.integers(1, 3),
)
def test_subsets_fit_the_budget_that_is_left(
    rows: int, budget: float, spent: float, row: float, answers: float, epochs: int
) -> None:
    given_ = {"row": row, "answers": answers, "epochs": epochs}
    try:
        sizes = subset_sizes(rows, rows // 2, budget, spent, **given_)
    except Refused as error:
        sizes, budget = subset_sizes(rows, rows // 2, _advised(error), spent, **given_), _advised(error)
    assert sizes == sorted(set(sizes))
    assert 2 <= len(sizes) <= 3
    assert sizes[-1] <= max(rows // RATIO, 48)
    assert spent + sum(sizes) * epochs * row + len(sizes) * answers <= budget


def test_a_training_with_a_budget_reads_more_rows_less_often() -> None:
    assert epochs_of(100, seconds=0.1, budget=60.0, epochs=40) == pytest.approx(6.0)
    assert epochs_of(1000, seconds=0.1, budget=60.0, epochs=40) == pytest.approx(0.6)
    assert epochs_of(1, seconds=0.1, budget=60.0, epochs=40) == 40.0
    assert epochs_of(1000, seconds=0.1, budget=None, epochs=3) == 3.0
