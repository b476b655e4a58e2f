"""Limits of the server: the largest values of a request's fields, and the settings of one server process.

A larger value is refused with the field's name and the limit. They bound what one request costs, whatever it says;
`ServerSettings` bounds the body as a whole.
"""

from __future__ import annotations

from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt

from tunesmith.core.values import Settings

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
LISTS = 4  # calls of lists, and of what takes seconds, of one user at once
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
    """Limits of one server process. Times are in seconds."""

    region: str = ""  # whose versions it serves, "" where there are none
    body_bytes: int = Field(default=1 << 20, ge=1024)  # of the largest request body
    body_seconds: PositiveFloat = 15.0  # longest a client may take to send its body
    file_bytes: int = Field(default=512 << 20, ge=1024)  # of the largest uploaded file
    headers_seconds: PositiveFloat = 15.0  # longest a client may take to send the headers of a request
    unread_seconds: PositiveFloat = 30.0  # longest a client may read nothing of an answer that waits for it
    idle_connections: PositiveInt = 512  # connections without a request; with more, the oldest is closed
    waiting: PositiveInt = 256  # requests that wait for the engine; more are answered 429
    per_user: PositiveInt = 128  # requests of one user that are sent, wait or are answered; more are answered 429
    token_rate: NonNegativeInt = 0  # requests a minute of one token, 0 for any number
    tenant_rate: NonNegativeInt = 0  # requests a minute of all tokens of one tenant, 0 for any number
    together: int = Field(default=32, ge=1, le=256)  # requests decoded as one batch
    answer_seconds: PositiveFloat = 300.0  # longest time for an answer, including its wait in the queue
    grace_seconds: PositiveFloat = 30.0  # after SIGTERM, longest time for the requests under way to finish
    kept_answers: NonNegativeInt = 10_000  # newest answers kept in memory, to be scored by feedback
    # Least time between two checks of a rollout; one that takes long comes less often.
    check_seconds: PositiveFloat = 1.0
