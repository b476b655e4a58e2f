"""Settings of a training: its data, its steps and its schedule. Which weights move is in engines.settings."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from tunesmith.core.values import Duration, Settings
from tunesmith.engines.settings import WeightSettings

LEAST_TOKENS = 64  # lowest bound on the tokens computed at once
# With fewer validation rows than this a score says too little to choose by: one row is more than three points.
LEAST_SCORED = 30
PROBABILITY = "the probability of the expected answers"
UNSCORED = f"validating by {PROBABILITY}"
WARMUP = 0.05  # share of the steps, by default
MOST_WARMUP = 100  # steps of that share within a budget: most trainings end long before the most steps that fit in
LONGEST_BUDGET = 30 * 24 * 3600  # seconds
# Defaults of trainings that have a budget. They do not count as stated.
_WITH_BUDGET = {"schedule": "wsd", "decay": 0.9, "validations": 6}
_RATES = {"lora": 1e-3, "full": 1e-4}


class MetricsSettings(Settings):
    """Where the curves of running trainings are shown, in addition to their records. No training depends on it."""

    tensorboard: str | None = Field(
        default=None,
        description="folder for TensorBoard event files, one run per training; needs `tunesmith[tensorboard]`",
    )
    mlflow: str | None = Field(
        default=None,
        description="MLflow tracking URI, such as sqlite:///mlflow.db or http://host; needs `tunesmith[mlflow]`",
    )
    experiment: str = Field(default="tunesmith", min_length=1, description="MLflow experiment that the runs belong to")

    @model_validator(mode="after")
    def _one_place(self) -> MetricsSettings:
        if (self.tensorboard is None) == (self.mlflow is None):
            raise ValueError("set either tensorboard or mlflow")
        if self.tensorboard is not None and "experiment" in self.model_fields_set:
            raise ValueError("experiment applies to MLflow only: leave it out with tensorboard")
        return self


class CanarySettings(Settings):
    """Rows with random secrets, added to measure what the model memorises. Such a candidate is not for service."""

    each: int = Field(default=20, ge=1, le=500, description="number of canaries for each entry of repeats")
    repeats: tuple[Annotated[int, Field(ge=1, le=100)], ...] = Field(
        default=(1, 4, 16),
        min_length=1,
        description="how many times a canary is added to the rows, one entry per group",
    )
    controls: int = Field(default=128, ge=100, le=10_000, description="number of canaries that are never added")
    seed: int = Field(default=0, ge=0, lt=2**31, description="seed of the secrets and of which ones are added")

    @property
    def added(self) -> int:
        """How many rows they add to the training rows."""
        return self.each * sum(self.repeats)


class TrainSettings(WeightSettings):
    """`train:` of a candidate. The defaults follow "LoRA Without Regret" (Schulman et al. 2025): every linear layer,
    and a learning rate about ten times that of full fine-tuning."""

    learning_rate: Annotated[
        float,
        Field(
            gt=0,
            lt=1,
            default_factory=lambda given: _RATES.get(given.get("method", ""), 1e-3),
            description="peak learning rate, reached after the warm-up. Default: 0.001, or 0.0005 for bases that are "
            "wider than 1,024 or not of Llama's family; 0.0001 with method: full",
        ),
    ]
    rows: int | None = Field(
        default=None, ge=1, description="train on this many rows, drawn by the seed. Default: all rows"
    )
    permute_answers: bool = Field(
        default=False,
        description="train a control whose answers are shuffled among the requests: it can only learn their form. "
        "Of a conversation it learns the last answer alone",
    )
    loss_on: Literal["assistant", "last", "all"] = Field(
        default="assistant",
        description="tokens to learn: every assistant turn, the last assistant turn, or the whole conversation. "
        "Turns of weight 0 are never learned, nor are the answers of shots and retrieved examples",
    )
    canaries: CanarySettings | None = Field(
        default=None, description="add canary rows for the probe `canaries`; versions of such a training are marked"
    )
    rehearse: float = Field(
        default=0.0,
        strict=True,  # or `true` would be all of the rows
        ge=0,
        le=1,
        description="add so many general requests with the base's own answers to each epoch, as a share of the "
        "rows, one at least: the model keeps more of what the base does beside the task",
    )
    budget: Duration | None = Field(
        default=None,
        gt=0,
        le=LONGEST_BUDGET,
        description="train for at most this long, such as 20m or 1h30m. Where not all epochs fit, there are fewer "
        "steps, and the learning rate still falls to zero by the last one. It counts steps, validations, checkpoints, "
        "and before the first step the answers that are timed and those to rehearse, but neither loading nor the three "
        "steps from which the estimate is made",
    )
    epochs: int = Field(
        default=3,
        ge=1,
        le=100,
        description="passes over the training rows. Default: 3, and up to 20 for fewer than 1,000 rows, or up to 5 "
        "where the primary metric compares sentences",
    )
    batch: int = Field(default=8, ge=1, le=4096, description="rows per step")
    tokens: int = Field(
        default=4096,
        ge=LEAST_TOKENS,
        description="most tokens computed at once; a larger step is computed in parts whose gradients are summed",
    )
    warmup: float = Field(
        default=WARMUP,
        ge=0,
        lt=1,
        description=f"share of the steps in which the learning rate rises. Default: {WARMUP:g}, within a budget at "
        f"most {MOST_WARMUP} steps; any other share holds as it is",
    )
    schedule: Literal["cosine", "linear", "constant", "wsd"] = Field(
        default="cosine",
        description="learning rate schedule after the warm-up. wsd (warm-up, stable, decay) stays constant, then "
        "falls linearly to zero; it is the only one that fits a budget, and the default there",
    )
    decay: float = Field(
        default=0.25, ge=0.01, le=0.9, description="share of the steps in which the learning rate falls; wsd only"
    )
    weight_decay: float = Field(
        default=0.0, ge=0, lt=1, description="weight decay of AdamW; norms and biases are exempt"
    )
    clip: float = Field(default=1.0, gt=0, description="gradients are scaled down to at most this norm")
    seed: int = Field(
        default=0, ge=0, lt=2**31, description="seed of the adapter's start, the chosen rows and their order"
    )
    max_length: int = Field(default=1024, ge=16, description="most tokens of a training row, prompt included")
    validate_by: Literal["score", "loss"] = Field(
        default="score",
        description="what better means for keep. score: the primary metric over generated "
        "answers to the validation rows; where it is within one standard error of the highest, a higher "
        "probability of the expected answers' tokens counts as better, too. loss: no answers are generated; that "
        "probability, which is computed with the loss, decides alone, as it does where the validation rows are too "
        "few or the metric is a judge's",
    )
    validations: int = Field(
        default=4,
        ge=1,
        le=100,
        description="how many times to validate, about. Default with a budget: "
        f"{_WITH_BUDGET['validations']}, or fewer where they take long",
    )
    keep: Literal["best", "last"] = Field(
        default="best", description="keep the weights of the best validation, or those of the last step"
    )
    validation_rows: int = Field(default=200, ge=1, description="use at most this many rows to validate")
    checkpoint_seconds: float = Field(
        default=30.0,
        gt=0,
        description="least seconds between checkpoints; a killed training repeats the work since the last",
    )

    @model_validator(mode="before")
    @classmethod
    def _one_length(cls, given: Any) -> Any:
        if isinstance(given, dict) and given.get("budget") is not None and given.get("schedule", "wsd") != "wsd":
            raise ValueError("a budget needs schedule: wsd, which can end at any step: leave schedule out")
        return given

    @model_validator(mode="after")
    def _with_budget(self) -> TrainSettings:
        if self.budget is not None:
            for name in _WITH_BUDGET.keys() - self.model_fields_set:
                object.__setattr__(self, name, _WITH_BUDGET[name])  # of a frozen model that is still being made
        return self


# Measured on a base of width 576 (`python benchmarks/study.py --table`): with four times the rate for B, which starts
# at zero (LoRA+), 1,000 rows of slots give 7 points more.
_B_RATE = 4.0
# Wider bases and other families want lower rates: Tinker's documentation ("Supervised learning: hyperparameters", 2025)
# has 0.0005 for Llama's family at a width of 2000, and for Qwen at nearly any. Qwen2.5-Coder-0.5B diverges at 0.001
# with four times that for B.
_WIDEST = 1024
# The same table: how often rows are read before more epochs bring no more than chance.
MANY_ROWS = 1000  # from here on, rows are read as seldom as it gets
_LEAST_EPOCHS, _MOST_EPOCHS = 3, 20
_SELDOM = 5  # epochs at most, where answers are sentences or rows have tools


def fit_to_rows(settings: TrainSettings, rows: int, width: int | None, *, seldom: bool = False) -> TrainSettings:
    """The settings with the epochs for so many rows and the rate of B for the base, where they state none.

    Rows are read three times, and fewer than 1,000 more often, up to twenty times, or five where answers are sentences
    or rows have tools. B has four times the rate. Other bases than those that were measured, narrow ones of Llama's
    family, learn at half the rate, A and B alike. Where `learning_rate` or `b_rate` is stated, both are as stated or as
    their defaults, and so they are for adapters that were not measured: PiSSA, rsLoRA, DoRA. Canaries are among the
    rows but do not count: a training with them shows what the training without them memorises. width: of the hidden
    states of a base of Llama's family, None for others. seldom: whether the primary metric compares sentences, or most
    rows have tools.
    """
    if settings.canaries:
        rows -= settings.canaries.added
    if "epochs" not in settings.model_fields_set:
        most = _SELDOM if seldom else _MOST_EPOCHS
        epochs = round(min(most, _LEAST_EPOCHS * max(1, MANY_ROWS / rows)))
        settings = settings.model_copy(update={"epochs": epochs})
    stated = settings.model_fields_set & {"learning_rate", "b_rate"}
    plain = settings.method == "lora" and (settings.start, settings.scaling, settings.dora) == ("zero", "rank", False)
    if stated or not plain:
        return settings
    measured = width is not None and width <= _WIDEST
    return settings.model_copy(update={"b_rate": _B_RATE} if measured else {"learning_rate": _RATES["lora"] / 2})
