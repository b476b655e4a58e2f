"""What answers state: of a candidate to rows, policy requests or a probe's items, and of a judge about answers."""

from __future__ import annotations

from typing import ClassVar

from tunesmith.core.view import Omitted
from tunesmith.records.body import Body, Part


class Judge(Part):
    """A model that judged answers, and what it was asked."""

    url: str
    model: str
    question: str


class TimeEstimate(Part):
    """Seconds that were estimated from the first answers."""

    seconds: float


class AnswersBody(Body):
    """Which requests were answered, by which engine, how many tokens that took and how long.

    suite: the split of the rows; "general"; a probe's suite; "policy"; "style"; or judge:METRIC and policy:CHECK for a
    judge's replies. served_by: the models that an endpoint named. undecodable, uncopied: reference answers that
    decoding keeps the candidate from giving. rows: the most that the style gate asks. left_out: answers that are calls
    of functions. revision: of the probe.
    """

    kind: ClassVar = "answers"

    suite: str
    n: int
    seconds: float
    engine: Omitted[str] = None
    estimate: Omitted[TimeEstimate] = None
    prompt_tokens: Omitted[int] = None
    completion_tokens: Omitted[int] = None
    served_by: Omitted[tuple[str, ...]] = None
    undecodable: Omitted[int] = None
    uncopied: Omitted[int] = None
    judge: Omitted[Judge] = None
    rows: Omitted[int] = None
    revision: Omitted[int] = None
    left_out: Omitted[int] = None

    @property
    def line(self) -> str:
        return f"{self.suite}, {self.n} answers"
