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


class SettingsTrial(Part):
    """Settings that were tried; trial 0 has the present ones. params: as Optuna drew them; settings: the same, to write
    under `train:`. why: it failed. reports: the mean probability of the expected answers' tokens at each validation;
    probability: at the end. score: None where answers were not scored."""

    number: int
    params: Mapping[str, Any]
    settings: Mapping[str, Any]
    outcome: Literal["complete", "pruned", "failed"]
    why: str | None
    seconds: float
    reports: tuple[float, ...]
    probability: float | None
    score: float | None


class SettingsDifference(Part):
    """The best trial minus the present settings. p: of a permutation test over groups of validation rows, times the
    number of other settings. real: whether p is at most 0.05."""

    mean: float
    p: float
    real: bool


class ComparedTrials(Part):
    """by: what complete trials are compared by, score or probability (of the expected answers). best: the number of the
    best trial, None where none is complete. suggestion: settings to write under `train:`; None where the present ones
    should stay."""

    by: Literal["score", "probability"]
    best: int | None
    difference: SettingsDifference | None
    suggestion: Mapping[str, Any] | None


class TrainingSearchBody(ComparedTrials, Body):
    """Training settings that were tried on validation rows, and how the best differs from the present ones.

    planned: trials; fewer were run where the time `within` was used. splits: the rows that it could read. scored_rows:
    validation rows that each complete trial answered; unscored: why none were.
    """

    kind: ClassVar = "training_search"

    method: str
    candidate: str
    planned: int
    within: float | None
    splits: tuple[str, ...]
    validation_rows: int
    metric: str
    scored_rows: int
    unscored: str | None
    trials: tuple[SettingsTrial, ...]

    @property
    def line(self) -> str:
        return f"{len(self.trials)} settings on {self.validation_rows} rows"
