"""Says which reference answers the task's scorers can score against, so that the build keeps no others."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Self

from tunesmith.core.reading.strict_json import NotJson, parse_json
from tunesmith.evaluation.metrics.declared import Declared, GrammarScorer, LabelScorer, NumberScorer, metric_of
from tunesmith.evaluation.metrics.scorers import NEED_JSON

_PICKY = GrammarScorer | LabelScorer | NumberScorer
_BY_NAME: tuple[Declared, ...] = tuple(sorted(NEED_JSON))


@dataclass(frozen=True, slots=True)
class References:
    """The check of a row's answer by the scorers that not every answer suits. scorers: only those."""

    scorers: tuple[Declared, ...] = ()

    @classmethod
    def of(cls, scorers: Sequence[Declared]) -> Self:
        """The check by those of a task's scorers that need JSON, a label, a number or a grammar's text."""
        return cls(tuple(one for one in scorers if isinstance(one, _PICKY) or one in _BY_NAME))

    def __call__(self, answer: str) -> str | None:
        """Why an answer cannot be a reference, in a few words; None where every scorer can score against it."""
        unsuited = (metric_of(one) for one in self.scorers if not _suits(one, answer))
        return next((f"answer that {metric} cannot score" for metric in unsuited), None)

    def as_json(self) -> list[Any]:
        """What the check depends on."""
        return [one if isinstance(one, str) else one.model_dump(mode="json") for one in self.scorers]


def _suits(scorer: Declared, answer: str) -> bool:
    if not isinstance(scorer, str):
        return scorer.suits(answer)
    try:
        parse_json(answer)
    except NotJson:
        return False
    return True
