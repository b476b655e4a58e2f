"""The project file's `hold:`."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from tunesmith.core.values import Duration, Settings

_DAY = 86_400.0
Label = Annotated[str, Field(min_length=1, max_length=1_000)] | bool | int | float


class HoldRule(Settings):
    """Which answers wait: those with a value, those of a low confidence, or those that break a policy check's rules."""

    field: str | None = Field(
        default=None, min_length=1, description="a key of the answer, a JSON object; an answer that is none waits too"
    )
    values: tuple[Label, ...] | None = Field(
        default=None,
        min_length=1,
        description="values of this field, or elements of a list in it; without `field`, whole answers. Case, "
        "accents and look-alike letters make no difference",
    )
    confidence_below: float | None = Field(
        default=None,
        gt=0,
        le=1,
        description="answers whose least likely token has a lower probability; needs an engine in this process",
    )
    policy: str | None = Field(
        default=None,
        description="answers that break the rules of this check of `policy:`, or for which they are undecided",
    )

    @model_validator(mode="after")
    def _one_kind(self) -> HoldRule:
        given = [self.values is not None, self.confidence_below is not None, self.policy is not None]
        if sum(given) != 1:
            raise ValueError("a rule has exactly one of values (with or without field), confidence_below and policy")
        if self.field is not None and self.values is None:
            raise ValueError("field needs values")
        return self


class HoldSettings(Settings):
    """Answers of the server that wait for a reviewer. Their texts are stored until the deadline plus `fetch`."""

    rules: tuple[HoldRule, ...] = Field(min_length=1, max_length=50, description="an answer waits by any")
    deadline: Duration = Field(
        default=900.0, gt=0, le=7 * _DAY, description="longest an answer waits for a reviewer, such as 15m"
    )
    at_deadline: Literal["refuse", "release"] = Field(
        default="refuse", description="what happens to an answer that nobody decided on"
    )
    wait: Duration = Field(
        default=20.0,
        ge=0,
        le=300,
        description="how long the request stays open for the decision; after that it is answered `answer_held`",
    )
    fetch: Duration = Field(
        default=3600.0,
        ge=60,
        le=7 * _DAY,
        description="how long after the deadline the caller can fetch a decided answer",
    )
    at_most: int = Field(
        default=1000, ge=1, le=100_000, description="answers that wait at once; further ones are refused with 503"
    )
