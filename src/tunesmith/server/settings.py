"""Limits of the server, for each request and for all of them."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from tunesmith.core.settings import Settings


class ServerSettings(Settings):
    """Limits of one server process."""

    region: Annotated[str, Field(description='the region whose versions it serves, "" where there are none')] = ""
    body_bytes: Annotated[int, Field(ge=1024, description="largest request body")] = 1 << 20
    body_seconds: Annotated[float, Field(gt=0, description="longest a client may take to send its body")] = 15.0
    file_bytes: Annotated[int, Field(ge=1024, description="largest uploaded file")] = 512 << 20
    headers_seconds: Annotated[
        float, Field(gt=0, description="longest a client may take to send the headers of a request")
    ] = 15.0
    unread_seconds: Annotated[
        float, Field(gt=0, description="longest a client may read nothing of an answer that waits for it")
    ] = 30.0
    idle_connections: Annotated[
        int, Field(ge=1, description="connections without a request; with more, the oldest is closed")
    ] = 512
    waiting: Annotated[int, Field(ge=1, description="requests that wait for the engine; more are answered 429")] = 256
    per_user: Annotated[
        int, Field(ge=1, description="requests of one user that are sent, wait or are answered; more are answered 429")
    ] = 128
    token_rate: Annotated[int, Field(ge=0, description="requests a minute of one token, 0 for any number")] = 0
    tenant_rate: Annotated[
        int, Field(ge=0, description="requests a minute of all tokens of one tenant, 0 for any number")
    ] = 0
    together: Annotated[int, Field(ge=1, le=256, description="requests decoded as one batch")] = 32
    answer_seconds: Annotated[
        float, Field(gt=0, description="longest time for an answer, including its wait in the queue")
    ] = 300.0
    grace_seconds: Annotated[
        float, Field(gt=0, description="after SIGTERM, longest time for the requests under way to finish")
    ] = 30.0
    kept_answers: Annotated[
        int,
        Field(ge=0, description="newest answers kept in memory, to be scored by feedback"),
    ] = 10_000
    check_seconds: Annotated[
        float,
        Field(gt=0, description="least time between two checks of a rollout; one that takes long comes less often"),
    ] = 1.0
