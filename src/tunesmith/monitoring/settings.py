"""When served traffic counts as drifted from what was measured before the release."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from tunesmith.core.settings import Settings


class MonitoringSettings(Settings):
    """The drift watch. Its verdicts rest on the size of a change and not on how many requests show it."""

    window_hours: Annotated[float, Field(gt=0, description="how far back served requests are looked at")] = 24.0
    min_requests: Annotated[
        int, Field(ge=10, description="requests in the window below which nothing is concluded")
    ] = 100
    shift_at_most: Annotated[
        float,
        Field(
            gt=0,
            lt=1,
            description="the largest distance between the distributions of a feature, served and measured, that is no "
            "drift: the most by which the share of requests below any value may differ",
        ),
    ] = 0.25
    valid_drop_at_most: Annotated[
        float, Field(ge=0, lt=1, description="how far the share of valid JSON may lie below the evaluation's")
    ] = 0.05
    tenant_share_at_most: Annotated[
        float, Field(gt=0, le=1, description="the largest part of the window that one of several tenants may be")
    ] = 0.5
    confidence: Annotated[float, Field(ge=0.5, lt=1, description="of the intervals")] = 0.95
