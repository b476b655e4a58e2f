"""The scorers of the task that service can apply to served answers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

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
from tunesmith.project import Project
from tunesmith.rollout.settings import Step

_FREE = PatternScorer | GrammarScorer  # need no reference


@dataclass(frozen=True, slots=True)
class ServedScorers:
    """How served answers are scored. every_answer: scorers that need no reference answer, by metric.

    with_reference: scorers that need the expected answer, which feedback gives. unmeasured: metric -> why service
    cannot apply its scorer.
    """

    every_answer: Mapping[str, Scoring] = field(default_factory=dict)
    with_reference: Mapping[str, Scoring] = field(default_factory=dict)
    unmeasured: Mapping[str, str] = field(default_factory=dict)


def served_scorers(scorers: Sequence[str | DeclaredScorer], schema: Schema, root: Path) -> ServedScorers:
    """Sort the task's scorers by what they need. schema: of JSON answers. root: the project's folder.

    Raises UsageError for a function scorer whose file cannot be run.
    """
    reasons = {metric_of(scorer): reason for scorer in scorers if (reason := _unmeasured(scorer)) is not None}
    known = {metric_of(scorer): scorer for scorer in scorers if metric_of(scorer) not in reasons}
    free = {metric for metric, scorer in known.items() if metric == "json_valid" or isinstance(scorer, _FREE)}
    scoring = {metric: make_scoring(scorer, schema, root) for metric, scorer in known.items()}
    return ServedScorers(
        every_answer={metric: scoring[metric] for metric in scoring if metric in free},
        with_reference={metric: scoring[metric] for metric in scoring if metric not in free},
        unmeasured=reasons,
    )


def check_analyses(project: Project, steps: Sequence[Step]) -> None:
    """Raise UsageError where an analysis of a rollout needs a metric that service does not measure."""
    scorers = project.settings.task.scorers
    reasons = {metric_of(each): reason for each in scorers if (reason := _unmeasured(each))}
    if "json_valid" not in map(metric_of, scorers):
        reasons["json_valid"] = "task.scorers does not list it"
    for number, step in enumerate(steps, start=1):
        if step.analysis is not None and step.analysis.metric in reasons:
            metric = step.analysis.metric
            raise UsageError(
                f"step {number} analyses {metric}, which service does not measure: {reasons[metric]}",
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
