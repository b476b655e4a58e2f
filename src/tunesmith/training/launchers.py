"""Trainings on several ranks: rank 0 leads the whole command, and the others take part in the training it begins. The
ranks are torchrun's, or Ray Train's workers, which are restarted from the newest checkpoint where one ends.

Every worker must see the training's work folder under the same path. Ray sends Python objects by pickle.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, wait
from functools import partial
from pathlib import Path
from typing import Any, TextIO

from tunesmith.core.errors import Inconclusive, Refused, TunesmithError, UsageError
from tunesmith.core.progress import Progress, Silent, Stopped
from tunesmith.core.system.files import write_atomic
from tunesmith.core.system.ray_cluster import check_room, connected, limit_to
from tunesmith.engines.factory import load_sharded
from tunesmith.engines.ranks import ALONE, Ranks, connected_ranks
from tunesmith.engines.settings import RaySettings
from tunesmith.engines.training_protocol import ShardedModel, TrainableModel
from tunesmith.models.base import check_base
from tunesmith.training.scoring import AnswerScore, Score
from tunesmith.training.spec import TrainingSpec
from tunesmith.training.train import run_training

_WHERE = "engine.ray"
_MOST_FAILURES = 3  # workers that may end before the training is given up
_SHOWN = 1.0  # seconds until a line of rank 0 is shown
_LINES, _FAILED = "progress.txt", "failed.json"  # files of rank 0 in the work folder
_KINDS = {kind.exit_code: kind for kind in (TunesmithError, UsageError, Refused, Inconclusive)}
Lead = Callable[[Mapping[str, Any], Ranks, Progress], str]


def run_on_ray(lead: Lead, given: Mapping[str, Any], settings: RaySettings, work: Path, progress: Progress) -> str:
    """What lead returns on rank 0, while the other workers take part in the trainings that it begins.

    lead: a module's function. given: what it is called with. work: a folder that all workers see. progress: shows rank
    0's lines. A worker that ends is restarted with the others, up to three times. Raises the TunesmithError that lead
    raises, which another try would meet again; UsageError or Refused where the cluster cannot be used; TunesmithError
    where workers keep ending.
    """
    (work / _FAILED).unlink(missing_ok=True)
    with connected(_WHERE, settings.address) as ray:
        from ray.train import FailureConfig, RunConfig, ScalingConfig
        from ray.train.torch import TorchConfig, TorchTrainer

        check_room(ray, settings.workers, settings.resources, _WHERE, settings.address, progress)
        gpu = "GPU" in settings.resources
        trainer = TorchTrainer(
            partial(_rank, lead, dict(settings.resources), str(work)),
            train_loop_config=dict(given),
            torch_config=TorchConfig(backend="cpu:gloo,cuda:nccl" if gpu else "gloo"),
            scaling_config=ScalingConfig(
                num_workers=settings.workers, use_gpu=gpu, resources_per_worker=dict(settings.resources)
            ),
            run_config=RunConfig(
                storage_path=str(work / "ray"), failure_config=FailureConfig(max_failures=_MOST_FAILURES)
            ),
        )
        try:
            return str(_fit(trainer, work, progress))
        except (Stopped, KeyboardInterrupt, TunesmithError):
            ray.shutdown()  # ends the workers
            raise
        except (ray.train.TrainingFailedError, ray.exceptions.RayError) as error:
            failures = getattr(error, "worker_failures", {}).values()
            if (ours := next((each for each in failures if isinstance(each, TunesmithError)), None)) is not None:
                raise ours from error
            raise TunesmithError(
                f"the training failed on Ray: {' '.join(str(error).split())[-300:]}",
                where=_WHERE,
                fix="Ray's logs of the workers say more; the same command goes on from the newest checkpoint",
            ) from error


def _rank(lead: Lead, resources: Mapping[str, float], work: str, given: Mapping[str, Any]) -> str | None:
    """What a worker does. Rank 0 returns what lead returns. Its error goes to a file, at which the command ends the
    others: they may wait for rank 0, and Ray would try again what ends alike."""
    limit_to(resources)
    ranks = connected_ranks()
    if not ranks.first:
        take_part(ranks)
        return None
    try:
        digest = lead(given, ranks if ranks.size > 1 else ALONE, _Written(Path(work) / _LINES))
    except TunesmithError as error:
        write_atomic(Path(work) / _FAILED, json.dumps(error.as_json()["error"]).encode())
        raise
    end(ranks)
    return digest


class _Written(Silent):
    """A Progress whose lines and numbers are appended to a file, which the command that started the training shows."""

    def __init__(self, file: Path) -> None:
        self._file = file

    def say(self, text: str) -> None:
        self._write(text)

    def measured(self, name: str, values: Mapping[str, float]) -> None:
        self._write([name, dict(values)])

    def _write(self, said: Any) -> None:
        with self._file.open("a") as lines:
            lines.write(json.dumps(said) + "\n")


def _whole(lines: TextIO) -> Iterator[str]:
    """The lines that were written since the last look. One whose end is not written yet waits."""
    at = lines.tell()
    while (line := lines.readline()).endswith("\n"):
        at = lines.tell()
        yield line
    lines.seek(at)


def _fit(trainer: Any, work: Path, progress: Progress) -> Any:
    """What the trainer's rank 0 returns. Meanwhile the lines that rank 0 appends to a file are shown. Raises rank 0's
    TunesmithError."""
    fitted: Future[Any] = Future()

    def fit() -> None:
        try:
            fitted.set_result(trainer.fit().return_value)
        except BaseException as error:  # noqa: BLE001  raised in the caller's thread
            fitted.set_exception(error)

    with (work / _LINES).open("w+") as lines, progress.task("training on Ray", 1) as task:
        threading.Thread(target=fit, daemon=True).start()
        while True:
            ended = bool(wait([fitted], timeout=_SHOWN).done)
            for said in map(json.loads, _whole(lines)):
                if isinstance(said, str):
                    progress.say(said)
                else:
                    progress.measured(*said)
            if (work / _FAILED).exists():
                failed = json.loads((work / _FAILED).read_bytes())
                raise _KINDS[failed["exit"]](failed["what"], where=failed["where"], fix=failed["fix"])
            if ended:
                task.advance()
                return fitted.result()
            task.advance(0)  # raises Stopped where the work was told to stop


def begin(ranks: Ranks, spec: TrainingSpec, score: AnswerScore | None) -> None:
    """Have the other ranks run this training with rank 0, which calls run_training next."""
    scored = None if score is None else {"metric": score.metric, "rows": score.rows}
    ranks.agree(lambda: {"spec": spec.model_dump(mode="json"), "score": scored})


def end(ranks: Ranks) -> None:
    """Let the other ranks end."""
    ranks.agree(dict)


def take_part(ranks: Ranks) -> None:
    """Run the trainings that rank 0 begins, until it says that there are no more.

    Raises Refused where this rank does not see the training's folder or has other files of the base.
    """
    while job := ranks.agree(dict[str, Any]):
        spec = TrainingSpec.model_validate(job["spec"]).model_copy(update={"metrics": None})  # rank 0 shows the curves
        if not spec.work.is_dir():
            raise Refused(
                f"rank {ranks.rank} does not see the training's folder",
                where=str(spec.work),
                fix="keep the project in a folder that all machines have under the same path",
            )
        check_base(spec.base)
        model = load_sharded(spec.base, ranks)
        score = None if job["score"] is None else AnswerScore(score=partial(_answer, model), **job["score"])
        run_training(spec, model=model, score=score, ranks=ranks)


def _answer(model: ShardedModel, trained: TrainableModel | None, _rows: int) -> Score:
    """Take part in answering; rank 0 scores the answers."""
    model.answer_together([], trained)
    return Score(0.0, 0.0)
