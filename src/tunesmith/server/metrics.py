"""Prometheus metrics of one server. /metrics needs no token, so they name no model, tenant or user."""

from __future__ import annotations

from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from tunesmith.engines.protocol import Completion

_SECONDS = (0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0)


class Metrics:
    """The counters, gauges and histograms of one server."""

    def __init__(self) -> None:
        self._registry = CollectorRegistry()
        arm = ("arm",)
        self._requests = Counter(
            "tunesmith_requests", "Requests by arm and outcome.", (*arm, "outcome"), registry=self._registry
        )
        self._seconds = Histogram(
            "tunesmith_request_seconds",
            "From acceptance to the last token.",
            arm,
            buckets=_SECONDS,
            registry=self._registry,
        )
        self._tokens = Counter("tunesmith_tokens", "Tokens by arm and kind.", (*arm, "kind"), registry=self._registry)
        self.refused = Counter(
            "tunesmith_refused", "Requests answered with an error, by status.", ("status",), registry=self._registry
        )
        self.unrecorded = Counter(
            "tunesmith_unrecorded_requests", "Answers whose record was lost.", registry=self._registry
        )
        self.controller_failures = Counter(
            "tunesmith_controller_failures", "Rollout checks that failed.", registry=self._registry
        )
        self.champions_refused = Gauge(
            "tunesmith_champions_refused",
            "Champions that may not serve now: expired, recalled, not approved or not validly signed.",
            registry=self._registry,
        )

    def request(self, arm: str, outcome: str, seconds: float, completion: Completion | None) -> None:
        """Count one request."""
        self._requests.labels(arm, outcome).inc()
        self._seconds.labels(arm).observe(seconds)
        if completion is not None:
            self._tokens.labels(arm, "prompt").inc(completion.prompt_tokens)
            self._tokens.labels(arm, "completion").inc(completion.completion_tokens)

    def watch_queue(self, length: Callable[[], int]) -> None:
        """Show the length of the queue, read at each scrape."""
        gauge = Gauge("tunesmith_waiting_requests", "Requests that wait for the engine.", registry=self._registry)
        gauge.set_function(length)

    def exposition(self) -> bytes:
        """The metrics in Prometheus's text format."""
        return generate_latest(self._registry)
