"""One span for each request, by OpenTelemetry's conventions for HTTP servers and for GenAI; never a text of it."""

from __future__ import annotations

import time
from typing import Any

from opentelemetry.trace import Span, SpanKind, StatusCode, set_span_in_context
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from tunesmith.core.telemetry import Telemetry, names
from tunesmith.server.answering.job import ChatJob
from tunesmith.server.chat.answer import ID_PREFIX
from tunesmith.server.serving import CHAT_JOB

_TRACED = ("/v1/", "/api/")
_CARRIED = (b"traceparent", b"tracestate")


class TraceMiddleware:
    """Opens a span for each request of the API, under the caller's trace where it names one."""

    def __init__(self, app: ASGIApp, telemetry: Telemetry) -> None:
        self._app, self._tracer = app, telemetry.tracer

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        if scope["type"] != "http" or not scope["path"].startswith(_TRACED):
            await self._app(scope, receive, send)
            return
        carried = {name.decode(): value.decode("latin-1") for name, value in scope["headers"] if name in _CARRIED}
        context = TraceContextTextMapPropagator().extract(carried)
        span = self._tracer.start_span(scope["method"], context, SpanKind.SERVER, {names.METHOD: scope["method"]})
        status = 0

        async def sending(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            await self._app(scope, receive, sending)
        except Exception:
            status = 500  # which the application's outermost part answers
            raise
        finally:
            self._describe(span, scope, status)
            span.end()

    def _describe(self, span: Span, scope: Scope, status: int) -> None:
        if (route := getattr(scope.get("route"), "path", None)) is not None:
            span.set_attribute(names.ROUTE, route)
            span.update_name(f"{scope['method']} {route}")
        if status:
            span.set_attribute(names.STATUS, status)
        failed = str(status) if status >= 500 else "" if status else "no_answer"
        job = scope.get(CHAT_JOB)
        if isinstance(job, ChatJob):
            span.update_name(f"{names.CHAT} {job.request.model[:100]}")
            span.set_attributes(_of_job(job))
            self._add_parts(span, job)
            if not failed and job.ended is not None and job.completion is None:
                failed = "failed"  # in the middle of a stream
        if failed:
            span.set_attribute(names.ERROR, failed)
            span.set_status(StatusCode.ERROR)

    def _add_parts(self, span: Span, job: ChatJob) -> None:
        """Add a span for the wait in the queue and one for the answer."""
        behind = time.time() - time.monotonic()
        moments = [int((each + behind) * 1e9) for each in (job.accepted, job.began, job.ended) if each is not None]
        context = set_span_in_context(span)
        for name, start, end in zip((names.QUEUE_SPAN, names.ANSWER_SPAN), moments, moments[1:], strict=False):
            self._tracer.start_span(name, context, start_time=start).end(end)


def _of_job(job: ChatJob) -> dict[str, Any]:
    request, route, completion = job.request, job.route, job.completion
    stated: dict[str, Any] = {
        names.OPERATION: names.CHAT,
        names.PROVIDER: names.SERVICE,
        names.REQUEST_MODEL: request.model[:100],
        names.REQUEST_MAX_TOKENS: request.max_completion_tokens or request.max_tokens,
        names.REQUEST_TEMPERATURE: request.temperature,
        names.REQUEST_TOP_P: request.top_p,
        names.REQUEST_SEED: request.seed,
        names.REQUEST_STREAM: bool(request.stream),
        names.RESPONSE_ID: ID_PREFIX + job.id,
        names.RESPONSE_MODEL: route.version.label,
        names.ARM: route.arm,
        names.ROLLOUT: route.rollout,
        names.TENANT: job.user.tenant or None,
        names.REGION: job.user.region or None,
    }
    if completion is not None:
        stated[names.FINISH_REASONS] = (completion.finish,)
        stated[names.INPUT_TOKENS] = completion.prompt_tokens
        stated[names.OUTPUT_TOKENS] = completion.completion_tokens
    return {name: value for name, value in stated.items() if value is not None}
