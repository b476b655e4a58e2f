"""/api/evaluations: which there are, what one showed, its held-out requests by candidates, and one request."""

from __future__ import annotations

from functools import partial
from typing import Annotated

from fastapi import Query, Request, Response

from tunesmith.evaluation.report.evidence import EvidenceReport
from tunesmith.server.access import needs
from tunesmith.server.api.routing import Digest, Name, Page, Text, call_of, router, shows
from tunesmith.services import evaluation_lookups, held_out_requests

routes = router()
Verdict = Annotated[str, Query(pattern="^(sha256:[0-9a-f]{64})?$")]
_FILTER = ("focus", "rival", "metric", "show", "group", "label", "search")


@routes.get("/evaluations", dependencies=[needs("read")], **shows(evaluation_lookups.EvaluationList))
async def evaluations(request: Request, page: Page = 1) -> Response:
    """The evaluations that the caller may see, newest first, 25 a page."""
    call = call_of(request)
    return await call.answer(partial(evaluation_lookups.list_evaluations, call.store, call.user, page))


@routes.get("/evaluations/{digest}", dependencies=[needs("read")], **shows(evaluation_lookups.EvaluationPage))
async def evaluation(request: Request, digest: Digest, verdict: Verdict = "") -> Response:
    """One evaluation: its candidates with intervals, and the gates of the leading verdict or of the one named."""
    call = call_of(request)
    show = partial(evaluation_lookups.show_evaluation, call.store, call.user, digest, verdict or None)
    return await call.answer(show)


@routes.get("/evaluations/{digest}/findings", dependencies=[needs("read")], **shows(EvidenceReport))
async def findings(request: Request, digest: Digest, verdict: Verdict = "") -> Response:
    """What takes seconds to compute: advice, differences, approaches, groups, risks, policy and style."""
    call = call_of(request)
    show = partial(evaluation_lookups.show_findings, call.store, call.user, digest, verdict or None)
    return await call.answer(show)


@routes.get("/evaluations/{digest}/requests", dependencies=[needs("rows")], **shows(held_out_requests.RequestMatrix))
async def requests(
    request: Request,
    digest: Digest,
    focus: Text = "",
    rival: Text = "",
    metric: Text = "",
    show: Text = "all",
    group: Text = "",
    label: Text = "",
    search: Text = "",
    first: Annotated[int, Query(ge=0, le=10**9)] = 0,
    most: Annotated[int, Query(ge=1, le=1000)] = 100,
) -> Response:
    """Held-out requests by candidates: where focus is worse than rival first, then where it is better.

    show: all, flips, wins, losses, invalid or long. group, label, search: only those requests. first: the place to
    begin at; most: how many.
    """
    call = call_of(request)
    given = dict(zip(_FILTER, (focus, rival, metric, show, group, label, search), strict=True))
    region = call.serving.settings.region
    look = partial(held_out_requests.show_requests, call.store, call.user, region, digest)
    return await call.answer(partial(look, given, first, most))


@routes.get(
    "/evaluations/{digest}/requests/{row}", dependencies=[needs("rows")], **shows(held_out_requests.OpenedRequest)
)
async def opened(request: Request, digest: Digest, row: Name, compared: Text = held_out_requests.REFERENCE) -> Response:
    """One held-out request: every candidate's answer, how it differs from compared, and what was retrieved."""
    call = call_of(request)
    region = call.serving.settings.region
    look = partial(held_out_requests.show_request, call.store, call.user, region, digest, row, {}, compared)
    return await call.answer(look)
