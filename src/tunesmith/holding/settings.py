"""The project file's `hold:`."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from tunesmith.core.settings import Duration, Settings

_DAY = 86_400.0
Label = Annotated[str, Field(min_length=1, max_length=1_000)] | bool | int | float


class HoldRule(Settings):
    """Which answers wait: those with a value, those of a low confidence, or those that break a policy check's rules."""

    field: Annotated[
        str | None,
        Field(min_length=1, description="a key of the answer, a JSON object; an answer that is none waits too"),
    ] = None
    values: Annotated[
        tuple[Label, ...] | None,
        Field(
            min_length=1,
            description="values of this field, or elements of a list in it; without `field`, whole answers. Case, "
            "accents and look-alike letters make no difference",
        ),
    ] = None
    confidence_below: Annotated[
        float | None,
        Field(
            gt=0,
            le=1,
            description="answers whose least likely token has a lower probability; needs an engine in this process",
        ),
    ] = None
    policy: Annotated[
        str | None,
        Field(description="answers that break the rules of this check of `policy:`, or for which they are undecided"),
    ] = None

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

    rules: Annotated[tuple[HoldRule, ...], Field(min_length=1, max_length=50, description="an answer waits by any")]
    deadline: Annotated[
        Duration, Field(gt=0, le=7 * _DAY, description="longest an answer waits for a reviewer, such as 15m")
    ] = 900.0
    at_deadline: Annotated[
        Literal["refuse", "release"], Field(description="what happens to an answer that nobody decided on")
    ] = "refuse"
    wait: Annotated[
        Duration,
        Field(
            ge=0,
            le=300,
            description="how long the request stays open for the decision; after that it is answered `answer_held`",
        ),
    ] = 20.0
    fetch: Annotated[
        Duration,
        Field(ge=60, le=7 * _DAY, description="how long after the deadline the caller can fetch a decided answer"),
    ] = 3600.0
    at_most: Annotated[
        int, Field(ge=1, le=100_000, description="answers that wait at once; further ones are refused with 503")
    ] = 1000
