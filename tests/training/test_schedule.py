"""Trainings with a budget: the rate's course, what is decided when, and the same bytes again by the same decisions."""

from __future__ import annotations

import itertools
import math
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from tests.said import SaidAndNoted
from tests.tiny import write_model
from tests.training.test_resume import ROWS
from tunesmith.core.digests import digest_file
from tunesmith.core.errors import Refused
from tunesmith.core.progress import SILENT, Progress
from tunesmith.engines.training_protocol import TrainableModel
from tunesmith.models.base import resolve_base
from tunesmith.store.store import Store
from tunesmith.training.batches.rehearsal import Rehearsal
from tunesmith.training.estimates.estimate import MemoryNeeds, memory_needs
from tunesmith.training.schedule import Annealed, Decay, Decisions, keep_decisions, read_decisions
from tunesmith.training.scoring import AnswerScore, Score, Validation, decide_beforehand
from tunesmith.training.settings import MetricsSettings, TrainSettings, recorded_settings
from tunesmith.training.spec import Estimate, TrainingResult, TrainingSpec
from tunesmith.training.state import TrainerState
from tunesmith.training.train import make_spec, run_training

SETTINGS = TrainSettings(rank=4, batch=4, budget="40s", learning_rate=0.01, checkpoint_seconds=1e-9)  # type: ignore[arg-type]
BEFORE = Decisions(warmup=2, validate_every=5, scored_rows=0, seconds=0.0)


def ticking(seconds: float) -> Callable[[], float]:
    """A clock that goes on by so much each time it is read."""
    ticks = itertools.count()
    return lambda: next(ticks) * seconds


def stepping(seconds: float) -> Callable[[], float]:
    """A clock by which a step takes so long, and its checkpoint no time. It is read before the first step, and four
    times in each that ends with a checkpoint: when the step begins and ends, and before and after the checkpoint."""
    reads = itertools.count()
    return lambda: (next(reads) + 2) // 4 * seconds


def spec(folder: Path, settings: TrainSettings = SETTINGS, work: str = "work", **more: Any) -> TrainingSpec:
    if not (folder / "model").exists():
        write_model(folder / "model")
    base = resolve_base(Store(folder / "store"), str(folder / "model"), folder)
    return make_spec(
        base=base, dataset="", rows=ROWS, validation=ROWS[:3], settings=settings, work=folder / work, **more
    )


def train(
    made: TrainingSpec,
    clock: Callable[[], float],
    *,
    before: Decisions | None = BEFORE,
    score: AnswerScore | None = None,
    progress: Progress = SILENT,
) -> TrainingResult:
    kept = made.work / "decisions.json"
    if before is not None and not kept.exists():
        keep_decisions(kept, before)
    return run_training(made, progress, score=score, clock=clock)


def weights(result: TrainingResult) -> str:
    return digest_file(result.folder / "adapter_model.safetensors")


def test_rate_falls_when_the_budget_ends(tmp_path: Path) -> None:
    done = train(spec(tmp_path), stepping(1.0))
    assert done.decisions is not None
    (decay,) = done.decisions.decays
    assert (decay.start, decay.stop, decay.reason) == (30, 40, "the budget is used")
    rates = [each["learning_rate"] for each in done.state.curve]
    assert rates[:2] == [0.005, 0.01]
    assert set(rates[1:31]) == {0.01}
    assert rates[30:] == pytest.approx([0.01 * left / 10 for left in range(10, 0, -1)])
    assert done.state.step == 40
    assert done.state.ended == "the budget is used"
    assert [each["step"] for each in done.state.validation] == list(range(5, 41, 5))
    assert done.epochs == pytest.approx(40 / 15)


class Stopped(Exception):
    """What stops a training in the middle."""


def stopping(clock: Callable[[], float], reads: int) -> Callable[[], float]:
    left = iter(range(reads))

    def read() -> float:
        if next(left, None) is None:
            raise Stopped
        return clock()

    return read


@pytest.mark.parametrize("stops", [(119,), (121, 10), (60, 30, 20)])
def test_resumed_by_the_same_decisions_it_ends_in_the_same_bytes(tmp_path: Path, stops: tuple[int, ...]) -> None:
    """A training is stopped, its machine becomes slower and faster, and its record repeats it without a clock."""
    made = spec(tmp_path)
    for number, reads in enumerate(stops):
        with pytest.raises(Stopped):
            train(made, stopping(stepping((1.0, 3.0, 0.2)[number]), reads))
    done = train(made, stepping(0.7))
    repeated = train(spec(tmp_path, work="again", decisions=done.decisions), stepping(1e9), before=None)
    assert weights(repeated) == weights(done)
    assert repeated.decisions == done.decisions
    assert repeated.state.step == done.state.step


def test_decision_made_before_a_kill_stands_when_the_machine_is_faster(tmp_path: Path) -> None:
    made = spec(tmp_path)
    with pytest.raises(Stopped):
        train(made, stopping(stepping(1.0), 4 * 30 + 20))
    decided = read_decisions(made.work / "decisions.json")
    assert decided is not None
    assert [each.start for each in decided.decays] == [30]
    done = train(made, stepping(0.001))
    assert done.decisions == decided
    assert done.state.step == 40


def test_fall_is_shortened_when_the_machine_becomes_slow(tmp_path: Path) -> None:
    made = spec(tmp_path, SETTINGS.model_copy(update={"budget": 100.0}))
    with pytest.raises(Stopped):
        train(made, stopping(stepping(1.0), 4 * 80))
    done = train(made, stepping(1.5))
    assert done.decisions is not None
    first, second, *_ = done.decisions.decays
    assert second.start < second.stop < first.stop == 100
    assert done.state.step == done.decisions.decays[-1].stop
    rates = [each["learning_rate"] for each in done.state.curve]
    assert rates[-1] < rates[second.start] < rates[first.start]


def _take(state: TrainerState, seconds: float, rate: float = 1.0) -> None:
    """A step that takes so long, with this learning rate."""
    state.step += 1
    state.seconds += seconds
    state.curve.append({"step": state.step, "seconds": seconds, "learning_rate": rate})


@pytest.mark.parametrize("slower", [1.0, 1.6, 4.0, 10.0, 20.0])
def test_steps_that_get_slower_in_the_fall_overrun_a_budget_by_five_percent(slower: float) -> None:
    before = Decisions(warmup=5, validate_every=1000, scored_rows=0, seconds=0.0)
    schedule, state = Annealed(10_000, TrainSettings(budget=1000), before, None, budget=1000.0), TrainerState()
    while state.ended is None:
        _take(state, 1.0 if state.seconds < 760 else slower)
        schedule.decide(state)
    assert 1000 <= state.seconds <= 1050 + 2 * slower
    assert len(schedule.decisions.decays) <= 3


def _scores(values: Iterator[float]) -> AnswerScore:
    def score(_model: TrainableModel | None, rows: int) -> Score:
        mean = next(values)
        return Score(mean, math.sqrt(mean * (1 - mean) / rows))

    return AnswerScore("exact_match", 40, score)


def test_rate_falls_when_the_score_rises_no_more(tmp_path: Path) -> None:
    values = itertools.chain([0.1, 0.5, 0.7, 0.5, 0.7, 0.55, 0.6, 0.5, 0.6], itertools.repeat(0.9))
    said = SaidAndNoted()
    before = BEFORE.model_copy(update={"scored_rows": 40})
    done = train(spec(tmp_path), stepping(0.1), before=before, score=_scores(values), progress=said)
    assert done.decisions is not None
    # The probability decides among near scores, and rises here: 0.7 at step 25 is better than 0.7 at step 15.
    (decay,) = done.decisions.decays
    assert decay.reason == "no better score in 4 validations"
    best = [each["score"] for each in done.state.validation].index(0.9)
    assert done.state.best is not None
    assert done.state.best >= best
    assert any("validation score 70.0%" in line for line in said.lines)
    assert done.score == {"metric": "exact_match", "rows": 40}


def test_all_epochs_end_a_budget_that_is_longer(tmp_path: Path) -> None:
    settings = SETTINGS.model_copy(update={"budget": 1e6, "patience": None, "epochs": 2})
    done = train(spec(tmp_path, settings), stepping(1.0))
    assert done.state.step == 30
    assert done.state.ended == "all epochs are done"


def test_epochs_with_wsd_read_no_clock(tmp_path: Path) -> None:
    settings = TrainSettings(rank=4, batch=4, epochs=2, schedule="wsd", learning_rate=0.01)
    one, other = (
        train(spec(tmp_path, settings, work=name), ticking(speed), before=None)
        for name, speed in (("one", 1.0), ("other", 1e6))
    )
    assert weights(one) == weights(other)
    assert one.state.step == 30
    assert one.decisions is not None
    assert [(each.start, each.stop) for each in one.decisions.decays] == [(23, 30)]
    assert len(one.state.validation) == 4


def test_budget_that_is_too_short_is_refused(tmp_path: Path) -> None:
    settings = SETTINGS.model_copy(update={"budget": 1e-3})
    with pytest.raises(Refused, match="too short: measuring, four steps and one validation take") as refused:
        train(spec(tmp_path, settings), stepping(1.0), before=None)
    assert refused.value.where == "train.budget"
    assert "set budget to" in str(refused.value.fix)
    rehearsing = spec(tmp_path, settings.model_copy(update={"rehearse": 0.1}), work="rehearsing")
    for _ in range(2):  # the second time, what was drawn counts again, and the steps are measured again
        with pytest.raises(Refused, match="of which drawing what is rehearsed and measuring took") as refused:
            train(rehearsing, stepping(1.0), before=None)
        assert str(refused.value.fix).endswith("s or more, or leave rehearse out")
        assert not (rehearsing.work / "estimate.json").exists()


def test_each_training_within_a_budget_is_shown_as_a_run_of_its_own(tmp_path: Path) -> None:
    """Its steps differ each time; one that goes on is the same run."""
    board = tmp_path / "board"
    for runs in (1, 2):
        shutil.rmtree(tmp_path / "work", ignore_errors=True)
        made = spec(tmp_path, metrics=MetricsSettings(tensorboard=str(board)))
        for _ in range(2):
            train(made, stepping(1.0), before=None)
            assert len(list(board.iterdir())) == runs


def _decide(folder: Path, settings: TrainSettings, answer: float) -> tuple[Decisions, list[int]]:
    """What is decided before the first of at most 10,000 steps of 1 s each, where an answer takes so many seconds; and
    how many rows the untrained base was asked, each time."""
    now, asked = [0.0], list[int]()

    def score(_model: TrainableModel | None, rows: int) -> Score:
        asked.append(rows)
        now[0] += rows * answer
        return Score(0.5, 0.1)

    nothing: Any = None
    scored = AnswerScore("exact_match", 200, score)
    validation = Validation(nothing, [], scored, clock=lambda: now[0])
    expected = Estimate(seconds=1.0, step_seconds=1.0, peak_memory_bytes=1, checkpoint_bytes=1)
    plan: Any = range(10_000)
    return decide_beforehand(
        settings, plan, expected, validation, Rehearsal(), folder / "decisions.json", SILENT
    ), asked


def test_slow_answers_use_up_no_budget(tmp_path: Path) -> None:
    """Where a few answers show that none will be scored, no more are measured; a budget of which they take more than
    half is refused."""
    settings = TrainSettings(budget=60)
    made, asked = _decide(tmp_path / "quick", settings, 0.001)
    assert (asked, made.scored_rows) == ([4, 32], 200)
    made, asked = _decide(tmp_path / "slow", settings, 2.0)
    assert (asked, made.scored_rows, made.seconds) == ([4], 0, 8.0)
    with pytest.raises(Refused, match=r"take 44 s, of which measuring took 40 s, more than half of it") as told:
        _decide(tmp_path / "slower", settings, 10.0)
    assert told.value.fix == "set budget to 440s or more, or set validate_by: loss, which measures no answers"


def test_a_stated_warmup_holds_within_a_budget(tmp_path: Path) -> None:
    for share, steps in ((0.2, 2000), (0.05, 100), (0.001, 10)):
        made, _ = _decide(tmp_path / f"{share}", TrainSettings(budget=10_000, warmup=share), 0.001)
        assert made.warmup == steps


def test_few_rows_are_validated_as_often_as_many(tmp_path: Path) -> None:
    """Sixteen times in all, where all epochs take less than the budget, too; fewer times where that would take more
    than 0.15 of it."""
    for budget, answer, steps in ((1_600.0, 0.001, 100), (100_000.0, 0.001, 625), (100_000.0, 1.0, 625),
                                  (16_000.0, 1.0, 833)):  # fmt: skip
        made, _ = _decide(tmp_path / f"{budget} {answer}", TrainSettings(budget=budget), answer)
        assert made.scored_rows == 200
        assert made.validate_every == steps


def test_what_measuring_left_of_a_budget_is_spent() -> None:
    """Three quarters of the time that is left at a constant rate, and the fall in the last one."""
    before = Decisions(warmup=5, validate_every=1000, scored_rows=0, seconds=46.0)
    schedule, state = Annealed(10_000, TrainSettings(budget=60), before, None, budget=60.0), TrainerState()
    while state.ended is None:
        _take(state, 1.0)
        schedule.decide(state)
    (decay,) = schedule.decisions.decays
    assert (decay.start, decay.stop) == (11, 15)


def test_slow_answers_leave_validation_to_the_loss(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The number of scored rows is what fits the budget, and is kept for a resumed run."""
    made, said = spec(tmp_path, SETTINGS.model_copy(update={"budget": 20.0})), SaidAndNoted()
    monkeypatch.setattr("tunesmith.training.scoring.Validation.seconds", lambda *_: (0.001, 0.1))
    done = train(made, stepping(0.2), before=None, score=_scores(itertools.repeat(0.5)), progress=said)
    assert any(
        "validating by the probability of the expected answers: within this budget 5 answers" in line
        for line in said.lines
    )
    assert (
        "validating by the probability of the expected answers: fewer than 30 answers fit into 2.5% of the budget"
        in done.notices
    )
    assert done.score is None
    assert all("score" not in each for each in done.state.validation)


def test_answers_to_validation_rows_are_part_of_the_expected_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tunesmith.training.scoring.Validation.answer_seconds", lambda *_: 100.0)
    settings = TrainSettings(rank=4, batch=4, epochs=1, learning_rate=0.01, validations=2)
    score = _scores(itertools.repeat(0.5))
    scored = train(spec(tmp_path, settings, work="scored"), ticking(1.0), before=None, score=score)
    assert scored.estimate.seconds >= 2 * 40 * 100.0
    by_loss = train(spec(tmp_path, settings, work="by-loss"), ticking(1.0), before=None)
    assert by_loss.estimate.seconds < 2 * 40 * 100.0
    within = train(spec(tmp_path, work="within"), stepping(1.0), score=score)
    assert within.estimate.seconds <= 40.0, "a budget counts them"


@pytest.mark.parametrize(("budget", "timed"), [(None, [4]), ("40s", [4, 32])])
def test_the_untrained_base_is_asked_to_time_its_answers(tmp_path: Path, budget: str | None, timed: list[int]) -> None:
    asked: list[tuple[bool, int]] = []

    def score(model: TrainableModel | None, rows: int) -> Score:
        asked.append((model is not None, rows))
        return Score(0.5, 0.1)

    given = {"epochs": 1, "validations": 2} if budget is None else {"budget": budget}
    settings = TrainSettings.model_validate(
        {"rank": 4, "batch": 4, "learning_rate": 0.01, "checkpoint_seconds": 1e-9, **given}
    )
    scored, said = AnswerScore("exact_match", 40, score), SaidAndNoted()
    done = train(spec(tmp_path, settings), stepping(1.0), before=None, score=scored, progress=said)
    assert asked[: len(timed)] == [(False, rows) for rows in timed]
    assert set(asked[len(timed) :]) == {(True, 40)}
    assert any("at most about" in line for line in said.lines) == (budget is None)
    assert budget is None or (done.decisions is not None and done.decisions.scored_rows == 40)


def test_copies_of_a_model_trained_in_full_are_counted_where_answers_are_scored(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    counted = list[int]()

    def watched(model: TrainableModel, settings: TrainSettings, **given: Any) -> MemoryNeeds:
        needs = memory_needs(model, settings, **given)
        counted.append(needs.copies)
        return needs

    monkeypatch.setattr("tunesmith.training.train.memory_needs", watched)
    full = TrainSettings(method="full", batch=4, epochs=1, learning_rate=0.01, validations=1)
    lora = TrainSettings(rank=4, batch=4, epochs=1, learning_rate=0.01, validations=1)
    for name, settings, scored in (("scored", full, True), ("by loss", full, False), ("lora", lora, True)):
        score = _scores(itertools.repeat(0.5)) if scored else None
        train(spec(tmp_path, settings, work=name), ticking(1.0), before=None, score=score)
    assert counted == [2 * (tmp_path / "model" / "model.safetensors").stat().st_size, 0, 0]


def test_damaged_decisions_are_refused(tmp_path: Path) -> None:
    made = spec(tmp_path)
    (made.work / "decisions.json").write_text("{")
    with pytest.raises(Refused, match="cannot be read") as refused:
        train(made, stepping(1.0))
    assert "--restart" in str(refused.value.fix)


def test_a_checkpoint_without_the_decisions_that_its_steps_obeyed_is_refused(tmp_path: Path) -> None:
    """New decisions would be recorded as those of all steps."""
    made = spec(tmp_path)
    with pytest.raises(Stopped):
        train(made, stopping(stepping(1.0), 40))
    (made.work / "decisions.json").unlink()
    with pytest.raises(Refused, match="decided before it was stopped is missing") as refused:
        train(made, stepping(1.0), before=None)
    assert "--restart" in str(refused.value.fix)


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
        ({"budget": "5m", "epochs": 2}, "set either budget or epochs"),
        ({"budget": "5m", "schedule": "cosine"}, "a budget needs schedule: wsd"),
    ],
)
def test_wrong_budgets_are_named(given: dict[str, Any], said: str) -> None:
    with pytest.raises(ValidationError, match=said) as refused:
        TrainSettings(**given)
    assert refused.value.error_count() == 1


def test_settings_of_earlier_records_are_read() -> None:
    """A budget's most epochs were 40."""
    assert recorded_settings({"budget": 300, "epochs": 40, "rank": 8}) == TrainSettings(budget=300, rank=8)


@pytest.mark.parametrize(("text", "seconds"), [("90s", 90), ("20m", 1200), ("1h30m", 5400), ("1.5h", 5400), (7, 7)])
def test_durations(text: Any, seconds: float) -> None:
    settings = TrainSettings(budget=text)
    assert settings.budget == seconds
    assert TrainSettings(**settings.model_dump()) == settings


@given(
    st.lists(st.floats(0, 3), min_size=1, max_size=200),
    st.lists(st.sampled_from([0.0, 0.2, 0.5]), min_size=1, max_size=200),
    st.integers(1, 9),
    st.floats(0.05, 0.9),
)
def test_any_course_ends_annealed(speeds: list[float], scores: list[float], every: int, share: float) -> None:
    """Whatever the clock and the scores do: it ends, the rate never rises after it fell, and the last is near zero."""
    settings = TrainSettings(budget=20.0, decay=share, learning_rate=0.01)
    kept = Path("/nowhere")
    schedule = Annealed(500, settings, BEFORE.model_copy(update={"validate_every": every}), kept, budget=20.0)
    schedule._fall = _in_memory(schedule)  # type: ignore[method-assign]
    state, rates = TrainerState(), []
    while state.ended is None:
        assert state.step < 500
        rates.append(schedule.rate(state.step))
        _take(state, speeds[(state.step + 1) % len(speeds)] + 0.01, rates[-1])
        if schedule.validates(state.step):
            score = scores[len(state.validation) % len(scores)]
            state.validation.append({"step": state.step, "loss": 1.0, "probability": 0.5, "score": score})
        schedule.decide(state)
    start = schedule.decisions.decays[0].start
    assert all(later <= before for before, later in itertools.pairwise(rates[start:]))
    assert all(rate > 0 for rate in rates)
    assert (
        rates[-1]
        <= max(rates) / max(1, schedule.decisions.decays[-1].stop - schedule.decisions.decays[-1].start) + 1e-12
    )
    assert state.validation[-1]["step"] == state.step, "the last weights are validated"


def _in_memory(schedule: Annealed) -> Callable[[int, int, str], str]:
    def fall(start: int, stop: int, reason: str) -> str:
        decay = Decay(start=start, stop=min(stop, 500), reason=reason)
        schedule.decisions = schedule.decisions.model_copy(update={"decays": (*schedule.decisions.decays, decay)})
        return reason

    return fall
