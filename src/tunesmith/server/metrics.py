"""Metrics of one server, for Prometheus and, where it is on, for OpenTelemetry.

/metrics needs no token, so what it shows names no model, tenant or user.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from tunesmith.core.telemetry import Telemetry, names
from tunesmith.engines.protocol import Completion

if TYPE_CHECKING:
    from opentelemetry.metrics import CallbackOptions, Observation
    from opentelemetry.metrics import Histogram as SentHistogram

_SECONDS = (0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0)


class Metrics:
    """The counters, gauges and histograms of one server."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        counter, gauge = partial(Counter, registry=self.registry), partial(Gauge, registry=self.registry)
        self._sent: tuple[SentHistogram, SentHistogram] | None = None
        arm = ("arm",)
        self._requests = counter("tunesmith_requests", "Requests by arm and outcome.", (*arm, "outcome"))
        took = "From acceptance to the last token."
        self._seconds = Histogram("tunesmith_request_seconds", took, arm, buckets=_SECONDS, registry=self.registry)
        self._tokens = counter("tunesmith_tokens", "Tokens by arm and kind.", (*arm, "kind"))
        self.refused = counter("tunesmith_refused", "Requests answered with an error, by status.", ("status",))
        self.unrecorded = counter("tunesmith_unrecorded_requests", "Answers whose record was lost.")
        self.cases = counter(
            "tunesmith_cases",
            "Requests to be kept: kept, refused (privacy, length, number), lost (an error, or too many at once).",
            ("outcome",),
        )
        self.held = counter(
            "tunesmith_held_answers",
            "Answers that needed a reviewer: held, full (the queue was), released, replaced or refused over this "
            "server, expired (decided at the deadline).",
            ("outcome",),
        )
        self.held_waiting = gauge("tunesmith_held_waiting", "Answers in the database that wait for a reviewer.")
        self.controller_failures = counter("tunesmith_controller_failures", "Rollout checks that failed.")
        self.champions_refused = gauge(
            "tunesmith_champions_refused",
            "Champions that may not serve now: expired, recalled, not approved or not validly signed.",
        )

    def request(
        self, arm: str, outcome: str, seconds: float, completion: Completion | None, models: tuple[str, str]
    ) -> None:
        """Count one request. models: what the client asked for, and the version that answered."""
        self._requests.labels(arm, outcome).inc()
        self._seconds.labels(arm).observe(seconds)
        if completion is not None:
            self._tokens.labels(arm, "prompt").inc(completion.prompt_tokens)
            self._tokens.labels(arm, "completion").inc(completion.completion_tokens)
        if self._sent is not None:
            duration, tokens = self._sent
            stated = {
                names.OPERATION: names.CHAT,
                names.PROVIDER: names.SERVICE,
                names.REQUEST_MODEL: models[0],
                names.RESPONSE_MODEL: models[1],
                names.ARM: arm,
            }
            failed = {} if completion is not None else {names.ERROR: outcome}
            duration.record(seconds, {**stated, names.OUTCOME: outcome, **failed})
            if completion is not None:
                tokens.record(completion.prompt_tokens, {**stated, names.TOKEN_TYPE: names.INPUT})
                tokens.record(completion.completion_tokens, {**stated, names.TOKEN_TYPE: names.OUTPUT})

    def send_to(self, telemetry: Telemetry) -> None:
        """Also send to OpenTelemetry: durations and tokens by model, and the counters and gauges as they are here."""
        meter = telemetry.meter
        self._sent = (
            meter.create_histogram(
                names.REQUEST_DURATION, "s", explicit_bucket_boundaries_advisory=names.DURATION_BOUNDS
            ),
            meter.create_histogram(
                names.TOKEN_USAGE, "{token}", explicit_bucket_boundaries_advisory=names.TOKEN_BOUNDS
            ),
        )
        for family in self.registry.collect():
            values = [partial(self._observed, family.name)]
            if family.type == "counter":
                meter.create_observable_counter(family.name, values, description=family.documentation)
            elif family.type == "gauge":
                meter.create_observable_gauge(family.name, values, description=family.documentation)

    def _observed(self, name: str, _options: CallbackOptions) -> Iterable[Observation]:
        """The present values of a counter or gauge."""
        from opentelemetry.metrics import Observation

        for family in self.registry.collect():
            for sample in family.samples:
                if family.name == name and not sample.name.endswith("_created"):
                    yield Observation(sample.value, dict(sample.labels))

    def watch_queue(self, length: Callable[[], int]) -> None:
        """Show the length of the queue, read at each scrape."""
        waiting = Gauge("tunesmith_waiting_requests", "Requests that wait for the engine.", registry=self.registry)
        waiting.set_function(length)
