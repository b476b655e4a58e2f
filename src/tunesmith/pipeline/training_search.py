"""The search stage: finds better training settings for a candidate, by validation rows. Test rows cannot be read."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np

from tunesmith.candidates.candidate import Candidate
from tunesmith.core.digests import canonical
from tunesmith.core.errors import UsageError
from tunesmith.evaluation.stats.statistics import sign_flip
from tunesmith.pipeline.context import PipelineContext
from tunesmith.pipeline.training import row_scores, scored_rows, training_inputs, training_spec, validation_rows
from tunesmith.records.training import ComparedTrials, SettingsDifference, SettingsTrial, TrainingSearchBody
from tunesmith.training.settings import TrainSettings

if TYPE_CHECKING:
    from tunesmith.training.search import Trial

PRESENT = 0  # the number of the trial with the present settings
_REAL = 0.05  # p of a difference that is more than noise
_PER_ROW = {"probabilities", "scores"}


def search_settings(
    context: PipelineContext,
    name: str,
    candidate: Candidate,
    settings: TrainSettings,
    trials: int,
    within: float | None,
) -> str:
    """Digest of a search for better settings of a candidate's training, by so many trials, of which none begins after
    so many seconds.

    Raises UsageError for what cannot be trained and for controls, and where there are no validation rows.
    """
    if settings.permute_answers:
        raise UsageError(
            "the answers of this control are shuffled, so no setting can learn them",
            where=f"candidates.{name}.train.permute_answers",
            fix="search for the candidate that it is compared with",
        )
    context.require_one_process()
    inputs = {**training_inputs(context, name, candidate, settings), "trials": trials, "within": within}
    held = context.without_test_rows()
    checked = validation_rows(held)[: settings.validation_rows]
    if not checked:
        raise UsageError(
            "a search needs validation rows, and the dataset has none", where="data.split", fix="raise validation"
        )

    def find(work: Path) -> str:
        from tunesmith.training.search import METHOD, search

        answered, unscored = scored_rows(held, settings)
        by_row = row_scores(held, candidate, answered, work)
        spec = training_spec(held, name, candidate, settings, work)
        done = search(
            spec,
            held.on(candidate.base).trained_model(settings),
            work,
            trials=trials,
            within=within,
            scores=(lambda model: by_row(model, len(answered))) if answered else None,
            progress=context.progress,
        )
        body = TrainingSearchBody(
            method=METHOD,
            candidate=name,
            planned=trials,
            within=within,
            splits=tuple(spec.splits),
            validation_rows=len(checked),
            metric=held.project.settings.task.leading,
            scored_rows=len(answered),
            unscored=unscored,
            trials=tuple(SettingsTrial(**each.model_dump(exclude=_PER_ROW), score=each.score) for each in done),
            **dict(compared(done, [row.group for row in checked])),
        )
        per_row = [{**each.model_dump(mode="json", include=_PER_ROW), "number": each.number} for each in done]
        lines = [{"rows": [row.id for row in checked]}, *per_row]
        blob = b"".join(canonical(line) + b"\n" for line in lines)
        parents = {"base": candidate.base, "dataset": held.dataset.digest, **candidate.documents_parent}
        blobs = {"trials.jsonl": held.store.put_bytes(blob)}
        return held.store.put_record(body.record(parents, blobs))

    return context.stages.run(f"search settings of {name}", "training_search", inputs, find)


def compared(trials: Sequence[Trial], groups: Sequence[str]) -> ComparedTrials:
    """The best of the complete trials, and whether its difference to the present settings is more than noise, row by
    row. groups: of the validation rows.

    p is of a permutation test over the groups, times the number of other settings (Bonferroni), since the best of them
    was chosen by the same rows.
    """
    complete = [each for each in trials if each.outcome == "complete"]
    by: Literal["score", "probability"] = "score" if len({each.score for each in complete}) > 1 else "probability"
    if not complete:
        return ComparedTrials(by=by, best=None, difference=None, suggestion=None)
    best = max(complete, key=lambda each: each.value or 0.0)  # the first of equals
    difference = None
    if complete[0].number != PRESENT:  # it failed
        better = True
    elif best.number != PRESENT:
        values, before = (
            np.asarray(each.scores if by == "score" else each.probabilities) for each in (best, complete[0])
        )
        p = min(1.0, (len(trials) - 1) * sign_flip(values - before, groups[: len(values)], seed=0))
        mean = (getattr(best, by) or 0.0) - (getattr(complete[0], by) or 0.0)
        better = p <= _REAL
        difference = SettingsDifference(mean=mean, p=p, real=better)
    else:
        better = False
    suggestion = best.settings if better else None
    return ComparedTrials(by=by, best=best.number, difference=difference, suggestion=suggestion)
