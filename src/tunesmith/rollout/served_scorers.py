"""How served answers are scored: which of the task's scorers service can apply, and which metrics it measures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from tunesmith.core.errors import UsageError
from tunesmith.evaluation.metrics.declared import (
    CONTEXT_SCORERS,
    DeclaredScorer,
    GrammarScorer,
    JudgeScorer,
    PatternScorer,
    Scoring,
    make_scoring,
    metric_of,
)
from tunesmith.evaluation.metrics.scorers import Schema
from tunesmith.rollout.settings import Step

_FREE = PatternScorer | GrammarScorer  # need no reference


class ServedScorers(NamedTuple):
    """How served answers are scored. every_answer: scorers that need no reference answer, by metric.

    with_reference: scorers that need the expected answer, which feedback gives. unmeasured: metric -> why service
    cannot apply its scorer.
    """

    every_answer: Mapping[str, Scoring] = {}
    with_reference: Mapping[str, Scoring] = {}
    unmeasured: Mapping[str, str] = {}


def served_scorers(scorers: Sequence[str | DeclaredScorer], schema: Schema, root: Path) -> ServedScorers:
    """Sort the task's scorers by what they need. schema: of JSON answers. root: the project's folder.

    Raises UsageError for a function scorer whose file cannot be run.
    """
    unmeasured, free, others = dict[str, str](), dict[str, Scoring](), dict[str, Scoring]()
    for scorer in scorers:
        metric = metric_of(scorer)
        if reason := _unmeasured(scorer):
            unmeasured[metric] = reason
        else:
            needs_none = metric == "json_valid" or isinstance(scorer, _FREE)
            (free if needs_none else others)[metric] = make_scoring(scorer, schema, root)
    return ServedScorers(every_answer=free, with_reference=others, unmeasured=unmeasured)


def check_analyses(scorers: Sequence[str | DeclaredScorer], steps: Sequence[Step]) -> None:
    """Raise UsageError where an analysis of a rollout needs a metric that service does not measure."""
    # Other metrics that task.scorers does not list may come with feedback.
    reasons = {"json_valid": "task.scorers does not list it"} | {metric_of(each): _unmeasured(each) for each in scorers}
    for number, step in enumerate(steps, start=1):
        if step.analysis is not None and (reason := reasons.get(step.analysis.metric)):
            raise UsageError(
                f"step {number} analyses {step.analysis.metric}, which service does not measure: {reason}",
                where="rollout.steps",
                fix="write rollout.steps with a metric that is measured: success_rate (whether requests are answered), "
                "or one of task.scorers that feedback can score",
            )


def _unmeasured(scorer: str | DeclaredScorer) -> str | None:
    if isinstance(scorer, JudgeScorer):
        return "it asks a judge model, and service sends served texts nowhere"
    if metric_of(scorer) in CONTEXT_SCORERS:
        return "it needs the retrieved texts, which service does not keep"
    return None
