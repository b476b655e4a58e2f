"""When served traffic counts as drifted from the test split, and which requests are kept."""

from __future__ import annotations

from pydantic import Field

from tunesmith.core.values import Duration, Settings


class MonitoringSettings(Settings):
    """Drift monitoring. A verdict depends on the size of a change, not on how many requests show it."""

    window_hours: float = Field(default=24.0, gt=0, description="length of the window of served requests, in hours")
    min_requests: int = Field(
        default=100, ge=10, description="with fewer requests in the window, the verdict is inconclusive"
    )
    shift_at_most: float = Field(
        default=0.25,
        gt=0,
        lt=1,
        description="largest allowed distance between a feature's served and measured distributions: the largest "
        "difference between their cumulative shares (the Kolmogorov-Smirnov statistic)",
    )
    unlike_rise_at_most: float = Field(
        default=0.02,
        ge=0,
        lt=1,
        description="largest allowed rise of the share of requests that are less like the training rows than nine "
        "of ten test rows were, such as requests about a new topic",
    )
    valid_drop_at_most: float = Field(
        default=0.05, ge=0, lt=1, description="largest allowed drop of the share of valid JSON below the evaluation's"
    )
    tenant_share_at_most: float = Field(
        default=0.5, gt=0, le=1, description="largest share of the window that requests of one tenant may have"
    )
    confidence: float = Field(default=0.95, ge=0.5, lt=1, description="confidence level of the intervals")


class CaseSettings(Settings):
    """Requests that are kept for a review, each only because its caller asked for that."""

    days: float = Field(default=30.0, gt=0, le=3650, description="days after a request until its text is deleted")
    at_most: int = Field(default=1000, ge=1, description="most requests that wait for a review; more are not kept")


class KeepSettings(Settings):
    """What `store prune` keeps. What a version reaches that serves, may serve yet or is held stays always."""

    trainings: int | None = Field(
        default=None, ge=1, description="the newest trainings of each candidate that stay; by default all"
    )
    work: Duration | None = Field(
        default=None, gt=0, description="how long unused work folders stay, such as 30d; by default for ever"
    )
