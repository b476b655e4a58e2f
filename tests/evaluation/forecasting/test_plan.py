"""What a forecast does within its budget."""

from __future__ import annotations

import re
from dataclasses import dataclass, field

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from tunesmith.core.errors import Refused
from tunesmith.evaluation.forecasting.plan import (
    FIRST,
    LEAST_ASKED,
    MOST_EPOCHS,
    PILOT,
    RATIO,
    SMALLEST,
    SUBSETS,
    Answered,
    check_pilots,
    contenders,
    epochs_of,
    fitting,
    next_part,
    no_steps,
    subset_plan,
)

# Seconds of a call and of each of its answers, and the share of right answers: the demo's candidates on two idle cores.
DEMO = {"zero-shot": (1.6, 0.02, 0.0), "few-shot": (0.8, 0.02, 0.05), "rag": (1.3, 0.12, 0.5)}
TUNED = (0.4, 0.03)
STEP = 0.1  # of training on one row once
TRIAL = 1.0  # before a training's first step


@dataclass
class Machine:
    """Performs a forecast's plan, so many times slower than measured. spent: seconds; largest: rows of the largest part
    by candidate."""

    slowness: float
    budget: float
    most: int = 300
    spent: float = 0.0
    answered: dict[str, Answered] = field(default_factory=dict)
    largest: dict[str, int] = field(default_factory=dict)

    def take(self, seconds: float) -> float:
        self.spent += self.slowness * seconds
        return self.slowness * seconds

    def ask(self, name: str, rows: int) -> float:
        once, each, right = DEMO[name]
        before = self.answered[name].rows if name in self.answered else 0
        seconds = self.take(once + each * (rows - before))
        rate = seconds / (rows - before) if rows - before >= self.largest.get(name, 0) else self.answered[name].each
        self.largest[name] = max(rows - before, self.largest.get(name, 0))
        self.answered[name] = Answered(rows, right * rows, rate)
        return seconds

    def forecast(self, whole: int = 2869) -> tuple[int, list[int], int]:
        """Rows asked, rows of the subsets after the first one, and how often they are read."""
        answers = sum(self.ask(name, PILOT) for name in DEMO)
        check_pilots(self.budget, answers)
        passes = min(MOST_EPOCHS * SMALLEST, FIRST * self.budget / (self.slowness * STEP))
        first = self.take(TRIAL + STEP * passes)
        asked, part, largest = PILOT, self.take(TUNED[0] + TUNED[1] * PILOT), PILOT
        answers, tuned = answers + part, part / PILOT
        while True:
            rates = {
                name: self.answered[name].each
                for name in contenders({n: each for n, each in self.answered.items() if each.rows == asked})
            }
            if (found := next_part(asked, self.most, self.budget, answers, rates, tuned)) is None:
                break
            who, rows = found
            part = self.take(TUNED[0] + TUNED[1] * (rows - asked))
            answers += part + sum(self.ask(name, rows) for name in who)
            if rows - asked >= largest:
                tuned, largest = part / (rows - asked), rows - asked
            asked = rows
        besides = asked * tuned + first - self.slowness * STEP * passes
        sizes, epochs = subset_plan(
            whole, whole, self.budget, self.spent, row=self.slowness * STEP, answers=besides, epochs=MOST_EPOCHS
        )
        for size in sizes:
            self.take(TRIAL + TUNED[0] + TUNED[1] * asked + STEP * size * epochs)
        return asked, sizes, epochs


def _advised(error: Refused) -> float:
    found = re.search(r"set it to (\d+)s", str(error.fix))
    assert found is not None
    return float(found[1])


@pytest.mark.parametrize(
    ("slowness", "least_asked", "least_sizes"), [(0.5, 100, 3), (1.0, 40, 2), (3.0, LEAST_ASKED, 1)]
)
def test_the_demo_is_forecast_within_a_tenth_of_its_budget_on_slow_machines(
    slowness: float, least_asked: int, least_sizes: int
) -> None:
    machine = Machine(slowness, budget=48.0)
    asked, sizes, _ = machine.forecast()
    assert asked >= least_asked
    assert len(sizes) >= least_sizes
    assert machine.spent <= machine.budget
    assert machine.answered["rag"].rows == asked
    assert machine.answered["zero-shot"].rows < asked, "it was wrong each time while rag was not"


@given(slowness=st.floats(0.1, 3.0), budget=st.floats(48.0, 600.0), most=st.integers(30, 300))
@example(slowness=3.0, budget=483.0, most=241)  # the last part is one row, which takes as long as twelve
def test_more_time_is_used_and_never_exceeded(slowness: float, budget: float, most: int) -> None:
    machine = Machine(slowness, budget, most)
    asked, sizes, epochs = machine.forecast()
    assert LEAST_ASKED <= asked <= most
    assert machine.spent <= budget
    assert 1 <= len(sizes) <= SUBSETS
    assert 1 <= epochs <= MOST_EPOCHS
    assert sizes[-1] <= 2869 // RATIO


@given(slowness=st.floats(0.1, 100.0), budget=st.floats(0.01, 60.0))
def test_a_budget_that_first_answers_use_up_is_refused_with_one_that_suffices(slowness: float, budget: float) -> None:
    machine = Machine(slowness, budget)
    try:
        machine.forecast()
    except Refused as error:
        machine = Machine(slowness, _advised(error))
        machine.forecast()
    assert machine.answered["rag"].rows >= LEAST_ASKED


def test_a_budget_that_holds_no_steps_is_refused_with_one_that_holds_them() -> None:
    error = no_steps(120.0, 60.0)
    assert error.what.startswith("the budget of 2 min 0 s is too short for a forecast: four steps on 12 rows take 60 s")
    assert FIRST * _advised(error) > 60.0
    assert "untuned candidates" not in str(error.fix), "they are not what takes so long"


def test_where_time_is_short_the_best_is_asked_alone() -> None:
    rates = {"rag": 1.0, "zero-shot": 1.0}
    assert next_part(16, 300, 200.0, 20.0, rates, 0.1) == (["rag", "zero-shot"], 47)
    assert next_part(16, 300, 64.0, 20.0, rates, 0.1) == (["rag"], 21)
    assert next_part(16, 300, 50.0, 20.0, rates, 0.1) is None
    assert next_part(4, 300, 40.0, 20.0, rates, 0.1) == (["rag"], LEAST_ASKED)
    assert next_part(4, 300, 1e9, 20.0, rates, 0.1) == (["rag", "zero-shot"], 16), "parts grow step by step"
    assert next_part(30, 30, 1e9, 0.0, rates, 0.1) is None
    assert next_part(4, 300, 1e9, 0.0, {}, 0.1) == ([], 16), "without untuned candidates the subsets' models are asked"


def test_who_can_hardly_be_the_best_any_more() -> None:
    few = {"a": Answered(4, 3.0, 1.0), "b": Answered(4, 1.0, 1.0), "c": Answered(4, 0.0, 1.0)}
    assert contenders(few) == ["a", "b", "c"], "four answers rule out little"
    more = {"a": Answered(40, 30.0, 1.0), "b": Answered(40, 25.0, 1.0), "c": Answered(40, 4.0, 1.0)}
    assert contenders(more) == ["a", "b"]
    assert contenders({}) == []


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
    sizes, reads = subset_plan(rows, rows // 2, budget, spent, row=row, answers=answers, epochs=epochs)
    assert sizes == sorted(set(sizes))
    assert len(sizes) <= SUBSETS
    if sizes:
        assert sizes[0] > SMALLEST
        assert sizes[-1] <= rows // RATIO
        assert 1 <= reads <= epochs
        assert spent + sum(sizes) * reads * row + len(sizes) * answers <= budget
    else:
        assert spent + 1.5 * SMALLEST * row + answers > 0.9 * budget - row


def test_epochs_are_given_up_before_subsets() -> None:
    given_ = {"row": 0.1, "answers": 1.0, "epochs": 3}
    assert subset_plan(2000, 2000, 400.0, 0.0, **given_) == ([179, 359, 718], 3)
    assert subset_plan(2000, 2000, 30.0, 0.0, **given_) == ([18, 36, 72], 2)
    assert subset_plan(2000, 2000, 14.0, 4.0, **given_) == ([24, 48], 1)
    assert subset_plan(2000, 2000, 14.0, 11.0, **given_)[0] == []


def test_a_subset_shrinks_where_the_machine_is_slower_than_planned() -> None:
    given_ = {"row": 0.1, "answers": 1.0, "epochs": 2}
    assert fitting(80, 40, 17.0, **given_) == 80
    assert fitting(80, 40, 12.0, **given_) == 55
    assert fitting(80, 40, 10.0, **given_) == 0, "45 rows say little that 40 do not"
    assert fitting(80, 40, -5.0, **given_) == 0
    assert fitting(80, 40, 17.0, **{**given_, "row": 0.0}) == 80


def test_a_training_with_a_budget_reads_more_rows_less_often() -> None:
    assert epochs_of(100, seconds=0.1, budget=60.0, epochs=40) == pytest.approx(6.0)
    assert epochs_of(1000, seconds=0.1, budget=60.0, epochs=40) == pytest.approx(0.6)
    assert epochs_of(1, seconds=0.1, budget=60.0, epochs=40) == 40.0
    assert epochs_of(1000, seconds=0.1, budget=None, epochs=3) == 3.0
