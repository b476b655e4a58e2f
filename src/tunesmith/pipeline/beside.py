"""Shows the best untuned candidate beside a training: it answers the validation rows that the training scores."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import TypeVar

import numpy as np
from pydantic import TypeAdapter

from tunesmith.candidates.candidate import load_candidate
from tunesmith.core.digests import short
from tunesmith.core.errors import Inconclusive, TunesmithError
from tunesmith.core.system.files import write_atomic
from tunesmith.core.text.wording import duration
from tunesmith.data.dataset import Example
from tunesmith.evaluation.probes.numbers import check_groups
from tunesmith.evaluation.scores import CONFIDENCE, rounded
from tunesmith.evaluation.stats.statistics import GAPS, Level, interval
from tunesmith.pipeline.answers import answers_of, scores_of
from tunesmith.pipeline.context import Beside, PipelineContext
from tunesmith.pipeline.training import scored_rows
from tunesmith.pipeline.verdicts import latest
from tunesmith.records.evaluation import AnswersBody
from tunesmith.training.beside import Gap, Rival
from tunesmith.training.settings import TrainSettings

_KEPT = TypeAdapter(dict[int, Gap])
Made = TypeVar("Made")


def best_untuned(context: PipelineContext, name: str, train: TrainSettings) -> Beside | None:
    """What compares the training of a candidate with the best untuned one; None where there is nothing to compare,
    which is said. Which one is best, the test rows say, before the training begins. No error here ends a training.
    """

    def unless(make: Callable[[], Made]) -> Made | None:
        try:
            return make()
        except TunesmithError as error:
            context.progress.say(f"no untuned candidate is shown beside the training of {name}: {error.what}")
            return None

    said = train.validate_by == "score" and not scored_rows(context, train)[0]  # that no answers are scored, and why
    if said or name not in context.project.settings.tuned or (given := unless(partial(_best, context, train))) is None:
        return None
    inside = context.without_test_rows()
    return lambda rows, newest, work: unless(partial(_answered, inside, name, given, rows, newest, work))


def _best(context: PipelineContext, train: TrainSettings) -> str:
    """Digest of the best untuned candidate's answers to the test rows. Raises Inconclusive where there is none."""
    if train.validate_by == "loss":
        raise Inconclusive("validate_by: loss scores no answers")
    answered, untuned = context.answered, sorted(context.project.settings.untuned)
    if not answered and (digest := latest(context.project, "evaluation", context.scope)) is not None:
        parents = context.store.record(digest, kind="evaluation").parents
        if parents.get("dataset") == context.dataset.digest:
            answered = {role[8:]: each for role, each in parents.items() if role.startswith("answers:")}
    if not (given := [answered[name] for name in untuned if name in answered]):
        raise Inconclusive("none has been evaluated on this dataset version yet")
    return max(given, key=lambda each: rounded(fmean(scores_of(context, each, "test"))))


def _answered(
    context: PipelineContext, name: str, given: str, rows: Sequence[Example], newest: Sequence[float], work: Path
) -> Rival:
    """The best untuned candidate after it has answered the rows that are scored. given: its answers to the test rows.
    newest, work: see Beside."""
    groups = [row.group for row in rows]
    check_groups("validation rows", groups)
    record = context.store.record(given, kind="answers")
    body, asked = AnswersBody.of(record), record.parents["candidate"]
    rival = load_candidate(context.store, asked).name
    context.progress.say(
        f"beside {name}: {rival}, the best untuned candidate on the test rows, answers the {len(rows)} validation rows "
        f"that are scored, once and in about {duration(body.seconds / body.n * len(rows))}"
    )
    some = rows if len(rows) < context.dataset.splits["validation"] else ()
    digest = answers_of(context, asked, "validation", first=some)
    scores = np.array(scores_of(context, digest, "validation", rows))
    kept = work / f"beside-{short(digest)}.json"
    gaps = _KEPT.validate_json(kept.read_bytes()) if kept.exists() else {}

    def compare(step: int) -> None:
        gaps[step] = interval(np.array(newest) - scores, groups, GAPS, Level(CONFIDENCE, 0))
        write_atomic(kept, _KEPT.dump_json(gaps))

    return Rival(rival, fmean(scores), len(rows), gaps, compare)
