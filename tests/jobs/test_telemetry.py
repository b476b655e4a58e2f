"""Traces of jobs, and what the environment may ask of OpenTelemetry."""

from typing import Any

import pytest

from tests.otlp_receiver import attributes, otlp_receiver
from tests.webhooks.conftest import project_of
from tunesmith.core import telemetry
from tunesmith.core.errors import Refused, UsageError
from tunesmith.jobs import queue
from tunesmith.services import training
from tunesmith.services.jobs import working
from tunesmith.store.store import Store

ENDPOINT = "OTEL_EXPORTER_OTLP_ENDPOINT"


def test_the_steps_of_a_job_are_spans(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    def run(_project: Any, *, progress: Any, **_: Any) -> None:
        with progress.task("training", 2) as task:
            task.advance(2)
        with progress.task("answers", 2):
            raise Refused("SECRET text of a row")

    monkeypatch.setattr("tunesmith.jobs.kinds.run", run)
    monkeypatch.setenv("OTEL_SERVICE_NAME", "nightly")
    with otlp_receiver(monkeypatch) as receiver, pytest.raises(Refused):
        training.run_here(project_of(store))
    (job,), (training_span,), (answers,) = map(receiver.named, ("job", "training", "answers"))
    stated = {"tunesmith.job.id": 1, "tunesmith.job.kind": "run", "tunesmith.project": "tiny", "error.type": "Refused"}
    assert attributes(job) == stated
    assert training_span.parent_span_id == answers.parent_span_id == job.span_id
    assert (training_span.status.code, answers.status.code, job.status.code) == (0, 2, 2)
    assert b"SECRET" not in receiver.raw
    assert receiver.resource["service.name"] == "nightly"


def test_nothing_is_sent_unless_it_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(telemetry, "_started", None)
    for given in ({}, {ENDPOINT: ""}, {ENDPOINT: "http://127.0.0.1:9", "OTEL_SDK_DISABLED": "True "}):
        for name, value in given.items():
            monkeypatch.setenv(name, value)
        with telemetry.sending(), telemetry.span("x"):
            assert telemetry.active() is None, given


def test_what_is_not_honoured_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(telemetry, "_is_installed", lambda: True)
    for name, value, said in (
        ("OTEL_EXPORTER_OTLP_PROTOCOL", "grpc", "http/protobuf"),
        ("OTEL_EXPORTER_OTLP_METRICS_PROTOCOL", "http/json", "http/protobuf"),
        ("OTEL_TRACES_EXPORTER", "console", "not an exporter"),
    ):
        with monkeypatch.context() as patch:
            patch.setenv(name, value)
            assert telemetry.check() == ()
            patch.setenv(ENDPOINT, "http://127.0.0.1:9")
            with pytest.raises(UsageError, match=said) as refused:
                telemetry.check()
            assert refused.value.where == name
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "http://127.0.0.1:9")
    assert telemetry.check() == ("traces",)
    monkeypatch.setenv(ENDPOINT, "http://127.0.0.1:9")
    monkeypatch.setenv("OTEL_TRACES_EXPORTER", "none")
    assert telemetry.check() == ("metrics",)


def test_without_the_packages_a_start_is_refused_and_no_job_begun(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(telemetry, "_is_installed", lambda: False)
    monkeypatch.setenv(ENDPOINT, "http://127.0.0.1:9")
    for start in (training.run_here, lambda project: working(project, print).__enter__()):
        with pytest.raises(UsageError, match="not installed") as refused:
            start(project_of(store))
        assert "tunesmith[telemetry]" in str(refused.value.fix)
    assert queue.list_jobs(store) == []
