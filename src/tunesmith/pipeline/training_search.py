"""The search stage: finds better training settings for a candidate, by validation rows. Test rows cannot be read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from tunesmith.candidates.candidate import Candidate
from tunesmith.core.digests import canonical
from tunesmith.core.errors import UsageError
from tunesmith.data.dataset import Example
from tunesmith.evaluation.stats.statistics import intervals, sign_flip
from tunesmith.pipeline.context import PipelineContext
from tunesmith.pipeline.training import (
    composed_rows,
    fitted,
    row_scores,
    scored_rows,
    training_inputs,
    validation_rows,
)
from tunesmith.store.records import Record
from tunesmith.training.settings import LEAST_SCORED, PROBABILITY, TrainSettings

if TYPE_CHECKING:
    from tunesmith.training.search.halving import TrialResult
    from tunesmith.training.search.search import SearchOutcome

CONFIDENCE = 0.95
TRIALS = "trials.jsonl"


def search_settings(
    context: PipelineContext, name: str, candidate: Candidate, settings: TrainSettings, within: float
) -> str:
    """Digest of a search for better settings of a candidate's training, within so many seconds.

    Raises UsageError for what cannot be trained and for controls, and where there are no validation rows.
    """
    if settings.permute_answers:
        raise UsageError(
            "the answers of this control are shuffled, so no setting can learn them",
            where=f"candidates.{name}.train.permute_answers",
            fix="search for the candidate that it is compared with",
        )
    context.require_one_process()
    inputs = {**training_inputs(context, name, candidate, settings), "within": within}
    held = context.without_test_rows()
    checked = validation_rows(held)[: settings.validation_rows]
    if not checked:
        raise UsageError(
            "a search needs validation rows, and the dataset has none", where="data.split", fix="raise validation"
        )

    def find(work: Path) -> str:
        from tunesmith.training.search.search import search

        rows, validation = composed_rows(held, candidate, settings)
        scorable, reason = scored_rows(held, settings)
        if reason is not None:
            context.progress.say(f"{name}: comparing by {PROBABILITY}: {reason}")
        outcome = search(
            base=held.base,
            rows=rows,
            validation=validation[: len(checked)],
            settings=settings,
            within=within,
            work=work / "search",
            scorable=len(scorable),
            scores=row_scores(held, candidate, scorable, work) if scorable else None,
            model=held.trained_model(settings),
            progress=context.progress,
        )
        body = {
            "candidate": name,
            "settings": fitted(held, settings).model_dump(mode="json"),
            "within": within,
            "splits": list(held.dataset.readable),
            "rows": len(rows),
            "validation_rows": len(checked),
            "metric": held.project.settings.task.leading,
            **search_body(outcome, checked, "validate_by is loss" if settings.validate_by == "loss" else reason),
        }
        blob = b"".join(canonical(line) + b"\n" for line in _lines(outcome, checked))
        parents = {"base": held.base.digest, "dataset": held.dataset.digest, **candidate.documents_parent}
        blobs = {TRIALS: held.store.put_bytes(blob)}
        return held.store.put_record(Record(kind="training_search", parents=parents, blobs=blobs, body=body))

    return context.stages.run(f"search settings of {name}", "training_search", inputs, find)


def search_body(outcome: SearchOutcome, rows: Sequence[Example], unscored: str | None) -> dict[str, Any]:
    """What a search's record says of its trials and of its outcome. rows: those that validated. unscored: why answers
    could not be scored."""
    from tunesmith.training.search.halving import PRESENT, SOURCE, final_results, ranking, spent

    decisions, final = outcome.decisions, final_results(outcome.results)
    if unscored is None and not decisions.scored_rows:
        unscored = f"the time is too short to score {LEAST_SCORED} answers of each trial"
    late = any(rung.not_run for rung in decisions.rungs) or any(each.cut is not None for each in outcome.results)
    by, why = _compared_by(final, unscored, late)
    best = ranking(final)[0] if by is not None else None
    found: dict[str, Any] = {"by": by, "why": why, "best": best, "difference": None, "suggestion": None}
    present = next((each for each in final if each.trial == PRESENT), None)
    if best not in (None, PRESENT):
        winner = next(each for each in final if each.trial == best)
        if present is not None:
            found["difference"] = _difference(winner, present, rows, by == "score", decisions.others)
        if present is None or found["difference"]["real"]:
            found["suggestion"] = outcome.trials[best]
    trials = _trials(outcome, rows)
    return {
        "method": SOURCE,
        "seconds": spent(decisions, outcome.results),
        "decisions": decisions.model_dump(mode="json"),
        "trials": trials,
        "failed": sum(each["failed"] is not None for each in trials),
        "cut": sum(each["cut"] is not None for each in trials),
        "not_run": sum(not each["runs"] and each["failed"] is None and each["cut"] is None for each in trials),
        "final_rung": final[0].rung if final else None,
        **found,
    }


def _compared_by(final: Sequence[TrialResult], unscored: str | None, late: bool) -> tuple[str | None, str]:
    """What the last rung is compared by, `score` or `probability` (of the expected answers), and why; None where
    nothing tells its trials apart.

    late: whether the time was used before all trials of the last rung had run.
    """
    if late and [each.trial for each in final] in ([], [0]):
        return None, "the time was used before another setting could be compared with the present ones"
    scores = {each.score for each in final}
    if len(scores) > 1:
        return "score", "the task's leading metric over generated answers"
    if not final:
        return None, "no setting could be trained"
    if len(final) == 1:
        return "probability", "only one of the settings could be trained"
    if len({each.probability for each in final}) == 1:
        return (
            None,
            "all trials give the expected answers the same probability: nothing was learned that validation can see",
        )
    if scores != {None}:
        return "probability", f"every trial of the last rung has the score {scores.pop():.1%}"
    return "probability", str(unscored)


def _difference(
    winner: TrialResult, present: TrialResult, rows: Sequence[Example], by_score: bool, others: int
) -> dict[str, Any]:
    """How the best trial differs from the present settings, row by row, and whether that is more than noise.

    p: of a permutation test over the rows' groups, times the number of other settings (Bonferroni), since the best of
    them was chosen by the same rows.
    """
    values = np.asarray(winner.scores if by_score else winner.probabilities, dtype=np.float64)
    before = np.asarray(present.scores if by_score else present.probabilities, dtype=np.float64)
    groups = [row.group for row in rows[: len(values)]]
    p = min(1.0, others * sign_flip(values - before, groups, seed=0))
    if by_score:
        assert winner.score is not None
        assert present.score is not None
        mean = winner.score - present.score
    else:
        assert winner.probability is not None
        assert present.probability is not None
        mean = winner.probability - present.probability
    return {"mean": mean, "p": p, "real": p <= 1 - CONFIDENCE}


def _trials(outcome: SearchOutcome, rows: Sequence[Example]) -> list[dict[str, Any]]:
    """Each trial with its settings, its runs in the rungs, and why it was left out or ended early."""
    found = []
    for number, values in enumerate(outcome.trials):
        results = [each for each in outcome.results if each.trial == number]
        runs = [_run(each, rows) for each in results if each.probability is not None]
        failed = next((each.failed for each in results if each.failed is not None), None)
        cut = next((each.cut for each in results if each.cut is not None), None)
        found.append({"trial": number, "settings": values, "runs": runs, "failed": failed, "cut": cut})
    return found


def _run(result: TrialResult, rows: Sequence[Example]) -> dict[str, Any]:
    scored = None
    if result.scores:
        groups, values = [row.group for row in rows[: len(result.scores)]], np.asarray(result.scores)[:, None]
        (each,) = intervals(values, groups, ends=(0.0, 1.0), confidence=CONFIDENCE, seed=0)
        scored = {"mean": each.mean, "low": each.low, "high": each.high}
    facts = result.model_dump(mode="json", exclude={"trial", "probabilities", "scores", "failed", "cut"})
    return {**facts, "score": scored}


def _lines(outcome: SearchOutcome, rows: Sequence[Example]) -> list[Mapping[str, Any]]:
    """The sum of the probabilities of each validation row's labels, and its score where it was answered, for each trial
    in each rung."""
    return [
        {"rung": each.rung, "trial": each.trial, "id": row.id, "probability": probability}
        | ({"score": each.scores[place]} if place < len(each.scores) else {})
        for each in outcome.results
        for place, (row, probability) in enumerate(zip(rows, each.probabilities, strict=False))
    ]
