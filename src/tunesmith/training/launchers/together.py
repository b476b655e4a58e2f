"""A training on several ranks: rank 0 leads the whole command, and the others take part in the training it begins."""

from __future__ import annotations

from functools import partial
from typing import Any

from tunesmith.core.errors import Refused
from tunesmith.engines.factory import load_sharded
from tunesmith.engines.ranks import Ranks
from tunesmith.engines.training_protocol import ShardedModel, TrainableModel
from tunesmith.models.base import check_base
from tunesmith.training.scoring import AnswerScore, Score
from tunesmith.training.spec import TrainingSpec
from tunesmith.training.train import run_training


def begin(ranks: Ranks, spec: TrainingSpec, score: AnswerScore | None) -> None:
    """Have the other ranks run this training with rank 0, which calls run_training next."""
    scored = None if score is None else {"metric": score.metric, "rows": score.rows}
    ranks.agree(lambda: {"spec": spec.model_dump(mode="json"), "score": scored})


def end(ranks: Ranks) -> None:
    """Let the other ranks end."""
    ranks.agree(_nothing)


def take_part(ranks: Ranks) -> None:
    """Run the trainings that rank 0 begins, until it says that there are no more.

    Raises Refused where this rank does not see the training's folder or has other files of the base.
    """
    while (job := ranks.agree(_nothing)) is not None:
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


def _nothing() -> dict[str, Any] | None:
    """What rank 0 wants done at the end."""
    return None
