"""When served traffic counts as drifted from the test split, and which requests are kept."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from tunesmith.core.settings import Settings


class MonitoringSettings(Settings):
    """Drift monitoring. A verdict depends on the size of a change, not on how many requests show it."""

    window_hours: Annotated[float, Field(gt=0, description="length of the window of served requests, in hours")] = 24.0
    min_requests: Annotated[
        int, Field(ge=10, description="with fewer requests in the window, the verdict is inconclusive")
    ] = 100
    shift_at_most: Annotated[
        float,
        Field(
            gt=0,
            lt=1,
            description="largest allowed distance between a feature's served and measured distributions: the largest "
            "difference between their cumulative shares (the Kolmogorov-Smirnov statistic)",
        ),
    ] = 0.25
    unlike_rise_at_most: Annotated[
        float,
        Field(
            ge=0,
            lt=1,
            description="largest allowed rise of the share of requests that are less like the training rows than nine "
            "of ten test rows were, such as requests about a new topic",
        ),
    ] = 0.02
    valid_drop_at_most: Annotated[
        float, Field(ge=0, lt=1, description="largest allowed drop of the share of valid JSON below the evaluation's")
    ] = 0.05
    tenant_share_at_most: Annotated[
        float, Field(gt=0, le=1, description="largest share of the window that requests of one tenant may have")
    ] = 0.5
    confidence: Annotated[float, Field(ge=0.5, lt=1, description="confidence level of the intervals")] = 0.95


class CaseSettings(Settings):
    """Requests that are kept for a review, each only because its caller asked for that."""

    days: Annotated[float, Field(gt=0, le=3650, description="days after a request until its text is deleted")] = 30.0
    at_most: Annotated[int, Field(ge=1, description="most requests that wait for a review; more are not kept")] = 1000
