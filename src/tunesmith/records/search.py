"""What searches for prompts and for training settings state."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Literal

from tunesmith.records.body import Body, Part


class PromptTry(Part):
    """A prompt with shots, tried on validation rows.

    shots: ids of training rows. how: they were chosen: fixed, diverse, drawn N or none. mean: of the scores. tokens and
    seconds: of all its answers.
    """

    prompt: str
    shots: tuple[str, ...]
    how: str
    mean: float
    prompt_tokens: int
    completion_tokens: int
    seconds: float


class SearchBody(Body):
    """Every prompt and choice of shots that was tried on validation rows.

    settings: the project file's. rows: how many were asked in each try. budget: answers in all. best: the place of the
    best try among the tries.
    """

    kind: ClassVar = "search"

    settings: Mapping[str, Any]
    split: Literal["validation"]
    rows: int
    budget: int
    seconds: float
    tries: tuple[PromptTry, ...]
    best: int

    @property
    def line(self) -> str:
        return f"{len(self.tries)} tries of {self.rows} validation rows"
