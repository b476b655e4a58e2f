"""Trainings shown elsewhere: each point once however often a run was killed, nothing else changed by it."""

import sys
from pathlib import Path
from typing import Any

import pytest

from tests.commands import call
from tests.said import Said
from tests.tiny_project import write_project
from tunesmith.core.errors import TunesmithError, UsageError
from tunesmith.core.progress import SILENT
from tunesmith.store.store import Store
from tunesmith.training.checkpoints import Checkpoints
from tunesmith.training.schedule import TrainerState
from tunesmith.training.settings import MetricsSettings, TrainSettings
from tunesmith.training.sinks import Follower, Point, follower, points

Series = dict[str, list[tuple[int, float]]]
TRAIN = {"rank": 2, "batch": 8, "epochs": 2, "checkpoint_seconds": 1e-9, "validations": 2, "validate_by": "loss"}


class _Killed(BaseException):
    """Nothing catches it."""


def _project(folder: Path, metrics: dict[str, str] | None) -> Path:
    tuned = {"prompt": "prompt.txt", "train": TRAIN, "max_tokens": 8}
    return write_project(folder, candidates={"tuned": tuned}, **({"metrics": metrics} if metrics else {}))


def _tensorboard(folder: Path) -> Series:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    held = EventAccumulator(str(folder), size_guidance={"scalars": 0}).Reload()
    return {tag: [(each.step, each.value) for each in held.Scalars(tag)] for tag in held.Tags()["scalars"]}


def _mlflow(uri: str) -> Series:
    from mlflow import MlflowClient  # not in each process that collects tests, where it takes a second

    client = MlflowClient(uri)
    experiment = client.get_experiment_by_name("ours")
    assert experiment is not None
    (run,) = client.search_runs([experiment.experiment_id])
    series = run.data.metrics
    return {each: [(m.step, m.value) for m in client.get_metric_history(run.info.run_id, each)] for each in series}


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["tensorboard", "mlflow"])
def test_killed_training_shows_each_point_once(tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    alone = call(_project(tmp_path / "alone", None), "train")
    board, uri = kind == "tensorboard", f"sqlite:///{tmp_path / 'mlflow.db'}"
    project = _project(tmp_path / "p", {"tensorboard": "board"} if board else {"mlflow": uri, "experiment": "ours"})
    save, follow = Checkpoints.save, Follower.follow

    def die_before_following(shown: Follower, state: TrainerState) -> None:
        if state.step == 5:
            raise _Killed
        follow(shown, state)

    def lose_a_checkpoint(checkpoints: Checkpoints, step: int, *rest: Any) -> None:
        if step == 10:
            raise _Killed
        if step != 9:  # the sink is then ahead of the newest checkpoint
            save(checkpoints, step, *rest)

    for owner, name, dies in ((Follower, "follow", die_before_following), (Checkpoints, "save", lose_a_checkpoint)):
        with monkeypatch.context() as patch:
            patch.setattr(owner, name, dies)
            with pytest.raises(_Killed):
                call(project, "train")
    if board:  # and the last write was cut short, as a power failure leaves it
        (run,) = (project / "board").iterdir()
        assert run.name.startswith("tuned-")
        newest = max(run.iterdir(), key=lambda path: (path.stat().st_size, path.name))
        newest.write_bytes(newest.read_bytes()[:-7])
    document = call(project, "train")
    assert Path(document["adapter"]).read_bytes() == Path(alone["adapter"]).read_bytes()
    curve = Store(project / ".tunesmith").record(document["training"]).body["curve"]
    found = _tensorboard(run) if board else _mlflow(uri)
    assert len(curve) > 12
    assert [step for step, _ in found["train/loss"]] == list(range(1, len(curve) + 1))
    assert [value for _, value in found["train/loss"]] == pytest.approx([each["loss"] for each in curve])
    assert [step for step, _ in found["train/learning_rate"]] == list(range(1, len(curve) + 1))
    assert len(found["train/tokens_per_second"]) == len(curve)
    assert found["validation/loss"] == [(each["step"], pytest.approx(each["loss"])) for each in document["validation"]]


def test_no_stage_depends_on_metrics(tmp_path: Path) -> None:
    first = call(_project(tmp_path / "p", None), "train")
    assert call(_project(tmp_path / "p", {"tensorboard": "board"}), "train")["training"] == first["training"]
    assert not (tmp_path / "p" / "board").exists(), "nothing was trained"
    call(tmp_path / "p", "train", "--restart")
    (run,) = (tmp_path / "p" / "board").iterdir()
    before = _tensorboard(run)
    call(tmp_path / "p", "train", "--restart")
    assert _tensorboard(run) == before, "the same training again has the same points"


def test_what_cannot_be_shown_is_refused_before_the_first_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(fix: str = "", **metrics: str) -> None:
        with pytest.raises(UsageError) as caught:
            follower(MetricsSettings(**metrics), "tuned", "sha256:00", TrainSettings(), SILENT)
        assert fix in str(caught.value.fix)

    (tmp_path / "file").write_text("")
    refused(tensorboard=str(tmp_path / "file" / "b"))
    refused(mlflow="nonsense://here")
    for module, metrics, extra in (
        ("torch.utils.tensorboard", {"tensorboard": "b"}, "tunesmith[tensorboard]"),
        ("mlflow", {"mlflow": "sqlite:///m.db"}, "tunesmith[mlflow]"),
    ):
        monkeypatch.setitem(sys.modules, module, None)
        refused(extra, **metrics)
    for wrong in ({}, {"tensorboard": "a", "mlflow": "b"}, {"tensorboard": "a", "experiment": "b"}):
        with pytest.raises(ValueError, match=r"either tensorboard or mlflow|applies to MLflow only"):
            MetricsSettings(**wrong)


def test_points_that_a_server_lost_are_written_again() -> None:
    class Broken:
        held: list[Point] = []  # noqa: RUF012
        works = False

        def last_steps(self) -> dict[str, int]:
            return {"train/loss": max((p.step for p in self.held if p.series == "train/loss"), default=0)}

        def write(self, points: list[Point]) -> None:
            self.held.extend(points[:1])
            if not self.works:
                raise TunesmithError("the server is gone")
            self.held.extend(points[1:])

        def finish(self) -> None: ...

    sink, state, said = Broken(), TrainerState(), Said()
    shown = Follower(sink, said)
    for step in (1, 2, 3):
        state.curve.append({"step": step, "loss": 1.0 / step, "learning_rate": 0.1, "tokens": 8, "seconds": 1.0})
        sink.works = step == 3
        shown.follow(state)
    assert len(said.lines) == 2
    assert "the server is gone" in said.lines[0]
    assert [p for p in sink.held if p.series == "train/loss"] == [p for p in points(state) if p.series == "train/loss"]
