"""Successive halving: what is tried, how long, what goes on, and that it ends within the time and can be stopped."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tunesmith.core.errors import Refused
from tunesmith.training.search.halving import (
    PRESENT,
    Measured,
    SearchDecisions,
    TrialResult,
    decide_search,
    final_results,
    ranking,
    rung_sizes,
    spent,
    successive_halving,
)
from tunesmith.training.search.space import draw_trials, search_space, with_values
from tunesmith.training.settings import LEAST_SCORED, TrainSettings

MEASURED = Measured(row=0.1, loss=1.0, answer=0.05, total=5.0)
LIMITS: dict[str, Any] = {"available": 60, "batch": 8, "longest": 5000, "scorable": 100}


def decided(within: float, measured: Measured = MEASURED, **limits: Any) -> SearchDecisions:
    return decide_search(within, measured, {}, **{**LIMITS, **limits})


class World:
    """Trials whose losses are given, with probabilities that fall as they rise, and whose time follows from their rows;
    it keeps what is on the disk."""

    def __init__(self, loss: Callable[[int, int], float | None], row: Callable[[int], float] = lambda _: 0.1) -> None:
        self.loss, self.row = loss, row
        self.disk: dict[tuple[int, int], TrialResult] = {}
        self.kept: SearchDecisions | None = None
        self.runs: list[tuple[int, int]] = []
        self.stops_after: int | None = None

    def run(self, rung: int, trial: int, rows: int, seconds: float) -> TrialResult:
        assert self.kept is not None
        assert self.kept.rungs[rung].rows == rows, "the decision is on the disk before it acts"
        if self.stops_after is not None and len(self.runs) == self.stops_after:
            raise KeyboardInterrupt
        self.runs.append((rung, trial))
        row = self.row(len(self.runs))
        done = min(rows, math.floor(seconds / row) + 1)
        loss = self.loss(trial, rows) if done == rows else None
        result = TrialResult(
            rung=rung,
            trial=trial,
            rows=done,
            steps=math.ceil(done / 8),
            seconds=done * row,
            checking=1.0 if done == rows else 0.0,
            loss=loss,
            probability=None if loss is None else math.exp(-loss),
            failed="the loss became nan" if loss is None and done == rows else None,
            cut="the time was used" if done < rows else None,
        )
        self.disk[rung, trial] = result
        return result

    def keep(self, decisions: SearchDecisions) -> None:
        self.kept = SearchDecisions.model_validate_json(decisions.model_dump_json())

    def search(self, start: SearchDecisions, within: float) -> tuple[SearchDecisions, list[TrialResult]]:
        return successive_halving(
            self.kept or start,
            within,
            keep=self.keep,
            finished=lambda rung, trial: self.disk.get((rung, trial)),
            run=self.run,
        )


def test_a_third_goes_on_and_the_present_settings_stay() -> None:
    assert rung_sizes(27) == [28, 10, 4, 2]
    assert rung_sizes(3) == [4, 2]
    world = World(lambda trial, rows: float(trial) if trial else 99.0)
    done, results = world.search(decided(3000, longest=10**6), 3000)
    assert [len(rung.trials) for rung in done.rungs] == [28, 10, 4, 2]
    assert [rung.trials for rung in done.rungs][1:] == [(0, *range(1, 10)), (0, 1, 2, 3), (0, 1)]
    rows = [rung.rows for rung in done.rungs]
    assert rows == sorted(set(rows))
    assert done.ended == "one of the other settings is left"
    assert {each.trial for each in final_results(results)} == {0, 1}
    assert 0.8 * 3000 < spent(done, results) <= 3000


def test_more_time_tries_more() -> None:
    assert [decided(each).others for each in (400, 700, 1000, 2000, 4000)] == [3, 6, 9, 18, 27]
    assert decided(4000, available=5).others == 5


def test_too_little_time_is_refused_with_what_it_takes() -> None:
    with pytest.raises(
        Refused, match=r"60 s are too short .* 4 trials of 160 rows .* 2 rungs, take about \d+ s"
    ) as one:
        decided(60)
    minutes = int(str(one.value.fix).split("--within ")[1].split("m")[0])
    assert decided(60.0 * minutes).rungs == ()
    assert decided(60, longest=4).others >= 3, "a training of four rows takes no longer trials"


def test_answers_that_take_too_long_leave_the_probability() -> None:
    slow = MEASURED.model_copy(update={"answer": 10.0})
    assert decided(400, slow).scored_rows == 0
    assert decided(400).scored_rows >= LEAST_SCORED
    enough = decided(40_000, slow, longest=100_000)
    assert LEAST_SCORED <= enough.scored_rows <= 100
    assert decided(400, scorable=0).scored_rows == 0


def test_a_machine_that_becomes_slow_ends_the_search_in_time() -> None:
    world = World(lambda trial, rows: float(trial), lambda run: 0.1 if run < 15 else 2.0)
    done, results = world.search(decided(4000), 4000)
    assert done.ended == "the time was used before all trials of the last rung had run"
    assert done.rungs[-1].not_run == 28 - len(done.rungs[-1].trials) > 0
    assert world.kept == done
    assert spent(done, results) <= 1.05 * 4000 + 2.0, "by one row"
    assert {each.cut for each in results} == {None}, "no trial is begun that would be ended"
    assert ranking(final_results(results))[0] == PRESENT


def test_a_trial_that_is_far_slower_than_expected_is_ended() -> None:
    """The last two trials are begun as expected; the second is so slow that the time is used, and says nothing."""
    speeds = {0: 0.1, 1: 0.1, 2: 0.1, 3: 0.1, 4: 0.1, 5: 90.0}
    world = World(lambda trial, rows: 10.0 - trial, lambda run: speeds[run - 1])
    done, results = world.search(decided(400), 400)
    assert [each.cut for each in results] == [None] * 5 + ["the time was used"]
    assert 400 < spent(done, results) <= 1.05 * 400 + 90.0
    assert done.ended == "the time was used before all trials of the last rung had run"
    assert [(each.rung, each.trial) for each in final_results(results)] == [(0, 0), (0, 1), (0, 2), (0, 3)]
    assert ranking(final_results(results))[0] == 3, "what it showed in the first rung stands"


def test_a_slow_trial_is_planned_with_its_own_speed() -> None:
    """Trial 3 takes twice as long for a row: the last rung, which it is in, is shorter and fits."""
    world = World(lambda trial, rows: 10.0 - trial)
    world.row = lambda _: 0.2 if world.runs[-1][1] == 3 else 0.1  # type: ignore[method-assign]
    done, results = world.search(decided(400), 400)
    assert done.ended == "one of the other settings is left"
    assert [each.trial for each in results if each.rung == 1] == [0, 3]
    assert 300 < spent(done, results) <= 400


def test_trials_that_fail_never_win() -> None:
    for failing in ({1}, {0}, {1, 2, 3}, {0, 1}):
        world = World(lambda trial, rows, failing=failing: None if trial in failing else 10.0 - trial)  # type: ignore[misc]
        _, results = world.search(decided(400), 400)
        assert ranking(final_results(results))[0] == max({0, 1, 2, 3} - failing)
    # It was the best of the first rung, and diverged when it was trained for longer.
    world = World(lambda trial, rows: (None if rows > 500 else 0.1) if trial == 1 else float(1 + trial))
    done, results = world.search(decided(400), 400)
    assert (0, 1) in world.runs
    assert (1, 1) in world.runs
    assert ranking(final_results(results))[0] == PRESENT
    assert done.ended == "none of the other settings could be trained"


def test_equal_trials_leave_the_present_settings() -> None:
    _, results = World(lambda trial, rows: 1.0).search(decided(400), 400)
    assert ranking(final_results(results))[0] == PRESENT


def test_time_for_answers_but_not_for_steps_besides_leaves_it_to_the_probability() -> None:
    """Answers that could be scored are no reason to refuse a time that suffices without them."""
    slow = Measured(row=0.12, loss=3.0, answer=0.6, total=24.0)
    found = decide_search(600, slow, {}, available=60, batch=16, longest=5000, scorable=200)
    assert (found.others, found.scored_rows) == (3, 0)
    with pytest.raises(Refused, match="take about 392 s"):
        decide_search(391, slow, {}, available=60, batch=16, longest=5000, scorable=200)


def test_score_goes_before_probability_and_the_loss_says_nothing() -> None:
    def result(trial: int, probability: float, *scores: float) -> TrialResult:
        given = {"probability": probability, "loss": 1 + probability, "scores": scores}
        return TrialResult(rung=0, trial=trial, rows=1, steps=1, seconds=1.0, **given)

    assert ranking([result(0, 0.5, 0, 1), result(1, 0.1, 1, 1), result(2, 0.6, 0, 1)]) == [1, 2, 0]
    assert ranking([result(0, 0.5, 0, 0), result(1, 0.6, 0, 0)]) == [1, 0], "a flat score leaves it to the probability"
    assert ranking([result(0, 0.5), result(1, 0.6)]) == [1, 0]


def test_trials_as_long_as_the_training_are_not_repeated() -> None:
    world = World(lambda trial, rows: float(9 - trial))
    done, results = world.search(decided(10_000, longest=200), 10_000)
    assert [rung.rows for rung in done.rungs] == [200]
    assert done.ended == "the trials were as long as the training itself"
    assert ranking(final_results(results))[0] == 27


@given(
    st.lists(st.floats(0.02, 1.0), min_size=1, max_size=20),
    st.lists(st.one_of(st.none(), st.floats(0, 9)), min_size=4, max_size=28),
    st.integers(400, 20_000),
    st.lists(st.integers(0, 12), max_size=4),
)
def test_stopped_anywhere_it_ends_the_same(
    speeds: list[float], losses: list[float | None], within: int, stops: list[int]
) -> None:
    """However fast the machine is and wherever the search is stopped: it ends, each trial runs once in a rung, and what
    is decided and found is the same."""

    def world() -> World:
        return World(lambda trial, rows: losses[trial % len(losses)], lambda run: speeds[run % len(speeds)])

    start, whole, stopped = decided(within, longest=10**6), world(), world()
    expected = whole.search(start, within)
    for stop in stops:
        stopped.stops_after = len(stopped.runs) + stop
        try:
            stopped.search(start, within)
        except KeyboardInterrupt:
            continue
    stopped.stops_after = None
    assert stopped.search(start, within) == expected
    assert stopped.runs == whole.runs
    assert len(set(whole.runs)) == len(whole.runs)
    rows = [rung.rows for rung in expected[0].rungs]
    assert rows == sorted(set(rows))
    assert spent(*expected) <= 1.05 * within + max(speeds) + 1.0, "one row and one check later at most"


@given(
    st.floats(1e-8, 0.9),
    st.integers(1, 1024),
    st.integers(1, 4096),
    st.sampled_from(["lora", "full"]),
    st.integers(1, 10_000),
    st.integers(0, 9),
)
def test_every_trial_is_valid_and_different(
    rate: float, rank: int, batch: int, method: str, rows: int, seed: int
) -> None:
    adapter = {"rank": rank, "alpha": 2.5 * rank} if method == "lora" else {}
    settings = TrainSettings.model_validate(
        {"learning_rate": rate, "batch": batch, "method": method, "seed": seed, **adapter}
    )
    trials = draw_trials(settings, rows)
    assert trials == draw_trials(settings, rows)
    assert with_values(settings, trials[0]) == settings
    assert len({json.dumps(each) for each in trials}) == len(trials) >= 4
    for each in trials:
        assert ("alpha" in each) is (method == "lora"), "what is suggested says how strong its adapter is"
        made = with_values(settings, each)
        assert {key: getattr(made, key) for key in each} == each
        if method == "lora":
            assert made.adapter_alpha() / made.rank == pytest.approx(2.5)
    rates = search_space(settings, rows)["learning_rate"]
    first = [each["learning_rate"] for each in trials[1:][: len(rates) - 1]]
    assert first == rates[:-1], "each rate has its turn before one comes again"


def test_a_hopeless_rate_is_searched_away_from() -> None:
    hopeless = draw_trials(TrainSettings(learning_rate=1e-7), 1000)
    assert hopeless[1]["learning_rate"] == 1e-3
    usual = search_space(TrainSettings(learning_rate=1e-3), 1000)
    assert usual["learning_rate"] == [0.003, 0.00033, 0.01, 0.0001, 0.001]
    assert usual["rank"] == [8, 16, 32]
    assert usual["batch"] == [8, 16, 32]
    assert search_space(TrainSettings(learning_rate=1e-3), 20)["batch"] == [8, 16]
