"""What clients ask, as OpenAI defines it: the body that creates a fine-tuning job, and how many items a page may have.

What is not supported is refused by name.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, TypeAlias

from pydantic import BaseModel, ConfigDict, Field, StrictInt, field_validator, model_validator

from tunesmith.server import limits
from tunesmith.server.answering.request import MetadataKey, MetadataText, Number
from tunesmith.server.errors import bad_request
from tunesmith.services.fine_tuning import Arguments, Hyperparameters

_NOT_SUPPORTED = "is not supported"
Auto: TypeAlias = Literal["auto"] | None


class AskedHyperparameters(BaseModel):
    """null and "auto" leave a value to the project's settings."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    n_epochs: Annotated[StrictInt, Field(ge=1, le=100)] | Auto = None
    batch_size: Annotated[StrictInt, Field(ge=1, le=4096)] | Auto = None
    learning_rate_multiplier: Annotated[Number, Field(gt=0, le=1000)] | Auto = None


class Supervised(BaseModel):
    """Settings of the method `supervised`."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    hyperparameters: AskedHyperparameters | None = None


class Method(BaseModel):
    """The method. Only `supervised` is there."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    type: Literal["supervised"]
    supervised: Supervised | None = None

    @model_validator(mode="before")
    @classmethod
    def _known(cls, value: Any) -> Any:
        if isinstance(value, dict) and value.get("type") in ("dpo", "reinforcement"):
            raise ValueError(f"the method {value['type']} {_NOT_SUPPORTED}: use supervised")
        return value


class FineTuningRequest(BaseModel):
    """Create a fine-tuning job.

    hyperparameters: deprecated, as with OpenAI; either it or method.supervised.hyperparameters is given. suffix:
    letters, digits, and `.`, `_`, `-`. integrations: only an empty list.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    model: Annotated[str, Field(min_length=1, max_length=limits.MODEL)]
    training_file: Annotated[str, Field(min_length=1, max_length=limits.FILE_ID)]
    validation_file: Annotated[str | None, Field(min_length=1, max_length=limits.FILE_ID)] = None
    hyperparameters: AskedHyperparameters | None = None
    method: Method | None = None
    suffix: Annotated[str | None, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")] = None
    seed: Annotated[StrictInt | None, Field(ge=0, lt=2**31)] = None
    metadata: Annotated[dict[MetadataKey, MetadataText], Field(max_length=limits.METADATA)] | None = None
    integrations: Annotated[list[Any], Field(max_length=0)] | None = None

    @field_validator("integrations", mode="before")
    @classmethod
    def _none(cls, value: Any) -> Any:
        if isinstance(value, list) and value:
            kind = value[0].get("type") if isinstance(value[0], dict) else None
            raise ValueError(f"the integration {str(kind)[: limits.SHOWN]} {_NOT_SUPPORTED}")
        return value

    @model_validator(mode="after")
    def _once(self) -> FineTuningRequest:
        inside = self.method.supervised if self.method else None
        if self.hyperparameters is not None and inside is not None and inside.hyperparameters is not None:
            raise ValueError("give either hyperparameters or method.supervised.hyperparameters")
        return self

    def arguments(self) -> Arguments:
        """What a job needs to know."""
        inside = self.method.supervised if self.method else None
        asked = self.hyperparameters or (inside.hyperparameters if inside else None) or AskedHyperparameters()
        return Arguments(
            settings="",
            model=self.model,
            training_file=self.training_file,
            validation_file=self.validation_file,
            hyperparameters=Hyperparameters(
                **{name: None if value == "auto" else value for name, value in asked.model_dump().items()}
            ),
            suffix=self.suffix,
            seed=self.seed,
            metadata=self.metadata,
        )


def page_limit(given: str | None, default: int, most: int) -> int:
    """How many items a page may have. Raises ApiError 400 for anything but a whole number from 1 to `most`."""
    if given is None:
        return default
    if not given.isascii() or not given.isdecimal() or len(given) > 6 or not 1 <= int(given) <= most:
        raise bad_request(f"limit must be a whole number from 1 to {most}.", "limit")
    return int(given)
