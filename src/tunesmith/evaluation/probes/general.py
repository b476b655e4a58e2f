"""The suite of general ability: 150 short questions with four choices each, asked before and after tuning.

There are 30 questions each on facts, arithmetic, language, common sense and following instructions, in `general.jsonl`
(Apache-2.0). A question's score is the probability of the right choice among the four. It changes long before the most
probable choice does, so the suite shows a small loss in a few seconds.

A choice's log-probability is the sum over its tokens and the end of the turn, without a correction for length: the
choices of a question have similar lengths, and a preference for short texts cancels between two sets of weights.
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

# In half precision a log-probability can come out slightly above 0.
_ROUNDING = 1e-3


class GeneralQuestion(BaseModel):
    """One question. right: the index of the right choice."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    id: str
    area: str
    messages: tuple[Message, ...]
    choices: tuple[str, ...]
    right: int


def general_questions() -> list[GeneralQuestion]:
    """The packaged questions in the file's order."""
    questions = []
    for line in _packaged().splitlines():
        row = json.loads(line)
        asked = Message(role="user", content=row.pop("question"))
        questions.append(GeneralQuestion(messages=(asked,), **row))
    return questions


def general_digest() -> str:
    """The digest of the suite's file. Scores with different digests are not compared."""
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
    # Relative to the largest, so that exp neither overflows nor gives only zeros.
    peak = max(numbers)
    weights = [math.exp(number - peak) for number in numbers]
    return weights[question.right] / math.fsum(weights)


@cache
def _packaged() -> bytes:
    return (resources.files("tunesmith.evaluation.probes") / "general.jsonl").read_bytes()
