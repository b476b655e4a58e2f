"""Trainings with a budget: the rate's course, what is decided when, and the same bytes again by the same decisions."""

import itertools
import math
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.said import SaidAndNoted
from tests.tiny import write_model
from tests.training.test_resume import written
from tunesmith.core.digests import digest_file
from tunesmith.core.errors import Refused
from tunesmith.core.progress import SILENT, Progress
from tunesmith.engines.training_protocol import TrainableModel
from tunesmith.records.training import Decisions, Estimate, ValidationScore
from tunesmith.training.batches.rehearsal import Rehearsal
from tunesmith.training.estimates.estimate import MemoryNeeds, memory_needs
from tunesmith.training.schedule import Annealed, TrainerState, keep_decisions, read_decisions
from tunesmith.training.scoring import AnswerScore, Score, Validation, decide_beforehand
from tunesmith.training.settings import MetricsSettings, TrainSettings
from tunesmith.training.spec import TrainingResult, TrainingSpec
from tunesmith.training.train import run_training

SETTINGS = TrainSettings(
    rank=4, batch=4, epochs=20, budget=40.0, decay=0.25, learning_rate=0.01, checkpoint_seconds=1e-9
)
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
    return written(folder, settings, work=work, **more)


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
    assert done.body.decisions is not None
    (decay,) = done.body.decisions.decays
    assert (decay.start, decay.stop, decay.reason) == (30, 40, "the budget is used")
    rates = [each.learning_rate for each in done.body.curve]
    assert rates[:2] == [0.005, 0.01]
    assert set(rates[1:31]) == {0.01}
    assert rates[30:] == pytest.approx([0.01 * left / 10 for left in range(10, 0, -1)])
    assert done.body.steps == 40
    assert done.body.ended == "the budget is used"
    assert [each.step for each in done.body.validation] == list(range(5, 41, 5))
    assert done.body.epochs == pytest.approx(40 / 15)


class Stopped(Exception):
    """What stops a training in the middle."""


def stopping(clock: Callable[[], float], reads: int) -> Callable[[], float]:
    left = iter(range(reads))

    def read() -> float:
        if next(left, None) is None:
            raise Stopped
        return clock()

    return read


@pytest.mark.parametrize("stops", [(121, 10), (60, 30, 20), (4 * 30 + 20,)])
def test_resumed_by_the_same_decisions_it_ends_in_the_same_bytes(tmp_path: Path, stops: tuple[int, ...]) -> None:
    """A training is stopped, its machine becomes slower and faster, and its record repeats it without a clock."""
    made, path = spec(tmp_path), tmp_path / "work" / "decisions.json"
    for number, reads in enumerate(stops):
        with pytest.raises(Stopped):
            train(made, stopping(stepping((1.0, 3.0, 0.2)[number]), reads))
    decided, kept = read_decisions(path), path.read_bytes()
    assert decided is not None
    path.write_text("{")
    with pytest.raises(Refused, match="cannot be read") as refused:
        train(made, stepping(1.0))
    assert "from the start" in str(refused.value.fix)
    path.unlink()
    with pytest.raises(Refused, match="decided before it was stopped is missing") as refused:
        train(made, stepping(1.0), before=None)  # new decisions would be recorded as those of all steps
    assert "from the start" in str(refused.value.fix)
    path.write_bytes(kept)
    done = train(made, stepping(0.001 if len(stops) == 1 else 0.7))
    if len(stops) == 1:  # it stands although the machine is faster
        assert [each.start for each in decided.decays] == [30]
        assert (done.body.decisions, done.body.steps) == (decided, 40)
    repeated = train(spec(tmp_path, work="again", decisions=done.body.decisions), stepping(1e9), before=None)
    assert weights(repeated) == weights(done)
    assert repeated.body.decisions == done.body.decisions
    assert repeated.body.steps == done.body.steps


def _take(state: TrainerState, seconds: float, rate: float = 1.0) -> None:
    """A step that takes so long, with this learning rate."""
    state.step += 1
    state.seconds += seconds
    state.curve.append({"step": state.step, "seconds": seconds, "learning_rate": rate})


def _annealed(before: Decisions, budget: float, took: Callable[[TrainerState], float], steps: int = 10_000) -> Any:
    """The schedule and the state of a training to its end. took: how long its next step takes."""
    schedule, state = Annealed(steps, TrainSettings(budget=budget), before, None, budget=budget), TrainerState()
    while state.ended is None:
        _take(state, took(state))
        schedule.decide(state)
    return schedule, state


def test_a_budget_is_spent_and_overrun_by_five_percent_at_most() -> None:
    before = Decisions(warmup=5, validate_every=1000, scored_rows=0, seconds=0.0)
    for slower in (1.0, 4.0, 20.0):
        schedule, state = _annealed(before, 1000.0, lambda now: 1.0 if now.seconds < 760 else slower)  # noqa: B023
        assert 1000 <= state.seconds <= 1050 + 2 * slower
        assert len(schedule.decisions.decays) <= 3
    # A tenth of what measuring left at a constant rate, and the fall in the rest.
    schedule, _ = _annealed(before.model_copy(update={"seconds": 46.0}), 60.0, lambda _: 1.0)
    (decay,) = schedule.decisions.decays
    assert (decay.start, decay.stop) == (2, 14)
    slow = before.model_copy(update={"validate_every": 150})
    schedule, state = _annealed(slow, 1000.0, lambda now: 1.0 if (now.step + 1) % 150 else 51.0)
    assert 950 <= state.seconds <= 1050, "validations are foreseen after the first one"
    assert [each.stop for each in schedule.decisions.decays] == [1000, 750]
    _, state = _annealed(before, 1e6, lambda _: 1.0, steps=30)
    assert (state.step, state.ended) == (30, "all epochs are done")


@pytest.mark.parametrize(
    ("seconds", "every", "decay", "times"), [(150.0, 750, 0.9, 1), (150.0, 750, 0.25, 1), (40.0, 167, 0.25, 5)]
)
def test_the_time_of_validations_is_reserved(seconds: float, every: int, decay: float, times: int) -> None:
    """They end within the budget although they are slow, and none is wasted a few steps before the last. The same
    decisions validate at the same steps without a clock."""
    before = Decisions(warmup=5, validate_every=every, scored_rows=0, seconds=50.0, validation_seconds=seconds)
    settings = TrainSettings(budget=1000.0, decay=decay)

    def course(decided: Decisions, budget: float | None) -> tuple[Annealed, TrainerState]:
        schedule, state = Annealed(10_000, settings, decided, None, budget=budget), TrainerState()
        while state.ended is None:
            validates = schedule.validates(state.step + 1)
            _take(state, 1.0 + seconds * validates)
            if validates:
                state.validation.append({"step": state.step, "loss": 1.0, "probability": 0.5})
            schedule.decide(state)
        return schedule, state

    schedule, state = course(before, 1000.0)
    assert 0.9 * 1000 <= state.seconds + before.seconds <= 1.05 * 1000
    validated = [int(each["step"]) for each in state.validation]
    assert (len(validated), validated[-1]) == (times, state.step)
    assert all(later - earlier >= every / 2 for earlier, later in itertools.pairwise(validated))
    assert course(schedule.decisions, None)[1].validation == state.validation


def _scores(values: Iterator[float]) -> AnswerScore:
    def score(_model: TrainableModel | None, rows: int) -> Score:
        mean = next(values)
        return Score(mean, math.sqrt(mean * (1 - mean) / rows))

    return AnswerScore("exact_match", 40, score)


def test_the_weights_of_the_best_score_are_kept(tmp_path: Path) -> None:
    values = itertools.chain([0.1, 0.5, 0.9], itertools.repeat(0.2))
    said, before = SaidAndNoted(), BEFORE.model_copy(update={"scored_rows": 40})
    done = train(spec(tmp_path), stepping(0.1), before=before, score=_scores(values), progress=said)
    assert done.body.kept == done.body.validation[2].step < done.body.steps
    assert any("validation score 90.0%" in line for line in said.lines)
    assert done.body.score == ValidationScore(metric="exact_match", rows=40)


def test_epochs_with_wsd_read_no_clock(tmp_path: Path) -> None:
    settings = TrainSettings(rank=4, batch=4, epochs=2, schedule="wsd", learning_rate=0.01)
    one, other = (
        train(spec(tmp_path, settings, work=name), ticking(speed), before=None)
        for name, speed in (("one", 1.0), ("other", 1e6))
    )
    assert weights(one) == weights(other)
    assert one.body.steps == 30
    assert one.body.decisions is not None
    assert [(each.start, each.stop) for each in one.body.decisions.decays] == [(23, 30)]
    assert len(one.body.validation) == 4


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


def test_what_is_decided_beforehand(tmp_path: Path) -> None:
    """Six validations in all, where all epochs take less than the budget, too; fewer where they would take more than
    0.2 of the steps' time. Where a few answers show that none will be scored, no more are measured; a budget of which
    they take more than half is refused."""
    for budget, answer, steps in ((1_800.0, 0.001, 300), (100_000.0, 0.001, 1667), (100_000.0, 1.0, 1667),
                                  (100_000.0, 2.0, 2000)):  # fmt: skip
        made, asked = _decide(tmp_path / f"{budget} {answer}", TrainSettings(budget=budget), answer)
        assert (asked, made.scored_rows, made.validate_every) == ([4, 32], 200, steps)
    for share, steps in ((0.2, 2000), (0.05, 100), (0.001, 10)):
        made, _ = _decide(tmp_path / f"{share}", TrainSettings(budget=10_000, warmup=share), 0.001)
        assert made.warmup == steps
    made, asked = _decide(tmp_path / "slow", TrainSettings(budget=60), 2.0)
    assert (asked, made.scored_rows, made.seconds) == ([4], 0, 8.0)
    with pytest.raises(Refused, match=r"take 44 s, of which measuring took 40 s, more than half of it") as told:
        _decide(tmp_path / "slower", TrainSettings(budget=60), 10.0)
    assert told.value.fix == "set budget to 440s or more, or set validate_by: loss, which measures no answers"


def test_slow_answers_leave_validation_to_the_loss(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The number of scored rows is what fits the budget, and is kept for a resumed run."""
    made, said = spec(tmp_path, SETTINGS.model_copy(update={"budget": 20.0})), SaidAndNoted()
    monkeypatch.setattr("tunesmith.training.scoring.Validation.seconds", lambda *_: (0.001, 0.1))
    done = train(made, stepping(0.2), before=None, score=_scores(itertools.repeat(0.5)), progress=said)
    assert any("within this budget 8 answers" in line for line in said.lines)
    assert any("fewer than 30 answers fit into 4.0% of the budget" in notice for notice in done.body.notices)
    assert done.body.score is None
    assert all(each.score is None for each in done.body.validation)


def test_the_untrained_base_is_asked_to_time_its_answers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """They are part of the expected time, and so are the copies of a model that is trained in full."""
    asked, counted = list[tuple[bool, int]](), list[int]()

    def score(model: TrainableModel | None, rows: int) -> Score:
        asked.append((model is not None, rows))
        return Score(0.5, 0.1)

    def watched(model: TrainableModel, settings: TrainSettings, **given: Any) -> MemoryNeeds:
        needs = memory_needs(model, settings, **given)
        counted.append(needs.copies)
        return needs

    monkeypatch.setattr("tunesmith.training.train.memory_needs", watched)
    scored, said = AnswerScore("exact_match", 40, score), SaidAndNoted()
    done = train(spec(tmp_path, work="within"), stepping(1.0), before=None, score=scored)
    assert asked[:2] == [(False, 4), (False, 32)]
    assert set(asked[2:]) == {(True, 40)}
    assert done.body.estimate.seconds <= 40.0, "a budget counts them"
    asked.clear()
    stated = {"batch": 4, "learning_rate": 0.01, "epochs": 1, "validations": 2, "checkpoint_seconds": 1e-9}
    settings = TrainSettings.model_validate({"rank": 4, **stated})
    train(spec(tmp_path, settings), stepping(1.0), before=None, score=scored, progress=said)
    assert asked == [(False, 4), (True, 40), (True, 40)]
    assert any("at most about" in line for line in said.lines)
    monkeypatch.setattr("tunesmith.training.scoring.Validation.answer_seconds", lambda *_: 100.0)
    full = TrainSettings.model_validate({"method": "full", **stated, "validations": 100})
    for name, each in (("scored", scored), ("by loss", None)):
        made = train(spec(tmp_path, full, work=name), ticking(1.0), before=None, score=each)
        assert (2 <= made.body.estimate.seconds / (40 * 100.0) < 100) == (each is not None)
    assert counted == [0, 0, 2 * (tmp_path / "model" / "model.safetensors").stat().st_size, 0]


@given(
    st.lists(st.floats(0, 3), min_size=1, max_size=200),
    st.lists(st.sampled_from([0.0, 0.2, 0.5]), min_size=1, max_size=200),
    st.integers(1, 9),
    st.floats(0.05, 0.9),
)
def test_any_course_ends_annealed(speeds: list[float], scores: list[float], every: int, share: float) -> None:
    """Whatever the clock and the scores do: it ends, the rate never rises after it fell, and the last is near zero.
    Repeated by its decisions, it validates at the same steps."""
    settings = TrainSettings(budget=20.0, decay=share, learning_rate=0.01)
    schedule = Annealed(500, settings, BEFORE.model_copy(update={"validate_every": every}), None, budget=20.0)
    state, rates = TrainerState(), []
    while state.ended is None:
        assert state.step < 500
        rates.append(schedule.rate(state.step))
        _take(state, speeds[(state.step + 1) % len(speeds)] + 0.01, rates[-1])
        if schedule.validates(state.step):
            score = scores[len(state.validation) % len(scores)]
            state.validation.append({"step": state.step, "loss": 1.0, "probability": 0.5, "score": score})
        schedule.decide(state)
    first, last = schedule.decisions.decays[0], schedule.decisions.decays[-1]
    assert all(later <= before for before, later in itertools.pairwise(rates[first.start :]))
    assert all(rate > 0 for rate in rates)
    assert rates[-1] <= max(rates) / max(1, last.stop - last.start) + 1e-12
    assert state.validation[-1]["step"] == state.step, "the last weights are validated"
    again = Annealed(500, settings, schedule.decisions, None, budget=None)
    steps = range(1, state.step + 1)
    assert [each for each in steps if again.validates(each)] == [each["step"] for each in state.validation]
