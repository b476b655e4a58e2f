"""A search over a tiny model: it finds the good rate, leaves out what cannot be trained, and goes on after a kill."""

from __future__ import annotations

import math
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tests.forked import run_elsewhere
from tests.said import SaidAndNoted
from tests.tiny import write_model
from tests.training.test_resume import ROWS
from tests.training.test_schedule import ticking
from tunesmith.core.errors import Inconclusive, Refused
from tunesmith.core.progress import SILENT, Progress
from tunesmith.core.system import memory
from tunesmith.engines.training_protocol import TrainableModel
from tunesmith.models.base import resolve_base
from tunesmith.models.rendering import Rendered
from tunesmith.store.store import Store
from tunesmith.training.batches.batch_plan import plan
from tunesmith.training.objectives import CrossEntropy
from tunesmith.training.search import halving, search
from tunesmith.training.search.halving import Measured, ranking
from tunesmith.training.search.search import SearchOutcome
from tunesmith.training.settings import TrainSettings
from tunesmith.training.state import TrainerState
from tunesmith.training.steps import validation_fit

HOPELESS = TrainSettings(rank=4, batch=4, epochs=2, learning_rate=1e-7)


@pytest.fixture(autouse=True)
def few_and_short(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing depends on the machine."""
    _shorten(monkeypatch)


def _shorten(patch: pytest.MonkeyPatch) -> None:
    """Three other settings at most, trials of a few steps, and no measuring."""
    patch.setattr(halving, "_OTHERS", (3,))
    patch.setattr(halving, "LEAST_STEPS", 3)
    measured = Measured(row=1.8, loss=1.0, answer=0.01, total=1.0)
    patch.setattr(search, "_measure", lambda *_: measured)


def find(
    folder: Path,
    settings: TrainSettings = HOPELESS,
    work: str = "work",
    scores: search.RowScores | None = None,
    progress: Progress = SILENT,
    clock: Callable[[], float] | None = None,
) -> SearchOutcome:
    if not (folder / "model").exists():
        write_model(folder / "model")
    base = resolve_base(Store(folder / "store"), str(folder / "model"), folder)
    return search.search(
        base=base,
        rows=ROWS[:40],
        validation=ROWS[50:],
        settings=settings,
        within=300.0,
        work=folder / work,
        scorable=len(ROWS[50:]) if scores else 0,
        scores=scores,
        progress=progress,
        clock=clock or ticking(0.5),
    )


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, SearchOutcome]:
    """A folder with a model, and an uninterrupted search in it."""
    folder = tmp_path_factory.mktemp("whole")
    with pytest.MonkeyPatch.context() as patch:
        _shorten(patch)
        return folder, find(folder)


def comparable(outcome: SearchOutcome) -> list[dict[str, Any]]:
    """What must not depend on the clock or on memory."""
    machine = {"seconds", "checking", "expected_bytes", "peak_bytes"}
    return [each.model_dump(exclude=machine) for each in outcome.results]


def test_it_finds_the_good_rate_among_hopeless_ones(whole: tuple[Path, SearchOutcome]) -> None:
    _, done = whole
    rates = [each["learning_rate"] for each in done.trials]
    assert rates == [1e-7, 1e-3, 3e-7, 3.3e-8]
    best = ranking(halving.final_results(done.results))[0]
    assert rates[best] == 1e-3
    losses = {each.trial: each.loss for each in done.results if each.rung == 0}
    assert max(losses.values()) - losses[0] < 1e-3 < losses[0] - losses[best]  # type: ignore[operator, type-var]
    assert [len(rung.trials) for rung in done.decisions.rungs] == [4, 2]
    for each in done.results:
        batch = done.trials[each.trial]["batch"]
        assert each.steps == math.ceil(done.decisions.rungs[each.rung].rows / batch)
        assert each.rows == each.steps * batch
        assert len(each.probabilities) == 10
        assert each.expected_bytes is not None
        assert each.peak_bytes is not None
        assert each.peak_bytes <= 1.1 * each.expected_bytes


def test_same_decisions_give_the_same_trials(whole: tuple[Path, SearchOutcome]) -> None:
    """The second search finds the first one's decisions, and none of its results; its clock runs otherwise."""
    folder, one = whole
    copied = folder / "again"
    copied.mkdir()
    shutil.copy(folder / "work" / "search.json", copied)
    again = find(folder, work="again", clock=ticking(0.01))
    assert comparable(again) == comparable(one)
    assert again.decisions == one.decisions


@pytest.mark.parametrize("given", [{"epochs": 3}, {"epochs": 3, "schedule": "linear"}, {"budget": "60s"}])
def test_trials_are_annealed(given: dict[str, Any]) -> None:
    """A trial ends with a low rate, however many steps it has, and takes no decision of its own."""
    settings = TrainSettings(learning_rate=0.01, warmup=0.1, **given)
    for steps in (1, 2, 20, 500):
        schedule, state = search._schedule(settings, steps, Path("/nowhere")), TrainerState()
        rates = []
        while state.ended is None and state.step < steps:
            rates.append(schedule.rate(state.step))
            state.step += 1
            state.seconds += 1e9
            schedule.decide(state)
        assert len(rates) == steps
        assert max(rates) <= 0.01
        assert steps < 20 or (rates[0] < max(rates) > 0.0099 and rates[-1] < 0.003)


@pytest.mark.parametrize(
    ("given", "warmup"),
    [({"epochs": 3, "schedule": "wsd"}, 250), ({"budget": 60}, 100), ({"budget": 60, "warmup": 0.1}, 500)],
)
def test_trials_warm_up_as_the_training_does(given: dict[str, Any], warmup: int) -> None:
    schedule = search._schedule(TrainSettings.model_validate(given), 5000, Path("/nowhere"))
    highest = max(map(schedule.rate, range(5000)))
    assert next(step for step in range(5000) if schedule.rate(step) == highest) == warmup - 1


def test_scores_come_before_the_probability(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []

    def scores(model: TrainableModel | None, count: int) -> list[float]:
        asked.append(count)
        return [1.0] * 5 + [0.0] * (count - 5) if len(asked) in (3, 6) else [0.0] * count

    assert find(tmp_path, scores=scores).decisions.scored_rows == 0, "10 rows are too few to choose by"
    assert not asked
    monkeypatch.setattr(halving, "LEAST_SCORED", 10)
    done = find(tmp_path, scores=scores, work="other")
    assert asked == [10] * 6
    assert [each.score for each in done.results] == [0.0, 0.0, 0.5, 0.0, 0.0, 0.5]
    assert ranking(halving.final_results(done.results)) == [2, 0], (
        "although trial 1 gives the answers a far higher probability"
    )


def test_what_exceeds_memory_is_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The trial with twice the present rank does not fit; it is counted with the reason, and never tried again."""
    needs: dict[int, int] = {}
    real = search.memory_needs

    def watched(model: TrainableModel, settings: TrainSettings, *, validates: bool) -> Any:
        found = real(model, settings, validates=validates)
        needs[settings.rank] = found.later
        room = 10**12 if settings.rank <= HOPELESS.rank else found.later // 2
        monkeypatch.setattr(memory, "available_memory", lambda: room)
        return found

    monkeypatch.setattr(search, "memory_needs", watched)
    settings = next(
        each
        for each in (HOPELESS.model_copy(update={"seed": seed}) for seed in range(20))
        if any(trial["rank"] == 8 for trial in search.draw_trials(each, 40)[1:4])
    )
    said = SaidAndNoted()
    done = find(tmp_path, settings, progress=said)
    large = [number for number, each in enumerate(done.trials) if each["rank"] == 8]
    assert large
    for each in done.results:
        assert (each.failed is not None) == (each.trial in large)
        assert each.rung == 0 or each.trial not in large
    assert any("left out: the largest part of a step" in line for line in said.lines)


def test_a_trial_that_diverges_is_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = search._row_fits
    calls: list[int] = []

    def fits(*given: Any) -> tuple[list[float], list[float]]:
        calls.append(1)
        return ([math.nan] * 10, [math.nan] * 10) if len(calls) == 2 else real(*given)

    monkeypatch.setattr(search, "_row_fits", fits)
    done = find(tmp_path)
    assert [each.failed for each in done.results[:3]] == [None, "the validation loss became nan", None]
    assert 1 not in {each.trial for each in done.results[4:]}
    assert ranking(halving.final_results(done.results))[0] != 1


def test_a_trial_is_ended_where_the_time_is_used(tmp_path: Path) -> None:
    """From the fifth trial on, which is in the last rung, the clock runs a hundred times as fast."""
    said, now = SaidAndNoted(), [0.0]

    def clock() -> float:
        now[0] += 50.0 if _ran(said) >= 4 else 0.5
        return now[0]

    done = find(tmp_path, progress=said, clock=clock)
    last = done.results[-1]
    assert last.cut is not None
    planned = math.ceil(done.decisions.rungs[1].rows / done.trials[last.trial]["batch"])
    assert last.cut == f"ended at step {last.steps} of {planned}: the time of the search was used"
    assert 0 < last.steps < planned
    assert (last.loss, last.failed, last.probabilities) == (None, None, ())
    assert {each.rung for each in halving.final_results(done.results)} == {0}
    assert last.cut in said.lines[-1]
    again = find(tmp_path, clock=ticking(0.01))
    assert again == done, "it is on the disk, and not trained for longer"


@pytest.mark.parametrize(("rows", "batch", "count"), [(200, 32, 2000), (200, 32, 2100), (24, 16, 240), (20, 64, 45)])
def test_trials_read_the_rows_that_they_are_given(
    rows: int, batch: int, count: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each epoch ends with what is left of its rows, so that steps times the batch would be more than what is read."""
    some = [Rendered((1,) * (2 + place % 7), (True,) * (2 + place % 7)) for place in range(rows)]
    shared: Any = SimpleNamespace(rows=some, settings=HOPELESS, trials=[{"batch": batch}], clock=ticking(1.0))
    monkeypatch.setattr(search, "_train_and_check", lambda _shared, _settings, _scored, result, *_: result)
    result = search._run_trial(shared, 0, 0, 0, count, 1.0, Path("/nowhere"))
    settings = HOPELESS.model_copy(update={"batch": batch})
    order = [step for epoch in range(11) for step in plan(some, batch, settings.seed, epoch)]
    assert result.rows == sum(map(len, order[: result.steps]))
    assert abs(result.rows - count) < batch
    assert count % rows or result.rows == count


def test_losses_in_batches_are_those_of_each_row_alone(tmp_path: Path) -> None:
    write_model(tmp_path / "model")
    base = resolve_base(Store(tmp_path / "store"), str(tmp_path / "model"), tmp_path)
    settings = TrainSettings(epochs=1, rank=4, batch=8)
    model = search.load_model(base).trainable(settings, seed=0, state_bytes=0)
    rows = search.render_rows(search.Renderer(base.folder), ROWS[:21], settings, base.context_length)
    (losses, probabilities), alone = (search._row_fits(model, some, settings) for some in (rows, rows[:1]))
    one_by_one = [search._row_fits(model, [row], settings)[0][0] for row in rows]
    assert losses == pytest.approx(one_by_one, rel=1e-2), "the rounding of bf16 depends on the batch"
    assert len({round(each, 2) for each in one_by_one}) > 10, "or a wrong order would not be seen"
    assert alone[0] == one_by_one[:1]
    parts = search.validation_parts(rows, settings)
    with torch.no_grad():
        batches = [search.lay_out([rows[row] for row in part]) for part in parts]
        total = sum(float(model.loss(batch, CrossEntropy(), 1.0)) for batch in batches)
    assert sum(losses) == pytest.approx(total, rel=1e-5)
    assert len(batches) == 3
    labels = sum(map(search.label_count, rows))
    assert sum(probabilities) / labels == pytest.approx(validation_fit(model, batches)["probability"], rel=1e-5)


def test_a_metric_without_a_number_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def scores(model: TrainableModel | None, count: int) -> list[float]:
        raise Inconclusive("the scorer 'own' gave nan", where="validation row r41")

    monkeypatch.setattr(halving, "LEAST_SCORED", 10)
    with pytest.raises(Inconclusive, match="gave nan"):
        find(tmp_path, scores=scores)


class Stopped(Exception):
    """What stops a search in the middle."""


@pytest.mark.parametrize("stops", [(0, 1, 1, 2), (3, 1)])
def test_stopped_it_goes_on(
    whole: tuple[Path, SearchOutcome], monkeypatch: pytest.MonkeyPatch, stops: tuple[int, ...]
) -> None:
    folder, uninterrupted = whole
    work = f"stopped-{len(stops)}"
    real, left = search._train_and_check, [0]
    trained: list[tuple[int, int]] = []

    def stopping(shared: Any, settings: Any, scored: int, result: Any, seconds: float, folder: Path) -> Any:
        if left[0] == 0:
            raise Stopped
        left[0] -= 1
        trained.append((result.rung, result.trial))
        return real(shared, settings, scored, result, seconds, folder)

    monkeypatch.setattr(search, "_train_and_check", stopping)
    for stop in stops:
        left[0] = stop
        with pytest.raises(Stopped):
            find(folder, work=work)
    left[0] = 99
    done = find(folder, work=work)
    assert comparable(done) == comparable(uninterrupted)
    assert done.decisions == uninterrupted.decisions
    assert sorted(set(trained)) == sorted(trained), "no finished trial is repeated"


def _ran(said: SaidAndNoted) -> int:
    """How many trials ran."""
    return sum(line.startswith("rung ") and " steps (" in line for line in said.lines)


def test_damaged_results_run_again(whole: tuple[Path, SearchOutcome]) -> None:
    folder, uninterrupted = whole
    shutil.copytree(folder / "work", folder / "damaged")
    (folder / "damaged" / "rung-0-trial-2.json").write_text("{")
    said = SaidAndNoted()
    assert comparable(find(folder, work="damaged", progress=said)) == comparable(uninterrupted)
    assert any("rung-0-trial-2.json is damaged" in line for line in said.lines)
    assert _ran(said) == 1


@pytest.mark.parametrize("change", ["damaged", "environment", "missing"])
def test_what_cannot_be_compared_starts_over(whole: tuple[Path, SearchOutcome], change: str) -> None:
    folder, uninterrupted = whole
    work = folder / f"over-{change}"
    shutil.copytree(folder / "work", work)
    kept = uninterrupted.decisions.model_copy(update={"environment": {"threads": 64}}).model_dump_json()
    (work / "search.json").write_text(kept if change == "environment" else kept[:-1])
    if change == "missing":
        (work / "search.json").unlink()
    said = SaidAndNoted()
    assert comparable(find(folder, work=work.name, progress=said)) == comparable(uninterrupted)
    told = any("in another environment, or is damaged: starting over" in line for line in said.lines)
    assert told == (change != "missing")
    assert _ran(said) == 6


def test_present_settings_that_do_not_fit_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()  # measures
    monkeypatch.setattr(memory, "available_memory", lambda: 1000)
    with pytest.raises(Refused, match="the largest part of a step"):
        find(tmp_path)


def _find_killed(folder: Path, steps: int) -> None:
    """Search, and kill this process before the trials' step of this number."""
    with pytest.MonkeyPatch.context() as patch:
        _shorten(patch)
        real, left = search.Trainer._step, iter(range(steps))

        def step(*given: Any) -> Any:
            if next(left, None) is None:
                (folder / "reached").touch()
                os.kill(os.getpid(), signal.SIGKILL)
            return real(*given)

        patch.setattr(search.Trainer, "_step", step)
        find(folder, work="killed")


@pytest.mark.slow
def test_killed_it_goes_on(whole: tuple[Path, SearchOutcome]) -> None:
    """kill -9 between two steps of the first trial, and of a later one."""
    folder, uninterrupted = whole
    for steps in (3, 20):
        assert run_elsewhere(_find_killed, folder, steps) == -signal.SIGKILL
        (folder / "reached").unlink()
    said = SaidAndNoted()
    done = find(folder, work="killed", progress=said)
    assert 0 < _ran(said) < 6, "finished trials are not repeated"
    assert comparable(done) == comparable(uninterrupted)
    assert done.decisions == uninterrupted.decisions


def test_the_present_settings_are_those_that_the_training_would_have(tmp_path: Path) -> None:
    """A rate of B that is left open fits the base."""
    found = find(tmp_path, TrainSettings(rank=4, batch=4, epochs=2))
    assert found.trials[0]["b_rate"] == 4.0
