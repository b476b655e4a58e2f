"""Limits of the server: the largest values of a request's fields, and the settings of one server process.

A larger value is refused with the field's name and the limit. They bound what one request costs, whatever it says;
`ServerSettings` bounds the body as a whole.
"""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from tunesmith.core.settings import Settings

VALUES = 20_000  # JSON values in one body: objects, lists, texts, numbers
MODEL = 200  # characters of a model's name
MESSAGES = 2048
PARTS = 2048  # text parts of one message
STOPS = 4  # as OpenAI's
STOP = 256  # characters of one stop text
USER = 512
METADATA, METADATA_KEY, METADATA_TEXT = 16, 64, 512  # as OpenAI's
EXPECTED = 16_384  # characters of an expected answer: some scorers compare each of its words with each of the answer's
EXPECTED_BY_ANSWER = 1 << 26  # characters of the expected answer times those of the answer: 3 s of rougeL
TOOLS = 128  # as OpenAI's
CALLS, CALL_ID = 128, 128  # calls in one turn, characters of a call's id
DESCRIPTION = 1_024  # characters that describe a schema, as OpenAI's
FEEDBACK = 8  # calls of /api/feedback of one user at once, with `expected` and without
LISTS = 4  # calls of /v1/models and /api/rollouts of one user at once
PAGES = 100  # pages of the console that one user has open: each may ask for its parts at the same moment
BODIES, BODIES_OF_USER = 64, 16  # times ServerSettings.body_bytes: bytes of all bodies, and of one user's, being read
REQUEST_ID = 80
SCORES = 16
SHOWN = 120  # characters of a caller's own text that an error message repeats
FORM_FIELDS, FORM_HEADERS, FORM_VALUE = 8, 8_192, 1_024  # of an upload: fields, bytes of a part's headers, of a value
FORM_BOUNDARY = 70  # bytes, as RFC 2046 has it
UPLOADS, UPLOADS_OF_USER = 8, 2  # uploads at once, of all users and of one
UPLOAD_SECONDS = 3_600.0  # longest time for one upload
FILE_ID = 80


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
