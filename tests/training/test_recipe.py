"""The settings that fit a training's rows and base, where the project leaves them open."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, Literal

import pytest

from tests.evaluation.probing import row
from tunesmith.core.messages import Message
from tunesmith.data.dataset import Example
from tunesmith.pipeline.training import _of_control
from tunesmith.training.batches.rows import row_count, training_rows
from tunesmith.training.estimates.subsets import subset_settings
from tunesmith.training.recipe import fit_to_rows
from tunesmith.training.settings import TrainSettings


def _b_rate(width: int | None = 576, **given: object) -> float:
    return fit_to_rows(TrainSettings.model_validate(given), 5000, width).b_rate


def test_b_gets_four_times_the_default_rate_of_small_bases() -> None:
    assert _b_rate() == _b_rate(width=1024) == _b_rate(method="lora", rank=8) == 4.0
    assert _b_rate(width=4096) == _b_rate(width=None) == 1.0


def test_stated_rates_full_training_and_other_starts_are_left_alone() -> None:
    assert _b_rate(b_rate=1.0) == _b_rate(learning_rate=1e-3) == _b_rate(method="full") == _b_rate(start="pissa") == 1.0
    assert _b_rate(scaling="root") == _b_rate(dora=True) == 1.0, "these were not measured"
    assert _b_rate(learning_rate=1e-3, b_rate=8.0) == 8.0


def test_what_is_left_open_is_still_open_in_the_settings_of_a_subset() -> None:
    left_open, stated = TrainSettings(budget=60), TrainSettings(budget=60, learning_rate=1e-3)
    assert fit_to_rows(subset_settings(left_open, 50, 2000), 50, 576).b_rate == 4.0
    assert fit_to_rows(subset_settings(stated, 50, 2000), 50, 576).b_rate == 1.0


def test_few_rows_are_read_more_often() -> None:
    read = [fit_to_rows(TrainSettings(), rows, 576).epochs for rows in (1, 200, 300, 600, 1000, 13_000)]
    assert read == [10, 10, 10, 5, 3, 3]


@pytest.mark.parametrize("given", [{}, {"rows": 7}, {"rows": 99}, {"permute_answers": True}, {"canaries": {"each": 2}}])
def test_rows_are_counted_as_they_are_trained(given: dict[str, Any]) -> None:
    settings, examples = TrainSettings.model_validate(given), [row(f"request {n}", "answer") for n in range(30)]
    assert row_count(len(examples), settings) == len(training_rows(examples, settings))


def test_canaries_leave_a_training_the_epochs_and_rates_of_its_rows() -> None:
    """A canary candidate stands for the candidate without them, which reads its rows as often."""
    planted = TrainSettings.model_validate({"canaries": {"each": 20}})
    for rows in (200, 400, 2000):
        made, without = row_count(rows, planted), fit_to_rows(TrainSettings(), rows, 576)
        assert made == rows + 420
        assert fit_to_rows(planted, made, 576) == without.model_copy(update={"canaries": planted.canaries})


def _conversation(number: int, *weights: Literal[0, 1]) -> Example:
    """A row with a question and an answer for each weight."""
    turns = [
        turn
        for place, weight in enumerate(weights)
        for turn in (
            Message(role="user", content=f"question {number}.{place}"),
            Message(role="assistant", content=f"answer {number}.{place}", weight=weight),
        )
    ]
    return row(f"question {number}", "answer").model_copy(update={"messages": tuple(turns)})


def test_a_control_learns_no_answer_behind_its_own_request() -> None:
    control = TrainSettings(permute_answers=True)
    rows = [*(_conversation(n, 1, 1) for n in range(6)), _conversation(6, 1, 0)]
    trained = training_rows(rows, control)
    for each in trained:
        assert [turn.weight for turn in each.messages if turn.role == "assistant"] == [0, 1]
    assert sorted(each.answer for each in trained) == sorted(each.answer for each in rows)
    assert sum(made.answer == each.answer for made, each in zip(trained, rows, strict=True)) < 4
    assert training_rows(rows, TrainSettings()) == rows, "other trainings learn all of them"


def test_a_control_of_single_answers_keeps_its_key() -> None:
    """Only a control of conversations learns otherwise than before."""
    control, several = TrainSettings(permute_answers=True), [_conversation(n, 1, 1) for n in range(3)]

    def key(rows: list[Example], settings: TrainSettings) -> dict[str, str]:
        dataset: Any = SimpleNamespace(examples=lambda _split: rows)
        return _of_control(dataset, settings)

    assert key(several, control) == {"learned": "last answers"}
    assert key([_conversation(0, 1), _conversation(1, 0, 1)], control) == {}
    last = TrainSettings(permute_answers=True, loss_on="last")
    assert key(several, last) == {}
    assert key([_conversation(0, 1, 0)], last) == key(several, control), "the last that is learned is an earlier one"
    assert key(several, TrainSettings()) == {}


def test_stated_epochs_and_a_budget_are_left_alone() -> None:
    assert fit_to_rows(TrainSettings(epochs=1), 50, 576).epochs == 1
    assert fit_to_rows(TrainSettings(epochs=3), 50, None).epochs == 3
    within = TrainSettings(budget=60)
    assert fit_to_rows(within, 50, 576).epochs == within.epochs
