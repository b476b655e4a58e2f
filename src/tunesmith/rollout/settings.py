"""The steps of a rollout: how much traffic, when to wait, what to measure."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import Field, StrictInt, model_validator

from tunesmith.core.settings import Settings

DAY = 86_400.0


class Pause(Settings):
    """Wait: for so many seconds, or, where none are given, until `rollout resume`."""

    seconds: Annotated[float | None, Field(gt=0, description="how long; without it, until `rollout resume`")] = None


class Analysis(Settings):
    """Hold the canary's requests since this step began against the stable version's, and go on only where they pass."""

    metric: Annotated[
        str,
        Field(
            pattern=r"[a-z][a-z0-9_]*",
            description="a score kept with requests: json_valid (measured on every answer), exact_match and other "
            "scorers (once feedback arrives), success_rate, or error_rate",
        ),
    ]
    worse_by_at_most: Annotated[
        float, Field(ge=0, lt=1, description="how much worse than stable the canary's mean may be and still pass")
    ] = 0.05
    at_least: Annotated[
        float | None,
        Field(
            ge=0,
            le=1,
            description="a floor under the canary's mean, besides the comparison; alone where stable has no traffic",
        ),
    ] = None
    min_requests: Annotated[
        StrictInt, Field(ge=1, description="scored canary requests before it may pass; a failure does not wait")
    ] = 50
    max_requests: Annotated[
        StrictInt | None, Field(ge=1, description="scored canary requests after which an open question aborts")
    ] = None
    confidence: Annotated[
        float, Field(ge=0.5, lt=1, description="of each decision, over every look taken at the data together")
    ] = 0.95
    timeout: Annotated[float, Field(gt=0, description="seconds after which an open question aborts")] = DAY

    @model_validator(mode="after")
    def _decidable(self) -> Analysis:
        if self.metric == "error_rate" and self.at_least is not None:
            raise ValueError("at_least is a floor, and error_rate is better low: write metric: success_rate")
        if self.max_requests is not None and self.max_requests < self.min_requests:
            raise ValueError(
                f"max_requests ({self.max_requests}) is below min_requests ({self.min_requests}): nothing could pass"
            )
        return self


class Step(Settings):
    """One step: exactly one of setWeight, pause, analysis."""

    # Argo Rollouts' own spelling.
    setWeight: Annotated[  # noqa: N815
        StrictInt | None, Field(ge=0, le=100, description="percentage of requests that go to the canary")
    ] = None
    pause: Annotated[Pause | None, Field(description="wait; `{}` waits for `rollout resume`")] = None
    analysis: Annotated[Analysis | None, Field(description="measure the canary against stable")] = None

    @model_validator(mode="before")
    @classmethod
    def _pause_without_value(cls, value: Any) -> Any:
        # YAML writes `- pause:` for a pause without settings.
        return {"pause": {}} if value == {"pause": None} else value

    @model_validator(mode="after")
    def _one_of(self) -> Step:
        given = [name for name in ("setWeight", "pause", "analysis") if getattr(self, name) is not None]
        if len(given) != 1:
            raise ValueError(f"a step is one of setWeight, pause, analysis; this one has {', '.join(given) or 'none'}")
        return self

    @property
    def kind(self) -> str:
        """setWeight, pause or analysis."""
        return next(name for name in ("setWeight", "pause", "analysis") if getattr(self, name) is not None)


DEFAULT_STEPS = (
    Step(setWeight=10),
    Step(analysis=Analysis(metric="json_valid")),
    Step(setWeight=50),
    Step(analysis=Analysis(metric="json_valid")),
    Step(setWeight=100),
)


class RolloutSettings(Settings):
    """How a version takes over the traffic."""

    steps: Annotated[
        tuple[Step, ...], Field(min_length=1, description="in order; the last setWeight is 100, then it is promoted")
    ] = DEFAULT_STEPS

    @model_validator(mode="after")
    def _reaches_everyone(self) -> RolloutSettings:
        weights = [step.setWeight for step in self.steps if step.setWeight is not None]
        if not weights or weights[-1] != 100:
            said = f"is {weights[-1]}" if weights else "is missing"
            raise ValueError(f"the last setWeight must be 100, it {said}: the version would never take all traffic")
        seen = 0
        for number, step in enumerate(self.steps, start=1):
            if step.setWeight is not None:
                seen = step.setWeight
            elif step.analysis is not None and seen == 0:
                raise ValueError(
                    f"step {number} is an analysis while the canary has no traffic: set a weight before it"
                )
            elif step.analysis is not None and seen == 100 and step.analysis.at_least is None:
                raise ValueError(
                    f"step {number} compares with stable, which has no traffic at weight 100: set at_least"
                )
        return self
