"""The suite of general ability: 450 short questions with four choices each, asked before and after tuning.

There are 90 questions each on facts, arithmetic, language, common sense and following instructions, in `general.jsonl`
(Apache-2.0). A question's score is the probability of the right choice among the four. It changes long before the most
probable choice does, so the suite shows a small loss within seconds.

A choice's log-probability is the sum over its tokens and the end of the turn, without a correction for length: the
choices of a question have similar lengths, and a preference for short texts cancels between two sets of weights.
"""

from __future__ import annotations

import json
from functools import cache
from importlib import resources

from pydantic import BaseModel, ConfigDict

from tunesmith.core.digests import digest_bytes
from tunesmith.core.messages import Message
from tunesmith.evaluation.probes.numbers import log_probabilities, shares


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


def right_share(scores: object, question: GeneralQuestion) -> float:
    """The probability of the right choice among the choices, from 0 to 1.

    scores: a log-probability for each choice. Raises Inconclusive for anything else.
    """
    return shares(log_probabilities(scores, len(question.choices), question.id))[question.right]


@cache
def _packaged() -> bytes:
    return (resources.files("tunesmith.evaluation.probes") / "general.jsonl").read_bytes()
