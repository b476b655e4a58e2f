"""A search finds the good rate, prunes what is worse, leaves out what cannot be trained, and goes on after a kill."""

import os
import signal
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import optuna
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.forked import run_elsewhere
from tests.said import Said
from tests.tiny import write_model
from tests.training.test_resume import ROWS, written
from tunesmith.core.errors import Inconclusive, Refused, TunesmithError
from tunesmith.core.progress import Stopped
from tunesmith.engines.batch import label_count, lay_out
from tunesmith.engines.factory import load_model
from tunesmith.training import search
from tunesmith.training.batches.batch_plan import validation_parts
from tunesmith.training.schedule import TrainerState
from tunesmith.training.search import Trial, search_space
from tunesmith.training.settings import TrainSettings
from tunesmith.training.spec import TrainingSpec
from tunesmith.training.steps import validation_fit

HOPELESS = TrainSettings(rank=4, batch=4, epochs=2, learning_rate=1e-7)
TRIALS = 6


def find(spec: TrainingSpec, work: Path, **more: Any) -> list[Trial]:
    work.mkdir(exist_ok=True)
    return search.search(spec, load_model(spec.base), work, **{"trials": TRIALS, **more})


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[TrainingSpec, list[Trial]]:
    """A training on 24 rows with 10 validation rows, and an uninterrupted search for its settings."""
    folder = tmp_path_factory.mktemp("whole")
    write_model(folder / "model")
    spec = written(folder, HOPELESS, ROWS[:24], validation=ROWS[50:])
    return spec, find(spec, spec.work.parent / "found")


def comparable(trials: list[Trial]) -> list[Trial]:
    """What must not depend on the clock."""
    return [each.model_copy(update={"seconds": 0.0}) for each in trials]


def test_it_finds_the_good_rate_and_prunes_what_is_worse(whole: tuple[TrainingSpec, list[Trial]]) -> None:
    spec, done = whole
    assert [each.number for each in done] == list(range(TRIALS))
    assert [each.settings["learning_rate"] for each in done[:2]] == [1e-7, 1e-3]
    assert {key: done[0].settings[key] for key in ("rank", "batch", "b_rate")} == {"rank": 4, "batch": 4, "b_rate": 1.0}
    complete = [each for each in done if each.outcome == "complete"]
    assert max(complete, key=lambda each: each.value or 0).settings["learning_rate"] >= 1e-3
    assert {each.outcome for each in done} == {"complete", "pruned"}
    for each in done:
        assert len(each.reports) == 4 if each in complete else len(each.reports) in (1, 3)
        assert each.seconds > 0
        assert len(each.probabilities) == 10 * (each in complete)
        assert each.probability is None or each.probability == pytest.approx(each.reports[-1], rel=1e-3)
    work = spec.work.parent / "found"
    assert not [*work.glob("trial-*/")], "what the trainings wrote is deleted"
    assert len([*work.glob("trial-*.json")]) == TRIALS


def killed(spec: TrainingSpec, work: Path) -> None:
    """Search, and be killed by the third step of the third trial."""
    real, count = search.run_training, [0]

    def killing(given: TrainingSpec, *, model: Any, watch: Callable[[TrainerState, Any], None]) -> Any:
        count[0] += 1

        def watching(state: TrainerState, now: Any) -> None:
            if (count[0], state.step) == (3, 3):
                os.kill(os.getpid(), signal.SIGKILL)
            watch(state, now)

        return real(given, model=model, watch=watching)

    search.run_training = killing
    find(spec, work)


def test_killed_it_goes_on_with_the_trial_that_had_not_ended(
    whole: tuple[TrainingSpec, list[Trial]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec, expected = whole
    assert run_elsewhere(killed, spec, tmp_path) == -signal.SIGKILL
    assert {path.name for path in tmp_path.glob("trial-*")} == {"trial-0.json", "trial-1.json", "trial-2"}
    (tmp_path / "trial-1.json").write_bytes(b"{}")
    trained, real = list[str](), search.run_training
    monkeypatch.setattr(
        search, "run_training", lambda given, **more: trained.append(given.work.name) or real(given, **more)
    )
    said = Said()
    assert comparable(find(spec, tmp_path, progress=said)) == comparable(expected)
    assert trained == ["trial-1", *(f"trial-{number}" for number in range(2, TRIALS))]
    assert said.lines[0].startswith("trial 1 (learning_rate 0.001, batch 4, b_rate 1, rank 4): probability 0.")
    assert any(line.endswith("pruned after 1 validations") for line in said.lines)
    assert find(spec, tmp_path)[:2] == find(spec, tmp_path, trials=2), "what ended is not trained again"
    assert len(trained) == TRIALS - 1


class World:
    """Trainings that take no time: after the n-th of four validations the probability is quality(settings, n)."""

    def __init__(self, patch: pytest.MonkeyPatch, quality: Callable[[TrainSettings, int], float]) -> None:
        self.quality, self.trained = quality, list[TrainSettings]()
        patch.setattr(search, "run_training", self.run)
        patch.setattr(search, "_validated", lambda *_: self.validated())

    def run(self, given: TrainingSpec, *, model: Any, watch: Callable[[TrainerState, Any], None]) -> None:
        self.trained.append(given.settings)
        state = TrainerState()
        for turn in range(1, given.settings.validations + 1):
            state.validation.append({"step": turn, "probability": self.quality(given.settings, turn)})
            watch(state, model)

    def validated(self) -> dict[str, Any]:
        found = self.quality(self.trained[-1], 4)
        return {"probability": found, "probabilities": [found] * 10}


def pretend(folder: Path, settings: TrainSettings = HOPELESS, **more: Any) -> list[Trial]:
    """A search over trainings that are not real."""
    rows = SimpleNamespace(read=lambda: [None] * 24)
    spec: Any = TrainingSpec.model_construct(settings=settings, rows=rows, work=folder)
    return search.search(spec, None, folder, **{"trials": 12, **more})  # type: ignore[arg-type]


def by_rate(settings: TrainSettings, turn: int) -> float:
    return 0.1 * turn / (1 + abs(settings.learning_rate / 3e-3 - 1))


def test_two_thirds_are_pruned_where_they_validate(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    world = World(monkeypatch, by_rate)
    done = pretend(tmp_path, TrainSettings(learning_rate=1e-4, batch=4, keep="best", rehearse=0.5))
    assert 2 <= sum(each.outcome == "complete" for each in done) <= 6 < sum(each.outcome == "pruned" for each in done)
    best = max((each for each in done if each.value), key=lambda each: each.value or 0)
    assert 1.5e-3 < best.settings["learning_rate"] < 6e-3
    assert len({each.settings["learning_rate"] for each in done}) == 12
    assert {(each.keep, each.rehearse) for each in world.trained} == {("last", 0.0)}
    (tmp_path / "other").mkdir()
    once = pretend(tmp_path / "other", HOPELESS.model_copy(update={"validations": 1}))
    assert {each.outcome for each in once} == {"complete"}, "after the last validation nothing is pruned"


def test_the_seed_draws_the_settings_and_no_trial_begins_after_the_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    World(monkeypatch, by_rate)
    found = []
    for name, seed, within in (("one", 0, None), ("same", 0, 3600.0), ("other", 7, None), ("late", 0, 1e-9)):
        (tmp_path / name).mkdir()
        settings = HOPELESS.model_copy(update={"seed": seed})
        found.append(comparable(pretend(tmp_path / name, settings, within=within)))
    assert found[0] == found[1] != found[2]
    assert found[3] == found[0][:1]


def test_the_score_goes_before_the_probability(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    world = World(monkeypatch, by_rate)
    done = pretend(tmp_path, scores=lambda _: [1.0, float(world.trained[-1].learning_rate < 1e-6)])
    whole = [each for each in done if each.outcome == "complete"]
    assert [each.score for each in whole] == [1.0, *[0.5] * (len(whole) - 1)]
    assert all((whole[0].value or 0) > (each.value or 1) for each in whole[1:]), "although their probability is higher"
    assert Trial(number=0, params={}, settings={}, probability=0.4, scores=(1.0, 0.0)).value == 0.5 + 0.4e-6


def test_what_its_own_settings_keep_from_training_is_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    world, said = World(monkeypatch, by_rate), Said()
    errors: dict[int, Exception] = {
        1: TunesmithError("the loss became nan", where="train.learning_rate"),
        2: Refused("too little memory", where="train"),
        3: torch.OutOfMemoryError("full"),
    }

    def failing(*given: Any, **more: Any) -> None:
        world.run(*given, **more)
        if error := errors.get(len(world.trained) - 1):
            raise error

    monkeypatch.setattr(search, "run_training", failing)
    monkeypatch.setattr(optuna.Trial, "should_prune", lambda _: False)
    done = pretend(tmp_path, trials=5, progress=said)
    assert [each.outcome for each in done] == ["complete", "failed", "failed", "failed", "complete"]
    assert [each.why for each in done[1:4]] == ["the loss became nan", "too little memory", "full"]
    assert said.lines[1].endswith("): the loss became nan")
    assert pretend(tmp_path, trials=5) == done, "they are not tried again"
    for other in (Inconclusive("nan", where="validation row r1"), Refused("x", where="training.x"), Stopped()):
        errors[len(world.trained)] = other
        with pytest.raises(type(other)):
            pretend(tmp_path, trials=6)


def test_each_row_is_fitted_as_it_is_alone(whole: tuple[TrainingSpec, list[Trial]]) -> None:
    spec, _ = whole
    model = load_model(spec.base).trainable(HOPELESS, seed=0, state_bytes=0)
    rows = spec.validation.read()
    found = search._validated(model, spec)
    alone = [float(model.label_losses(lay_out([row])).neg().exp().sum()) for row in rows]
    assert found["probabilities"] == pytest.approx(alone, rel=1e-2), "the rounding of bf16 depends on the batch"
    assert len({round(each, 3) for each in alone}) > 5, "or a wrong order would not be seen"
    parts = validation_parts(rows, HOPELESS)
    fit = validation_fit(model, [lay_out([rows[row] for row in part]) for part in parts])
    assert found["probability"] == pytest.approx(fit["probability"], rel=1e-5)
    assert len(parts) == 3
    assert found["probability"] == pytest.approx(sum(found["probabilities"]) / sum(map(label_count, rows)))


@given(
    st.floats(1e-8, 0.9),
    st.integers(1, 1024),
    st.integers(1, 4096),
    st.sampled_from(["lora", "full"]),
    st.integers(1, 99),
)
def test_the_present_settings_and_the_default_rate_are_in_the_space(
    rate: float, rank: int, batch: int, method: str, rows: int
) -> None:
    stated = {"learning_rate": rate, "batch": batch, "method": method} | ({"rank": rank} if method == "lora" else {})
    settings = TrainSettings.model_validate(stated)
    space: Any = search_space(settings, rows)
    for key, drawn in space.items():
        assert drawn._contains(drawn.to_internal_repr(getattr(settings, key)))
    rates, batches, default = space["learning_rate"], space["batch"], 1e-3 if method == "lora" else 1e-4
    assert 0 < rates.low <= default / 10 < 10 * default <= rates.high < 1
    assert set(space) == {"learning_rate", "batch"} | ({"rank", "b_rate"} if method == "lora" else set())
    usual: Any = search_space(TrainSettings(rank=16, batch=16), 1000)
    assert [usual[key].choices for key in ("rank", "batch", "b_rate")] == [(8, 16, 32), (8, 16, 32), (1.0, 4.0)]
    assert "rank" not in search_space(TrainSettings(rank=16, alpha=32), 1000), "an alpha belongs to its rank"
    assert max(batches.choices) <= max(batch, min(rows, 4096))
    assert 1 <= min(batches.choices) <= max(1, batch // 2)
