"""The largest values of a request's fields. A larger one is refused with the field's name and the limit.

They bound what one request costs, whatever it says. `ServerSettings` bounds the body as a whole.
"""

from __future__ import annotations

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
