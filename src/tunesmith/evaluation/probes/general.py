"""General ability before and after tuning: 150 short questions with four choices each, written for this suite.

Facts, arithmetic, language, common sense, following instructions; 30 of each, in `general.jsonl` (Apache-2.0). A model
is not asked to write: the log-probability it gives to each choice is measured, and a question's score is the share of
the right one. That moves long before the likeliest choice changes, so a few seconds of measuring show a small loss.

Log-probabilities are summed over a choice's tokens, its end included, and not divided by length: the choices of one
question are of similar length, and what counts is the difference between two sets of weights on the same question, in
which a preference for short texts cancels.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from functools import cache
from importlib import resources

from pydantic import BaseModel, ConfigDict

from tunesmith.core.digests import digest_bytes
from tunesmith.core.errors import Inconclusive
from tunesmith.core.messages import Message

# A log-probability computed in half precision can come out a hair above 0.
_ROUNDING = 1e-3


class GeneralQuestion(BaseModel):
    """One question. right is the index of the right choice."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    id: str
    area: str
    messages: tuple[Message, ...]
    choices: tuple[str, ...]
    right: int


def general_questions() -> list[GeneralQuestion]:
    """The packaged suite, in its order."""
    questions = []
    for line in _packaged().splitlines():
        row = json.loads(line)
        asked = Message(role="user", content=row.pop("question"))
        questions.append(GeneralQuestion(messages=(asked,), **row))
    return questions


def general_digest() -> str:
    """The digest of the suite's file: scores of two suites are not compared."""
    return digest_bytes(_packaged())


def right_share(log_probabilities: Sequence[object], question: GeneralQuestion) -> float:
    """The probability of the right choice among the choices, from 0 to 1. Raises Inconclusive for unusable numbers.

    log_probabilities: one a choice, natural logarithm, not above 0.
    """
    if len(log_probabilities) != len(question.choices):
        raise Inconclusive(f"{len(log_probabilities)} scores for {len(question.choices)} choices", where=question.id)
    numbers = []
    for value in log_probabilities:
        if (
            isinstance(value, bool)
            or not isinstance(value, int | float)
            or not math.isfinite(value)
            or value > _ROUNDING
        ):
            raise Inconclusive(f"{value!r} is not a log-probability", where=question.id)
        numbers.append(float(value))
    # Against the largest, so that exp neither overflows nor gives all zeros.
    peak = max(numbers)
    weights = [math.exp(number - peak) for number in numbers]
    return weights[question.right] / math.fsum(weights)


@cache
def _packaged() -> bytes:
    return (resources.files("tunesmith.evaluation.probes") / "general.jsonl").read_bytes()
