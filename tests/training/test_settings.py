"""Settings of a training: their checks and messages."""

import math
from types import SimpleNamespace
from typing import Any, Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from tests.evaluation.probing import row
from tunesmith.core.errors import UsageError
from tunesmith.core.messages import Message
from tunesmith.core.values import changed
from tunesmith.data.dataset import Example
from tunesmith.engines.settings import TARGETS, match_layers
from tunesmith.pipeline.training import _of_control
from tunesmith.training.batches.rows import row_count, training_rows
from tunesmith.training.estimates.estimate import too_few_numbers
from tunesmith.training.settings import TrainSettings, fit_to_rows


def test_a_budget_bounds_epochs_and_brings_its_own_defaults() -> None:
    within = TrainSettings(budget=900, batch=8)
    assert (within.schedule, within.decay, within.validations) == ("wsd", 0.9, 6)
    assert changed(within, {"epochs": 2}, "here") == TrainSettings(budget=900, epochs=2, batch=8)
    assert changed(TrainSettings(epochs=2), {"budget": "10m"}, "here") == TrainSettings(epochs=2, budget=600)
    with pytest.raises(UsageError, match="less than or equal to 100"):
        changed(within, {"epochs": 200}, "here")


@given(rank=st.integers(1, 1024), each=st.integers(1, 10_000), labels=st.integers(1, 10**9))
def test_named_rank_is_the_lowest_sufficient(rank: int, each: int, labels: int) -> None:
    said = too_few_numbers(rank, rank * each, labels)
    assert (said is None) == (rank * each >= labels)
    if said is not None:
        enough = int(said.rsplit("rank ", 1)[1].split()[0])
        assert (enough - 1) * each < labels <= enough * each


@pytest.mark.parametrize(
    ("wanted", "found"),
    [
        (("all",), set(TARGETS)),
        (("q_proj", "down_proj"), {"q_proj", "down_proj"}),
        (("[qv]_proj", "*_proj", "gate*"), set(TARGETS)),
        (("[qv]_proj", "gate*"), {"q_proj", "v_proj", "gate_proj"}),
    ],
)
def test_layers_match_patterns(wanted: tuple[str, ...], found: set[str]) -> None:
    assert match_layers(wanted, TARGETS, "here") == found


@pytest.mark.parametrize("wrong", ["*_up", "Q_PROJ", ""])
def test_unknown_layer_is_refused(wrong: str) -> None:
    with pytest.raises(UsageError, match=r"called '.*'; it has .*q_proj, .*, or write all") as refused:
        match_layers(["q_proj", wrong], TARGETS, "here")
    assert repr(wrong) in refused.value.what
    assert refused.value.where == "here"


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"budget": "20x"}, "write a duration such as 20m"),
        ({"budget": "0s"}, "greater than 0"),
        ({"budget": "-5m"}, "write a duration such as 20m"),
        ({"budget": math.nan}, "finite number|greater than 0"),
        ({"budget": True}, "not true or false"),
        ({"budget": "999999h"}, "less than or equal to"),
        ({"budget": "5m", "decay": 0.99999}, "less than or equal to 0.9"),
        ({"budget": "5m", "schedule": "cosine"}, "a budget needs schedule: wsd"),
        ({"rehearse": True}, "rehearse"),
        ({"learning_rate": 3}, "less than 1"),
        ({"clip": math.inf}, "finite"),
        ({"learning_rate": math.nan}, "finite"),
        ({"method": "full", "b_rate": 1}, "b_rate applies to adapters only"),
    ],
)
def test_settings_that_do_not_fit_are_named(given: dict[str, Any], said: str) -> None:
    with pytest.raises(ValidationError, match=said) as refused:
        TrainSettings(**given)
    assert refused.value.error_count() == 1


def test_what_is_read_and_what_follows() -> None:
    for text, seconds in (("90s", 90), ("20m", 1200), ("1h30m", 5400), ("1.5h", 5400), (7, 7)):
        settings = TrainSettings(budget=text)  # type: ignore[arg-type]
        assert settings.budget == seconds
        assert TrainSettings(**settings.model_dump()) == settings
    full = TrainSettings(method="full")
    assert TrainSettings().learning_rate == pytest.approx(10 * full.learning_rate)
    assert TrainSettings(method="full", learning_rate=0.5).learning_rate == 0.5
    assert TrainSettings.model_validate(full.model_dump(mode="json")) == full


# The settings that fit a training's rows and base, where the project leaves them open


def _b_rate(width: int | None = 576, **given: object) -> float:
    return fit_to_rows(TrainSettings.model_validate(given), 5000, width).b_rate


def test_b_gets_four_times_the_default_rate_of_small_bases_where_it_was_measured() -> None:
    assert _b_rate() == _b_rate(width=1024) == _b_rate(method="lora", rank=8) == 4.0
    assert _b_rate(width=4096) == _b_rate(width=None) == 1.0
    assert _b_rate(b_rate=1.0) == _b_rate(learning_rate=1e-3) == _b_rate(method="full") == _b_rate(start="pissa") == 1.0
    assert _b_rate(scaling="root") == _b_rate(dora=True) == 1.0, "these were not measured"
    assert _b_rate(learning_rate=1e-3, b_rate=8.0) == 8.0
    stated = TrainSettings(budget=60, learning_rate=1e-3)
    rates = [fit_to_rows(each, 50, None).learning_rate for each in (TrainSettings(), stated, TrainSettings(dora=True))]
    assert rates == [5e-4, 1e-3, 1e-3], "other families, where nothing is stated and the adapter was measured"


def test_few_rows_are_read_more_often_where_the_epochs_are_left_open() -> None:
    read = [fit_to_rows(TrainSettings(), rows, 576).epochs for rows in (1, 200, 300, 600, 1000, 13_000)]
    assert read == [20, 15, 10, 5, 3, 3]
    assert fit_to_rows(TrainSettings(), 200, 576, seldom=True).epochs == 5
    for stated in (TrainSettings(epochs=1), TrainSettings(epochs=3), TrainSettings(budget=60, epochs=7)):
        assert fit_to_rows(stated, 50, 576).epochs == stated.epochs


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
