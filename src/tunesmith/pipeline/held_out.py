"""Asks candidates rows that were held out of short trainings, as an evaluation asks them test rows, and scores them."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from tunesmith.candidates.answering import Answerer
from tunesmith.candidates.baselines import make_baseline
from tunesmith.candidates.candidate import Candidate
from tunesmith.core.errors import Inconclusive
from tunesmith.core.reading.strict_json import parse_json
from tunesmith.core.system.files import write_atomic
from tunesmith.data.dataset import Example
from tunesmith.engines.protocol import Completion, Engine, Generation, Question
from tunesmith.evaluation.answers import seen_answers
from tunesmith.evaluation.metrics.declared import checked
from tunesmith.pipeline.context import PipelineContext
from tunesmith.pipeline.training import leading_scoring

_FOLDS = 5  # that a baseline is built anew for, each time without the rows that it is asked


def ask_held_out(
    context: PipelineContext,
    answerer: Answerer,
    candidate: Candidate,
    rows: Sequence[Example],
    adapter: str | None = None,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, Any]:
    """{"scores", "prompt_tokens", "completion_tokens", "seconds", "largest"}.

    scores: by the primary metric, in the order of rows. seconds: all that were spent. largest: {"rows", "seconds"} of
    the most rows that were asked at once, without building a baseline, which serving builds once. A row that is a
    training row is asked as one that is not: no row of its group is retrieved or was learned.
    Raises Inconclusive where the metric gives anything but a number from 0 to 1.
    """
    asked_as = answerer.composer.asked_as
    # Builds the index, as loading does: once, and not timed.
    answerer.composer.retrieved_without_group(rows[0], asked_as)
    began, building = clock(), 0.0
    asked = [answerer.generation_without_group(row) for row in rows]
    if candidate.method != "model":
        given, building = _baseline_answers(candidate, answerer.composer.examples, rows, asked, clock)
    else:
        given = answerer.responder.generate(asked, adapter)
    seconds = clock() - began
    metric, scoring = context.project.settings.task.leading, leading_scoring(context)
    lines = {
        row.id: {"text": answer.text, "retrieved": list(answerer.composer.retrieved_without_group(row, asked_as).ids)}
        for row, answer in zip(rows, given, strict=True)
    }
    seen = seen_answers(context.store, context.dataset, candidate, lines, rows)
    return {
        "scores": [checked(scoring(seen[row.id]), metric, f"held-out row {row.id}") for row in rows],
        "prompt_tokens": sum(answer.prompt_tokens for answer in given),
        "completion_tokens": sum(answer.completion_tokens for answer in given),
        "seconds": seconds,
        "largest": {"rows": len(rows), "seconds": seconds - building},
    }


def ask_losses(
    engine: Engine,
    answerer: Answerer,
    rows: Sequence[Example],
    adapter: str | None = None,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, Any]:
    """{"losses": of each row's expected answer, summed over its tokens, in nats; "losses_seconds"}.

    Raises Inconclusive where a loss is not finite.
    """
    began = clock()
    asked = [Question(answerer.generation_without_group(row).messages, (row.answer,)) for row in rows]
    losses = [-found[0] for found in engine.choose(asked, adapter)]
    for row, loss in zip(rows, losses, strict=True):
        if not math.isfinite(loss):
            raise Inconclusive(
                f"after a short training, the loss of a held-out row's expected answer is {loss}",
                where=f"held-out row {row.id}",
                fix="lower the candidate's train.learning_rate",
            )
    return {"losses": losses, "losses_seconds": clock() - began}


def together(parts: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Answers to some rows and to the rows after them, as if asked at once."""
    found: dict[str, Any] = {"scores": [score for part in parts for score in part["scores"]]}
    found["largest"] = max((part["largest"] for part in parts), key=lambda largest: largest["rows"])
    return found | {key: sum(part[key] for part in parts) for key in ("prompt_tokens", "completion_tokens", "seconds")}


def kept(path: Path, make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """What a file holds from a run that was stopped. Where there is none or it is damaged: what make returns, written
    there."""
    found: dict[str, Any] | None = None
    with suppress(FileNotFoundError, ValueError):
        found = parse_json(path.read_bytes())
    if found is None:
        found = make()
        write_atomic(path, json.dumps(found).encode())
    return found


def mean(scores: Sequence[float]) -> float:
    """The mean of scores."""
    return math.fsum(scores) / len(scores)


def _baseline_answers(
    candidate: Candidate,
    train: Sequence[Example],
    rows: Sequence[Example],
    asked: Sequence[Generation],
    clock: Callable[[], float],
) -> tuple[list[Completion], float]:
    """A baseline's answers, and the seconds that building it took: it is built anew without the groups it is asked."""
    learned = {row.group for row in train}
    groups = sorted({row.group for row in rows} & learned)
    fold_of = {group: 1 + place % _FOLDS for place, group in enumerate(groups)}
    given: dict[int, Completion] = {}
    building = 0.0
    for fold in sorted({fold_of.get(row.group, 0) for row in rows}):
        places = [place for place, row in enumerate(rows) if fold_of.get(row.group, 0) == fold]
        left = [row for row in train if fold_of.get(row.group) != fold]  # fold 0: rows that are no training rows
        began = clock()
        baseline = make_baseline(candidate.method, left)
        building += clock() - began
        given |= dict(zip(places, baseline.generate([asked[place] for place in places]), strict=True))
    return [given[place] for place in range(len(rows))], building
