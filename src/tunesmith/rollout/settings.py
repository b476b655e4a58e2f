"""The steps of a rollout: how much traffic the canary gets, when to wait, and what to measure."""

from __future__ import annotations

from typing import Any

from pydantic import Field, StrictInt, model_validator

from tunesmith.core.values import Settings

DAY = 86_400.0


class Pause(Settings):
    """Wait for a time, or until `rollout resume`."""

    seconds: float | None = Field(
        default=None, gt=0, description="how long to wait; without it, until `rollout resume`"
    )


class Analysis(Settings):
    """Compare the canary's requests since this step began with stable's, and go on only if they pass."""

    metric: str = Field(
        pattern=r"[a-z][a-z0-9_]*",
        description="the score to compare: json_valid (measured on every answer if task.scorers lists it), "
        "exact_match or another scorer (once feedback arrives), success_rate, or error_rate",
    )
    worse_by_at_most: float = Field(
        default=0.05, ge=0, lt=1, description="how much worse than stable the canary's mean may be"
    )
    at_least: float | None = Field(
        default=None,
        ge=0,
        le=1,
        description="the least mean of the canary, in addition to the comparison; needed if stable has no traffic",
    )
    min_requests: StrictInt = Field(
        default=50, ge=1, description="scored canary requests that a pass needs; a failure may come earlier"
    )
    max_requests: StrictInt | None = Field(
        default=None, ge=1, description="abort if this many scored canary requests did not decide"
    )
    confidence: float = Field(
        default=0.95, ge=0.5, lt=1, description="confidence level of each decision, valid however often it is evaluated"
    )
    timeout: float = Field(default=DAY, gt=0, description="abort if nothing was decided after this many seconds")

    @model_validator(mode="after")
    def _decidable(self) -> Analysis:
        if self.metric == "error_rate" and self.at_least is not None:
            raise ValueError("at_least needs a metric for which high is good: write metric: success_rate")
        if self.max_requests is not None and self.max_requests < self.min_requests:
            raise ValueError(
                f"max_requests ({self.max_requests}) is below min_requests ({self.min_requests}): nothing could pass"
            )
        return self


class Step(Settings):
    """One step: exactly one of setWeight, pause and analysis."""

    # Argo Rollouts' own spelling.
    setWeight: StrictInt | None = Field(  # noqa: N815
        default=None, ge=0, le=100, description="percentage of requests that the canary gets"
    )
    pause: Pause | None = Field(default=None, description="wait; `{}` waits for `rollout resume`")
    analysis: Analysis | None = Field(default=None, description="measure the canary against stable")

    @model_validator(mode="before")
    @classmethod
    def _pause_without_value(cls, value: Any) -> Any:
        # In YAML, `- pause:` is a pause without settings.
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

    steps: tuple[Step, ...] = Field(
        default=DEFAULT_STEPS, min_length=1, description="the steps in order; the last setWeight must be 100"
    )
    main_callers: tuple[str, ...] | None = Field(
        default=None,
        description="the users whose requests are evidence, such as your application's; [] for everybody's. "
        "By default the user that made at least 80% of the requests of the last seven days, else everybody. "
        "No other caller can influence a verdict, and no single end user of theirs can decide one",
    )

    @model_validator(mode="after")
    def _reaches_everyone(self) -> RolloutSettings:
        weights = [step.setWeight for step in self.steps if step.setWeight is not None]
        if not weights or weights[-1] != 100:
            last = f"is {weights[-1]}" if weights else "is missing"
            raise ValueError(f"the last setWeight must be 100, it {last}: the version would never get all traffic")
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
