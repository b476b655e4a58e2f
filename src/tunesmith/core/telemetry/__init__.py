"""Traces and metrics for OpenTelemetry, sent as OTLP over HTTP where OTEL_EXPORTER_OTLP_ENDPOINT is set.

Only OpenTelemetry's own environment variables configure it. Without an endpoint nothing is imported, and every function
here does nothing. Sending happens in the background: a receiver that is down costs lost spans, and no request waits.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import threading
import time
from collections.abc import Iterator, Mapping
from importlib.metadata import version
from typing import TYPE_CHECKING

from tunesmith.core.errors import UsageError
from tunesmith.core.telemetry import names

if TYPE_CHECKING:
    from opentelemetry.sdk.metrics import MeterProvider
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.util.types import AttributeValue

_ENDPOINT = "OTEL_EXPORTER_OTLP_ENDPOINT"
_LAST_SECONDS = 3.0  # that a process waits for what is not sent yet, when it ends
_active: Telemetry | None = None


class Telemetry:
    """What sends the spans and metrics of this process. None: that signal is not sent."""

    def __init__(self, traces: TracerProvider | None, metrics: MeterProvider | None) -> None:
        from opentelemetry.metrics import NoOpMeterProvider
        from opentelemetry.trace import NoOpTracerProvider

        self._providers = [provider for provider in (traces, metrics) if provider is not None]
        self.tracer = (traces or NoOpTracerProvider()).get_tracer(names.SERVICE)
        self.meter = (metrics or NoOpMeterProvider()).get_meter(names.SERVICE)

    def stop(self) -> None:
        """Send what is left, within a few seconds."""
        threads = [threading.Thread(target=provider.shutdown, daemon=True) for provider in self._providers]
        for thread in threads:
            thread.start()
        until = time.monotonic() + _LAST_SECONDS
        for thread in threads:
            thread.join(max(0.0, until - time.monotonic()))


def check() -> tuple[str, ...]:
    """The signals that the environment asks for: traces, metrics, both or none.

    Raises UsageError for a setting that Tunesmith does not honour, and where the packages are missing.
    """
    if os.environ.get("OTEL_SDK_DISABLED", "").strip().lower() == "true":
        return ()
    wanted = tuple(signal for signal in ("traces", "metrics") if _is_wanted(signal))
    if wanted and not _is_installed():
        raise UsageError(
            "OpenTelemetry's packages are not installed",
            where=_ENDPOINT,
            fix='pip install "tunesmith[telemetry]", or unset the variable',
        )
    return wanted


def _is_wanted(signal: str) -> bool:
    own = f"OTEL_EXPORTER_OTLP_{signal.upper()}_ENDPOINT"
    if not (os.environ.get(_ENDPOINT) or os.environ.get(own)):
        return False
    for name in ("OTEL_EXPORTER_OTLP_PROTOCOL", f"OTEL_EXPORTER_OTLP_{signal.upper()}_PROTOCOL"):
        if (given := os.environ.get(name, "")) not in ("", "http/protobuf"):
            raise UsageError(
                f"{given!r} is not spoken here, http/protobuf is",
                where=name,
                fix="unset it, and name the receiver's port for OTLP over HTTP (often 4318)",
            )
    exporter = os.environ.get(name := f"OTEL_{signal.upper()}_EXPORTER", "")
    if exporter not in ("", "otlp", "none"):
        raise UsageError(f"{exporter!r} is not an exporter here", where=name, fix="write otlp or none")
    return exporter != "none"


def _is_installed() -> bool:
    try:
        return importlib.util.find_spec("opentelemetry.exporter.otlp.proto.http") is not None
    except ModuleNotFoundError:
        return False


def active() -> Telemetry | None:
    """What sends in this process; None where nothing is sent."""
    return _active


@contextlib.contextmanager
def sending() -> Iterator[None]:
    """Send spans and metrics meanwhile, where the environment asks for that. Raises what check raises."""
    global _active
    wanted = check()
    if not wanted or _active is not None:
        yield
        return
    _active = _started(wanted)
    try:
        yield
    finally:
        ending, _active = _active, None
        ending.stop()


def _started(wanted: tuple[str, ...]) -> Telemetry:
    from opentelemetry.exporter.otlp.proto.http.metric_exporter import OTLPMetricExporter
    from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
    from opentelemetry.sdk.metrics import MeterProvider
    from opentelemetry.sdk.metrics.export import PeriodicExportingMetricReader
    from opentelemetry.sdk.resources import Resource
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import BatchSpanProcessor

    resource = Resource.create({names.SERVICE_VERSION: version("tunesmith")})
    if str(resource.attributes[names.SERVICE_NAME]).startswith("unknown_service"):  # the environment names none
        resource = resource.merge(Resource({names.SERVICE_NAME: names.SERVICE}))
    traces = metrics = None
    # The providers are this module's, not the process's: libraries that trace by themselves keep theirs.
    if "traces" in wanted:
        traces = TracerProvider(resource=resource, shutdown_on_exit=False)
        traces.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
    if "metrics" in wanted:
        reader = PeriodicExportingMetricReader(OTLPMetricExporter())
        metrics = MeterProvider([reader], resource=resource, shutdown_on_exit=False)
    return Telemetry(traces, metrics)


@contextlib.contextmanager
def span(name: str, attributes: Mapping[str, AttributeValue] | None = None) -> Iterator[None]:
    """A span around the block, inside the span that is open in this thread. An error's text is not sent."""
    if _active is None:
        yield
        return
    from opentelemetry.trace import StatusCode

    quiet = {"record_exception": False, "set_status_on_exception": False}
    with _active.tracer.start_as_current_span(name, attributes=attributes, **quiet) as opened:  # type: ignore[arg-type]
        try:
            yield
        except BaseException as error:
            opened.set_attribute(names.ERROR, type(error).__name__)
            opened.set_status(StatusCode.ERROR)
            raise
