"""What trainings state, and searches for prompts and training settings."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, JsonValue

from tunesmith.core.values import Omitted
from tunesmith.records.body import Body, Part
from tunesmith.records.candidate import Retrieve
from tunesmith.records.dataset import IfAny

Several = Annotated[int, Field(exclude_if=lambda number: number == 1)]


class RecordedSettings(Part):
    """The settings of `train:`, of which these are read again. budget: in seconds. canaries: None where none were
    planted. permute_answers: a control, whose rows have each other's answers."""

    method: str
    epochs: int
    batch: int
    budget: float | None = None
    schedule: str | None = None
    rank: int | None = None
    rehearse: float = 0.0
    canaries: Mapping[str, JsonValue] | None = None
    permute_answers: bool = False


class Environment(Part):
    """What a training's bytes depend on besides its input. Its engine adds its own keys. copies: of the model."""

    kernel_revision: int
    threads: int
    torch: str
    transformers: str
    machine: str
    processor: str
    ranks: Several = 1
    copies: Several = 1


class Estimate(Part):
    """Seconds of the whole training, and of a step without validation; the most bytes of memory needed at once; bytes
    of a checkpoint."""

    seconds: float
    step_seconds: float
    peak_memory_bytes: int
    checkpoint_bytes: int


class TrainedStep(Part):
    """A step. tokens: that it computed."""

    step: int
    loss: float
    learning_rate: float
    tokens: int
    seconds: float


class ValidationPoint(Part):
    """A validation after a step. probability: the mean of the expected answers' tokens, which earlier versions did not
    measure. score, score_error: of answers, where they were scored, and its standard error."""

    step: int
    loss: float
    probability: Omitted[float] = None
    score: Omitted[float] = None
    score_error: Omitted[float] = None


class Overfit(Part):
    """A validation with a higher loss than the lowest before it, although the training loss has fallen since."""

    step: int
    loss: float
    training_loss: float
    lowest_step: int
    lowest_loss: float
    lowest_training_loss: float


class ValidationScore(Part):
    """What answers to validation rows are scored by, and how many of them."""

    metric: str
    rows: int


class Decay(Part):
    """The learning rate falls from step `start` to zero at step `stop`, where the training ends."""

    start: int = Field(ge=0)
    stop: int = Field(ge=1)
    reason: str


class Decisions(Part):
    """What a training decided while it ran, in steps.

    warmup: steps in which the rate rises. validate_every: steps from one validation to the next. scored_rows:
    validation rows that are answered and scored each time; 0: none (see TrainerState.best). seconds: before the first
    step, for measuring and for what is rehearsed. validation_seconds: of one validation, as expected within a
    budget; earlier versions did not say it. rehearsed: answers that were drawn to be rehearsed. decays: each
    replaces the one before it from its start on.
    """

    warmup: int = Field(ge=0)
    validate_every: int = Field(ge=1)
    scored_rows: int = Field(ge=0)
    seconds: float = Field(ge=0)
    validation_seconds: Omitted[float] = None
    rehearsed: int = Field(default=0, ge=0)
    decays: tuple[Decay, ...] = ()


class TrainingFigures(Part):
    """What a training did.

    rows: of one epoch, without what it rehearses. rehearsed: answers of the base that were drawn for that. epochs:
    done, a fraction where the last one was not. tokens, labels: of the rows, over the epochs done; labels count for the
    loss. tokens_computed: with what is rehearsed, shared prefixes once. parameters: trained numbers. base_parameters:
    numbers of the base's weights, 0 if they were not counted. final_loss: the mean of the last twentieth of the steps.
    kept: the step whose weights were kept. score: None where no answers were scored. decisions: what a schedule decided
    while it ran, None where it was planned. overfitting: where the validation loss rose again. notices: what people
    should know of it.
    """

    examples_per_second: float
    tokens_per_second: float
    seconds: float
    peak_memory_bytes: int
    checkpoint_bytes: int
    estimate: Estimate
    final_loss: float
    rows: int
    rehearsed: int
    epochs: float
    steps: int
    kept: int
    tokens: int
    tokens_computed: int
    labels: int
    parameters: int
    base_parameters: IfAny[int] = 0
    validation: tuple[ValidationPoint, ...]
    score: ValidationScore | None
    decisions: Decisions | None
    notices: tuple[str, ...]
    overfitting: tuple[Overfit, ...]


class TrainingBody(TrainingFigures, Body):
    """A training that has ended.

    splits: of the dataset version, that could be read. fingerprint: of the base's rendering. ended: why it stopped
    before the end of its plan.
    """

    kind: ClassVar = "training"

    settings: RecordedSettings
    splits: tuple[str, ...] = ()
    fingerprint: str
    threads: int
    engine: str
    environment: Environment
    curve: tuple[TrainedStep, ...]
    ended: str | None

    @property
    def line(self) -> str:
        """Its length and its loss."""
        return f"{self.steps} steps, loss {self.final_loss:.5g}"


class PromptTry(Part):
    """A prompt with shots and retrieval, tried on validation rows.

    shots: ids of training rows. how: they were chosen: fixed, diverse, drawn N or none. rows: that it answered before
    it was given up. why: it could not answer more. mean: of the scores. tokens and seconds: of all its answers.
    """

    prompt: str
    shots: tuple[str, ...]
    how: str
    mean: float
    prompt_tokens: int
    completion_tokens: int
    seconds: float
    retrieve: Retrieve | None = None
    rows: int | None = None
    why: str | None = None


class SearchBody(Body):
    """Every prompt and choice of shots and retrieval that was tried on validation rows.

    settings: the project file's. rows: how many were asked in each whole try. budget: answers in all. best: the place
    of the best one. cost: of the endpoints' answers. ended: what was used up: calls, cost, choices or rewrites (GEPA).
    """

    kind: ClassVar = "search"

    settings: Mapping[str, Any]
    split: Literal["validation"]
    rows: int
    budget: int
    seconds: float
    tries: tuple[PromptTry, ...]
    best: int
    cost: float = 0.0
    ended: str = "choices"

    @property
    def line(self) -> str:
        return f"{len(self.tries)} tries of up to {self.rows} validation rows"


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


class BreakEven(Part):
    """From how many requests on a candidate is cheaper than its rival, its training paid.

    training: what that cost. requests: None where it saves nothing, so that its training is never repaid.
    """

    training: float
    saved_per_1000: float
    requests: int | None


class ForecastBody(Body):
    """Of earlier versions: what a training on all rows was expected to give, and whether to train. name: the
    candidate."""

    kind: ClassVar = "forecast"

    name: str
    decision: str | None = None

    @property
    def line(self) -> str:
        return f"{self.name}: {self.decision or 'no decision'}"


class CurveBody(Body):
    """Of earlier versions: trainings on subsets of the rows, from which a forecast was made. name: the candidate."""

    kind: ClassVar = "curve"

    name: str

    @property
    def line(self) -> str:
        return self.name
