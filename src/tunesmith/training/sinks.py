"""Shows a training's curves while it runs: in TensorBoard's event files, or in MLflow.

Points are taken from the TrainerState, which every checkpoint holds. After a checkpoint each series continues after the
last step that the sink itself has, so a training that was killed and resumed repeats no point and leaves none out.
Nothing else is read back: the record is what counts. A sink that fails is reported and does not stop the training.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from tunesmith.core.errors import UsageError
from tunesmith.core.progress import Progress
from tunesmith.training.schedule import TrainerState
from tunesmith.training.settings import MetricsSettings, TrainSettings

if TYPE_CHECKING:
    from mlflow import MlflowClient

_STEP_SERIES = ("train/loss", "train/learning_rate", "train/tokens_per_second")
_VALIDATION_SERIES = ("validation/loss", "validation/score")
_MOST_METRICS = 1000  # that MLflow accepts in one request


class Point(NamedTuple):
    """One number of a series."""

    series: str
    step: int
    value: float


class Sink:
    """One run of a tracking tool. This one keeps nothing."""

    def last_steps(self) -> dict[str, int]:
        """The last step of each series that the run has; 0 or no key where it has none."""
        return {}

    def write(self, points: Sequence[Point]) -> None:
        """Add points, each series in the order of its steps."""

    def finish(self) -> None:
        """Mark the run as finished."""


class Follower:
    """Keeps a sink up to date with a training's state."""

    def __init__(self, sink: Sink, progress: Progress) -> None:
        self._sink, self._progress = sink, progress
        self._last: dict[str, int] | None = None  # None: unknown, so read it from the sink

    def follow(self, state: TrainerState) -> None:
        """Write the points of a state that the sink does not have."""
        with self._reporting():
            last = self._sink.last_steps() if self._last is None else self._last
            self._last = None
            due = [point for point in points(state) if point.step > last.get(point.series, 0)]
            self._sink.write(due)
            self._last = last | {point.series: point.step for point in due}

    def finish(self) -> None:
        """Mark the run as finished."""
        with self._reporting():
            self._sink.finish()

    @contextlib.contextmanager
    def _reporting(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # noqa: BLE001 - each tool has errors of its own
            self._progress.say(f"metrics were not written ({error}); the training and its record continue")


def points(state: TrainerState) -> list[Point]:
    """The points of a state: loss, learning rate and speed of each step, then the validations' losses and scores."""
    points: list[Point] = []
    for each in state.curve:
        step = int(each["step"])
        values = (each["loss"], each["learning_rate"], each["tokens"] / each["seconds"])
        points += [Point(series, step, value) for series, value in zip(_STEP_SERIES, values, strict=True)]
    for series in _VALIDATION_SERIES:
        name = series.rpartition("/")[2]
        points += [Point(series, int(each["step"]), each[name]) for each in state.validation if name in each]
    return points


def follower(
    metrics: MetricsSettings | None, name: str, identity: str, settings: TrainSettings, progress: Progress
) -> Follower:
    """Shows a training where metrics says, as a run that is named by the training's name and its identity's digest.

    Raises UsageError where the extra is not installed or MLflow cannot be reached.
    """
    if metrics is None:
        return Follower(Sink(), progress)
    run = f"{name}-{identity.removeprefix('sha256:')[:12]}"
    if metrics.tensorboard is not None:
        return Follower(_TensorBoard(Path(metrics.tensorboard) / run), progress)
    return Follower(_Mlflow(str(metrics.mlflow), metrics.experiment, run, settings.model_dump(mode="json")), progress)


class _TensorBoard(Sink):
    """Event files in the run's folder, a new file each time the training is resumed."""

    def __init__(self, folder: Path) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise UsageError(
                f"writing for TensorBoard needs {error.name or 'tensorboard'}",
                where="metrics.tensorboard",
                fix="pip install 'tunesmith[tensorboard]'",
            ) from error
        self._folder = folder
        try:
            self._writer = SummaryWriter(str(folder))
        except OSError as error:
            raise UsageError(
                f"cannot create the folder for event files: {error}", where="metrics.tensorboard"
            ) from error

    def last_steps(self) -> dict[str, int]:
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

        held = EventAccumulator(str(self._folder), size_guidance={"scalars": 0}).Reload()
        return {series: held.Scalars(series)[-1].step for series in held.Tags()["scalars"]}

    def write(self, points: Sequence[Point]) -> None:
        for point in points:
            self._writer.add_scalar(point.series, point.value, point.step)
        self._writer.flush()

    def finish(self) -> None:
        self._writer.close()


class _Mlflow(Sink):
    """A run of an MLflow experiment. A resumed training finds it by its tag."""

    def __init__(self, uri: str, experiment: str, run: str, settings: Mapping[str, Any]) -> None:
        os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")  # read on import
        try:
            from mlflow import MlflowClient
            from mlflow.entities import Param
            from mlflow.exceptions import MlflowException
        except ImportError as error:
            raise UsageError(
                f"writing to MLflow needs {error.name}", where="metrics.mlflow", fix="pip install 'tunesmith[mlflow]'"
            ) from error
        try:
            self._client: MlflowClient = MlflowClient(uri)
            known = self._client.get_experiment_by_name(experiment)
            number = self._client.create_experiment(experiment) if known is None else known.experiment_id
            runs = self._client.search_runs([number], f"tags.`tunesmith.run` = '{run}'", max_results=1)
            if runs:
                self._run = runs[0].info.run_id
                return
            made = self._client.create_run(number, tags={"tunesmith.run": run}, run_name=run)
            self._run = made.info.run_id
            self._client.log_batch(self._run, params=[Param(key, str(value)) for key, value in settings.items()])
        except (MlflowException, OSError) as error:
            raise UsageError(f"MLflow says: {error}", where="metrics.mlflow") from error

    def last_steps(self) -> dict[str, int]:
        every = (*_STEP_SERIES, *_VALIDATION_SERIES)
        histories = {series: self._client.get_metric_history(self._run, series) for series in every}
        return {series: max((each.step for each in held), default=0) for series, held in histories.items()}

    def write(self, points: Sequence[Point]) -> None:
        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        metrics = [Metric(point.series, point.value, now, point.step) for point in points]
        for first in range(0, len(metrics), _MOST_METRICS):
            self._client.log_batch(self._run, metrics=metrics[first : first + _MOST_METRICS])

    def finish(self) -> None:
        self._client.set_terminated(self._run)
