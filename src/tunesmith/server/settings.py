"""The server's bounds: what one request, and all of them together, may cost."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from tunesmith.core.settings import Settings


class ServerSettings(Settings):
    """Bounds of one server process."""

    region: Annotated[str, Field(description='the region whose versions it serves, "" where there are none')] = ""
    body_bytes: Annotated[int, Field(ge=1024, description="largest request body")] = 1 << 20
    body_seconds: Annotated[float, Field(gt=0, description="longest a client may take to send its body")] = 15.0
    waiting: Annotated[int, Field(ge=1, description="requests that wait for the engine; more are answered 429")] = 256
    together: Annotated[
        int, Field(ge=1, le=256, description="requests answered at once, whatever their version, as one batch of rows")
    ] = 32
    answer_seconds: Annotated[float, Field(gt=0, description="longest an answer may take, its wait included")] = 300.0
    kept_answers: Annotated[
        int, Field(ge=0, description="answers kept in memory, for feedback with the expected text to be held against")
    ] = 10_000
    look_seconds: Annotated[float, Field(gt=0, description="time between two looks at the live rollouts")] = 1.0
