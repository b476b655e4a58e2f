"""The stages in order: what is stale, what is skipped, where to resume. The only place that knows them all.

stages.py runs one; walk.py has what they share; then, each asking for what stands before it: training.py,
candidates.py, answers.py, probes.py, verdicts.py, and verbs.py for whoever calls.
"""

from tunesmith.pipeline.answers import plan
from tunesmith.pipeline.api import (
    build_data,
    evaluate,
    find_rate,
    gate,
    latest_evaluation,
    latest_verdict,
    register,
    run,
    train,
    training_document,
)
from tunesmith.pipeline.candidates import answerer, candidate
from tunesmith.pipeline.context import PipelineContext

__all__ = [
    "PipelineContext",
    "answerer",
    "build_data",
    "candidate",
    "evaluate",
    "find_rate",
    "gate",
    "latest_evaluation",
    "latest_verdict",
    "plan",
    "register",
    "run",
    "train",
    "training_document",
]
