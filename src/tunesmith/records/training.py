"""What trainings state."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, ClassVar

from pydantic import Field, JsonValue

from tunesmith.core.values import Omitted
from tunesmith.records.body import Body, Part

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
    step, for measuring and for what is rehearsed. rehearsed: answers that were drawn for that. decays: each replaces
    the one before it from its start on.
    """

    warmup: int = Field(ge=0)
    validate_every: int = Field(ge=1)
    scored_rows: int = Field(ge=0)
    seconds: float = Field(ge=0)
    rehearsed: int = Field(default=0, ge=0)
    decays: tuple[Decay, ...] = ()


class TrainingFigures(Part):
    """What a training did.

    rows: of one epoch, without what it rehearses. rehearsed: answers of the base that were drawn for that. epochs:
    done, a fraction where the last one was not. tokens, labels: of the rows, over the epochs done; labels count for the
    loss. tokens_computed: with what is rehearsed, shared prefixes once. parameters: trained numbers. final_loss: the
    mean of the last twentieth of the steps. kept: the step whose weights were kept. score: None where no answers were
    scored. decisions: what a schedule decided while it ran, None where it was planned. overfitting: where the
    validation loss rose again. notices: what people should know of it.
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
