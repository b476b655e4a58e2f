"""/api/feedback: scores of answers that were given elsewhere, and the end of what is kept of a request."""

from __future__ import annotations

import re
from functools import partial
from typing import Annotated

from fastapi import Request
from fastapi.responses import Response
from pydantic import BaseModel, ConfigDict, Field, model_validator

from tunesmith.server import limits
from tunesmith.server.access import needs
from tunesmith.server.answering.recording import FeedbackResult, Withdrawal
from tunesmith.server.api.routing import call_of, changes, router
from tunesmith.server.chat.routes import ID_PREFIX
from tunesmith.server.errors import unknown_request

routes = router()
Metric = Annotated[str, Field(pattern=r"^[a-z][a-z0-9_]{0,63}$")]
Score = Annotated[float, Field(strict=True, ge=0, le=1, allow_inf_nan=False)]


class Feedback(BaseModel):
    """The expected text of an answer, or scores that were given elsewhere.

    request_id: a completion's id (`chatcmpl-...`) or the x-request-id header. keep: store the texts of the request, of
    its answer and of the expected one for a review, where the server's project allows that.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    request_id: Annotated[str, Field(min_length=1, max_length=limits.REQUEST_ID)]
    expected: Annotated[str, Field(max_length=limits.EXPECTED)] | None = None
    keep: bool = False
    score: Annotated[dict[Metric, Score] | None, Field(min_length=1, max_length=limits.SCORES)] = None

    @model_validator(mode="after")
    def _one_of(self) -> Feedback:
        if (self.expected is None) == (self.score is None):
            raise ValueError("give either expected or score")
        return self


@routes.post("/feedback", dependencies=[needs("feedback")], **changes(FeedbackResult, Feedback))
async def feedback(request: Request) -> Response:
    """Score a request of the caller's tenant. Each metric can be scored once."""
    call = call_of(request)
    given = await call.read(Feedback)
    identifier, serving = given.request_id.removeprefix(ID_PREFIX), call.serving
    score = partial(serving.recorder.feedback, call.user, identifier, given.expected, given.score or {}, given.keep)
    threads = serving.noting if given.expected is None and not given.keep else serving.scoring
    return await call.answer(score, threads=threads)


@routes.delete("/feedback/{request_id}", dependencies=[needs("feedback")], **changes(Withdrawal))
async def withdraw(request: Request, request_id: str) -> Response:
    """Delete the kept text of a request that the caller made, and let none be kept from now on."""
    call = call_of(request)
    identifier = request_id.removeprefix(ID_PREFIX)
    if not re.fullmatch("[0-9a-f]{32}", identifier):
        raise unknown_request(identifier)
    act = partial(call.serving.recorder.withdraw, call.user, identifier)
    return await call.answer(act, threads=call.serving.noting)
