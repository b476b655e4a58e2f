"""Where a training's curve can be watched besides its record: TensorBoard's event files, or MLflow.

What is written is taken from the TrainerState, which every checkpoint holds: after a checkpoint each series goes on
behind the last step that the sink itself holds. A run that was killed anywhere and carried on thus neither repeats a
point nor leaves one out. The record stays what counts: nothing is read back but those steps, and a sink that fails is
told of and does not stop the training.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from tunesmith.core.errors import TunesmithError, UsageError
from tunesmith.core.progress import Progress
from tunesmith.training.settings import MetricsSettings
from tunesmith.training.trainer import TrainerState

if TYPE_CHECKING:
    from mlflow import MlflowClient

_SERIES = ("train/loss", "train/learning_rate", "train/tokens_per_second", "validation/loss")
_AT_ONCE = 1000  # metrics that MLflow takes in one request


class Point(NamedTuple):
    """One number of a series."""

    series: str
    step: int
    value: float


class Sink(Protocol):
    """One run somewhere else."""

    def last_steps(self) -> dict[str, int]:
        """The last step of each series that is there; 0 or no key where it has none."""
        ...

    def write(self, points: Sequence[Point]) -> None:
        """Add points, each series in the order of its steps. Raises TunesmithError or OSError where it cannot."""
        ...

    def finish(self) -> None:
        """Say that the run is over."""
        ...


class Follower:
    """Keeps a sink at what a course holds; without one it does nothing."""

    def __init__(self, sink: Sink | None, progress: Progress) -> None:
        self._sink, self._progress = sink, progress
        self._last: dict[str, int] | None = None  # not known before it was asked, and after a failure

    def follow(self, course: TrainerState) -> None:
        """Write what the sink lacks of the course."""
        if self._sink is None:
            return
        with self._telling():
            last = self._sink.last_steps() if self._last is None else self._last
            self._last = None
            due = [point for point in points(course) if point.step > last.get(point.series, 0)]
            self._sink.write(due)
            self._last = last | {point.series: point.step for point in due}

    def finish(self) -> None:
        """Say that the run is over."""
        if self._sink is None:
            return
        with self._telling():
            self._sink.finish()

    @contextlib.contextmanager
    def _telling(self) -> Iterator[None]:
        try:
            yield
        except (TunesmithError, OSError) as error:
            self._progress.say(f"metrics were not written ({error}); the training goes on, and so does its record")


def points(course: TrainerState) -> list[Point]:
    """What a course holds to be shown, step by step."""
    found: list[Point] = []
    for each in course.curve:
        step = int(each["step"])
        values = (each["loss"], each["learning_rate"], each["tokens"] / each["seconds"])
        found += [Point(series, step, value) for series, value in zip(_SERIES, values, strict=False)]
    return found + [Point(_SERIES[3], int(each["step"]), each["loss"]) for each in course.validation]


def follower(
    settings: MetricsSettings, name: str, identity: str, stated: Mapping[str, Any], progress: Progress
) -> Follower:
    """What shows a training where the settings say, under its name and the identity that its checkpoints agree on.

    stated: the training's settings. Raises UsageError where the extra is not installed or MLflow cannot be reached.
    """
    run = f"{name}-{identity.removeprefix('sha256:')[:12]}"
    if settings.tensorboard is not None:
        return Follower(_TensorBoard(Path(settings.tensorboard) / run), progress)
    return Follower(_Mlflow(str(settings.mlflow), settings.experiment, run, stated), progress)


class _TensorBoard:
    """Event files in a folder of the run's own, a new one each time it is carried on."""

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
            raise UsageError(f"no folder can be made there: {error}", where="metrics.tensorboard") from error

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


class _Mlflow:
    """A run of an MLflow experiment, found again by its tag."""

    def __init__(self, uri: str, experiment: str, run: str, stated: Mapping[str, Any]) -> None:
        os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")  # read on import: nothing is told to anyone else
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
            found = self._client.get_experiment_by_name(experiment)
            number = self._client.create_experiment(experiment) if found is None else found.experiment_id
            runs = self._client.search_runs([number], f"tags.`tunesmith.run` = '{run}'", max_results=1)
            if runs:
                self._run = runs[0].info.run_id
                return
            made = self._client.create_run(number, tags={"tunesmith.run": run}, run_name=run)
            self._run = made.info.run_id
            self._client.log_batch(self._run, params=[Param(key, str(value)) for key, value in stated.items()])
        except (MlflowException, OSError) as error:
            raise UsageError(f"MLflow says: {error}", where="metrics.mlflow") from error

    def last_steps(self) -> dict[str, int]:
        with _mlflow_errors():
            histories = {series: self._client.get_metric_history(self._run, series) for series in _SERIES}
        return {series: max((each.step for each in held), default=0) for series, held in histories.items()}

    def write(self, points: Sequence[Point]) -> None:
        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        metrics = [Metric(point.series, point.value, now, point.step) for point in points]
        with _mlflow_errors():
            for first in range(0, len(metrics), _AT_ONCE):
                self._client.log_batch(self._run, metrics=metrics[first : first + _AT_ONCE])

    def finish(self) -> None:
        with _mlflow_errors():
            self._client.set_terminated(self._run)


@contextlib.contextmanager
def _mlflow_errors() -> Iterator[None]:
    from mlflow.exceptions import MlflowException

    try:
        yield
    except MlflowException as error:
        raise TunesmithError(f"MLflow says: {error}", where="metrics.mlflow") from error
