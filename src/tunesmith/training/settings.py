"""What a training can be told."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, SerializerFunctionWrapHandler, model_serializer, model_validator

from tunesmith.core.settings import Settings

# The linear layers of models.network.GROUPS; written out, because reading settings must not import torch.
TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
# What is of an adapter alone.
_LORA_ONLY = ("rank", "alpha", "targets", "scaling", "start", "dora", "b_rate")
LEAST_TOKENS = 64  # of a part of a step
_RATES = {"lora": 1e-3, "full": 1e-4}


class MetricsSettings(Settings):
    """Where trainings are shown while they run, besides their records. No training depends on it."""

    tensorboard: Annotated[
        str | None, Field(description="a folder for TensorBoard's event files, a run each; `tunesmith[tensorboard]`")
    ] = None
    mlflow: Annotated[
        str | None,
        Field(description="an MLflow tracking URI, such as sqlite:///mlflow.db or a server's; `tunesmith[mlflow]`"),
    ] = None
    experiment: Annotated[str, Field(min_length=1, description="the MLflow experiment its runs belong to")] = (
        "tunesmith"
    )

    @model_validator(mode="after")
    def _one_place(self) -> MetricsSettings:
        if (self.tensorboard is None) == (self.mlflow is None):
            raise ValueError("say tensorboard or mlflow, one of the two")
        if self.tensorboard is not None and "experiment" in self.model_fields_set:
            raise ValueError("experiment is MLflow's: leave it out with tensorboard")
        return self


class CanarySettings(Settings):
    """Rows with secrets planted to measure what is remembered: of a candidate trained for that, not for service."""

    each: Annotated[int, Field(ge=1, le=500, description="how many canaries are planted at each count")] = 20
    repeats: Annotated[
        tuple[Annotated[int, Field(ge=1, le=100)], ...],
        Field(min_length=1, description="how often a canary is planted, by kind"),
    ] = (1, 4, 16)
    controls: Annotated[int, Field(ge=100, le=10_000, description="canaries that are never planted")] = 128
    seed: Annotated[int, Field(ge=0, lt=2**31, description="of the secrets and of which are planted")] = 0


class TrainSettings(Settings):
    """`train:` of a candidate. The defaults follow "LoRA Without Regret" (Schulman et al. 2025): every linear layer,
    and a learning rate about ten times that of full fine-tuning."""

    method: Annotated[
        Literal["lora", "full"],
        Field(description="train an adapter of low rank, or the weights themselves: norms, embeddings and head too"),
    ] = "lora"
    rank: Annotated[int, Field(ge=1, le=1024, description="the adapter's rank")] = 16
    alpha: Annotated[float | None, Field(gt=0, description="scale of the adapter times its rank; twice the rank")] = (
        None
    )
    targets: Annotated[
        tuple[str, ...],
        Field(
            min_length=1,
            description="linear layers to adapt: all, or the base's names, such as q_proj, or patterns: [qv]_proj",
        ),
    ] = ("all",)
    scaling: Annotated[
        Literal["rank", "root"],
        Field(description="divide alpha by the rank, or by its square root (rsLoRA), which keeps high ranks learning"),
    ] = "rank"
    start: Annotated[
        Literal["zero", "pissa"],
        Field(
            description="where the adapter begins: at no change, A drawn and B zero; or at the weight's principal "
            "singular vectors (PiSSA), released as an adapter of twice the rank for the same base"
        ),
    ] = "zero"
    dora: Annotated[bool, Field(description="train the length of each adapted row beside its direction (DoRA)")] = False
    layers: Annotated[
        int | None,
        Field(ge=1, description="train the last so many layers, nothing else; all where left out"),
    ] = None
    learning_rate: Annotated[
        float,
        Field(
            gt=0,
            lt=1,
            default_factory=lambda given: _RATES.get(given.get("method", ""), 1e-3),
            description="the highest one, reached after the warm-up; 0.001 where left out, 0.0001 with method: full",
        ),
    ]
    b_rate: Annotated[
        float,
        Field(ge=1, le=64, description="B's learning rate as a multiple of A's (LoRA+; its authors take 16)"),
    ] = 1.0
    rows: Annotated[
        int | None, Field(ge=1, description="train on so many rows, drawn by the seed; all of them where left out")
    ] = None
    permute_answers: Annotated[
        bool,
        Field(description="a control: deal the answers to the wrong requests; what it scores comes of form alone"),
    ] = False
    loss_on: Annotated[
        Literal["assistant", "last", "all"],
        Field(
            description="what is learned: every assistant turn, the last of them, or each token of the conversation; "
            "a turn of weight 0 never is"
        ),
    ] = "assistant"
    canaries: Annotated[
        CanarySettings | None,
        Field(description="plant canaries among the rows, for the probe `canaries`; the version is marked"),
    ] = None
    epochs: Annotated[int, Field(ge=1, le=100, description="passes over the training rows")] = 1
    batch: Annotated[int, Field(ge=1, le=4096, description="rows a step")] = 16
    tokens: Annotated[
        int,
        Field(
            ge=LEAST_TOKENS, description="most tokens computed at once; a step of more is computed in parts, to one sum"
        ),
    ] = 4096
    warmup: Annotated[float, Field(ge=0, lt=1, description="share of the steps in which the rate rises")] = 0.05
    schedule: Annotated[
        Literal["cosine", "linear", "constant"], Field(description="how the rate falls after the warm-up")
    ] = "cosine"
    weight_decay: Annotated[float, Field(ge=0, lt=1, description="AdamW's; norms and biases are spared")] = 0.0
    clip: Annotated[float, Field(gt=0, description="largest norm of a step's gradient")] = 1.0
    seed: Annotated[int, Field(ge=0, lt=2**31, description="of an adapter's start and the rows' order")] = 0
    max_length: Annotated[int, Field(ge=16, description="most tokens of a training row, prompt included")] = 1024
    validations: Annotated[int, Field(ge=1, le=100, description="how often the validation loss is taken")] = 4
    patience: Annotated[
        int | None,
        Field(ge=1, description="stop when so many validations in a row brought no lower loss; never where left out"),
    ] = None
    keep: Annotated[
        Literal["best", "last"], Field(description="the weights of the lowest validation loss, or those of the end")
    ] = "best"
    validation_rows: Annotated[int, Field(ge=1, description="at most so many validation rows for it")] = 64
    checkpoint_seconds: Annotated[
        float,
        Field(
            gt=0,
            description="checkpoints are at least so far apart; kill -9 undoes that much work, and the step under way",
        ),
    ] = 30.0

    @model_validator(mode="after")
    def _of_the_method(self) -> TrainSettings:
        if self.method == "full" and (given := [key for key in _LORA_ONLY if key in self.model_fields_set]):
            raise ValueError(f"{given[0]} is of adapters: leave it out with method: full")
        return self

    @model_serializer(mode="wrap")
    def _stated(self, write: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """What says nothing with this method is not stated."""
        stated: dict[str, Any] = write(self)
        return {key: value for key, value in stated.items() if self.method == "lora" or key not in _LORA_ONLY}
