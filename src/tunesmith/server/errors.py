"""Errors in the form that OpenAI's clients read."""

from __future__ import annotations

from collections.abc import Mapping

from fastapi.responses import JSONResponse
from pydantic import BaseModel

from tunesmith.core.errors import Inconclusive, Refused, TunesmithError, UsageError
from tunesmith.core.system.files import is_disk_full
from tunesmith.core.values import Omitted
from tunesmith.server import limits

INVALID_SCHEMA = "invalid_json_schema"  # the code, as OpenAI's, of a schema that cannot be held


class HeldNotice(BaseModel):
    """Where the caller fetches an answer that waits for a reviewer. url: a path of this server."""

    id: str
    url: str
    deadline: str


class ErrorDetail(BaseModel):
    """What is wrong. param: the field of the request that is at fault; code: for programs to read.

    held: of an answer that waits for a reviewer (answer_held), or that one refused (answer_refused).
    """

    message: str
    type: str
    param: str | None
    code: str | None
    held: Omitted[HeldNotice] = None


class ErrorDocument(BaseModel):
    """The body of every answer other than success."""

    error: ErrorDetail


class ApiError(Exception):
    """An answer other than success. param: the request's invalid field. code: for programs to read.

    retry: seconds after which the client may try again, 0 to say nothing. closes: the connection, after the answer.
    """

    def __init__(
        self,
        status: int,
        message: str,
        code: str | None = None,
        param: str | None = None,
        *,
        retry: int = 0,
        closes: bool = False,
        headers: Mapping[str, str] | None = None,
        held: HeldNotice | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.code, self.param, self.held = status, message, code, param, held
        self.headers = dict(headers or {})
        if retry:
            self.headers["Retry-After"] = str(retry)
        if closes:
            self.headers["Connection"] = "close"

    def document(self) -> ErrorDocument:
        """The body."""
        kind = "rate_limit_error" if self.status == 429 else "invalid_request_error"
        if self.status >= 500:
            kind = "server_error"
        about = ErrorDetail(message=self.message, type=kind, param=self.param, code=self.code, held=self.held)
        return ErrorDocument(error=about)

    def response(self) -> JSONResponse:
        """The answer."""
        return JSONResponse(self.document().model_dump(), status_code=self.status, headers=self.headers)


def unauthorised(why: str = "") -> ApiError:
    """No valid token. The answer is the same for a missing and a wrong one. why: of a token that was valid once."""
    none = "No valid token was given. Send `Authorization: Bearer TOKEN`; an admin makes one."
    said = f"{capital(why)}." if why else none
    return ApiError(401, said, "invalid_api_key", headers={"WWW-Authenticate": "Bearer"})


def forbidden(what: str, code: str = "permission_denied") -> ApiError:
    """A known user without the permission."""
    return ApiError(403, what, code)


def missing(what: str) -> ApiError:
    """The same answer for what does not exist and what is another tenant's."""
    return ApiError(404, f"There is no such {what}.", "not_found")


def no_such_model(model: str) -> ApiError:
    """The same answer for a model that does not exist and one of another tenant or region."""
    message = f"The model {model[: limits.SHOWN]!r} does not exist or you do not have access to it."
    return ApiError(404, message, "model_not_found", "model")


def not_available(model: str, why: str) -> ApiError:
    """A model that the caller may know about but that must not answer, and why."""
    message = f"The model {model[: limits.SHOWN]!r} is not available: {why}."
    return ApiError(404, message, "model_not_available", "model")


def unknown_request(request: str) -> ApiError:
    """The same answer for a request that was never made and one of somebody else."""
    return ApiError(404, f"There is no request {request[:80]!r}.", "request_not_found", "request_id")


def bad_request(message: str, param: str | None = None, code: str = "invalid_value") -> ApiError:
    """A request that is not valid."""
    return ApiError(400, message, code, param)


def busy() -> ApiError:
    """The queue is full."""
    return ApiError(429, "The queue is full. Try again shortly.", "queue_full", retry=1)


def busy_for_user(most: int, what: str = "requests") -> ApiError:
    """The user has as many requests under way as one user may have."""
    message = f"You have {most} {what} waiting or being answered. Wait for some of them, then try again."
    return ApiError(429, message, "rate_limit_exceeded", retry=1)


def not_stored(error: Exception) -> ApiError:
    """The database took nothing: it is full, or locked, unreachable or read-only. error: why.

    409 for evidence that does not decide, which is no trouble of the database.
    """
    if isinstance(error, Inconclusive):
        return ApiError(409, f"{capital(error.what)}.", "inconclusive")
    again = "Nothing was stored, so the same request can be sent again."
    if is_disk_full(error):
        full = f"The server's disk or database is full. Its operator must free space. {again}"
        return ApiError(507, full, "storage_full")
    return ApiError(503, f"The server's database or store cannot be used now. {again}", "storage_failed", retry=5)


def unavailable() -> ApiError:
    """The database or the store of files cannot be reached. The server's log says why."""
    message = "The server's database or store cannot be used now. Try again shortly."
    return ApiError(503, message, "unavailable", retry=5)


def passes(error: Exception) -> bool:
    """Whether an error may pass by itself: something outside was away, and nothing was decided or left undecided."""
    return isinstance(error, TunesmithError) and not isinstance(error, Refused | UsageError | Inconclusive)


def failed() -> ApiError:
    """The engine failed. The server's log has the error; the answer has not."""
    return ApiError(500, "The engine failed on this request.", "engine_error")


def stopping() -> ApiError:
    """The server shuts down while requests wait."""
    return ApiError(503, "The server is shutting down.", "stopping", retry=5)


def answer_held(notice: HeldNotice) -> ApiError:
    """An answer waits for a reviewer. 403, because OpenAI's clients would send a 409 or 503 again."""
    message = f"The answer waits for a reviewer. Fetch it at {notice.url} once it is decided, by {notice.deadline}."
    return _withheld(message, "answer_held", notice)


def answer_refused(notice: HeldNotice, reason: str) -> ApiError:
    """A reviewer, or the deadline, refused an answer."""
    return _withheld(f"The answer was not released: {reason}", "answer_refused", notice)


def _withheld(message: str, code: str, notice: HeldNotice) -> ApiError:
    headers = {"Location": notice.url, "x-should-retry": "false"}
    return ApiError(403, message, code, headers=headers, held=notice)


def sentence(error: TunesmithError) -> str:
    """What a caller reads of an error."""
    return f"{capital(error.what)}.{f' Then: {error.fix}.' if error.fix else ''}"


def capital(text: str) -> str:
    """A text that begins with a capital letter."""
    return text[:1].upper() + text[1:]
