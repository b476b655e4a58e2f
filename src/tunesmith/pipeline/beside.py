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
from tunesmith.evaluation.answers import read_answers
from tunesmith.evaluation.probes.numbers import check_groups
from tunesmith.evaluation.scores import CONFIDENCE, rounded
from tunesmith.evaluation.stats.statistics import GAPS, Level, interval
from tunesmith.pipeline.answers import answers_of
from tunesmith.pipeline.context import Beside, PipelineContext
from tunesmith.pipeline.training import leading_scores, scored_rows
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

    if name not in context.project.settings.tuned:
        return None  # a control
    if (given := unless(partial(_best, context, train))) is None:
        return None
    inside = context.without_test_rows()
    return lambda rows, newest, work: unless(partial(_answered, inside, name, given, rows, newest, work))


def _best(context: PipelineContext, train: TrainSettings) -> str | None:
    """Digest of the best untuned candidate's answers to the test rows; None where it was said that no answers to
    validation rows are scored. Raises Inconclusive where there is none for another reason."""
    if train.validate_by == "loss":
        raise Inconclusive("validate_by: loss scores no answers")
    if not scored_rows(context, train)[0]:
        return None
    answered, untuned = context.answered, sorted(context.project.settings.untuned)
    if not answered and (digest := latest(context.project, "evaluation", context.scope)) is not None:
        parents = context.store.record(digest, kind="evaluation").parents
        if parents.get("dataset") == context.dataset.digest:
            answered = {name: parents[f"answers:{name}"] for name in untuned if f"answers:{name}" in parents}
    given = [answered[name] for name in untuned if name in answered]
    if not given:
        raise Inconclusive("none has been evaluated on this dataset version yet")
    test, scores = context.dataset.examples("test"), leading_scores(context)

    def mean(digest: str) -> float:
        return rounded(fmean(scores(read_answers(context.store, digest, context.dataset, test).seen, test)))

    return max(given, key=mean)


def _answered(
    context: PipelineContext, name: str, given: str, rows: Sequence[Example], newest: Sequence[float], work: Path
) -> Rival:
    """The best untuned candidate after it has answered the rows that are scored. given: its answers to the test rows.
    newest, work: see Beside."""
    store, groups = context.store, [row.group for row in rows]
    check_groups("validation rows", groups)
    record = store.record(given, kind="answers")
    body, asked = AnswersBody.of(record), record.parents["candidate"]
    rival = load_candidate(store, asked).name
    context.progress.say(
        f"beside {name}: {rival}, the best untuned candidate on the test rows, answers the {len(rows)} validation rows "
        f"that are scored, once and in about {duration(body.seconds / body.n * len(rows))}"
    )
    every = len(rows) == context.dataset.splits["validation"]
    digest = answers_of(context, asked, "validation", first=None if every else len(rows))
    seen = read_answers(store, digest, context.dataset, rows, "validation").seen
    scores = np.array(leading_scores(context)(seen, rows))
    kept = work / f"beside-{short(digest)}.json"
    gaps = _KEPT.validate_json(kept.read_bytes()) if kept.exists() else {}

    def compare(step: int) -> None:
        gaps[step] = interval(np.array(newest) - scores, groups, GAPS, Level(CONFIDENCE, 0))
        write_atomic(kept, _KEPT.dump_json(gaps))

    return Rival(rival, fmean(scores), len(rows), gaps, compare)
