"""Traces and metrics of requests, as a receiver of OpenTelemetry gets them."""

import pytest

from tests.fabricate import NAME
from tests.otlp_receiver import attributes, otlp_receiver
from tests.server.conftest import StartServer
from tests.server.fake_engine import FakeEngine
from tunesmith.core import telemetry

TRACE = "0af7651916cd43dd8448eb211c80319c"
PARENT = "b7ad6b7169203331"
SECRET = "the sentence nobody else may read"


def test_requests_are_spans_and_measured(
    start_server: StartServer, engine: FakeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    messages = [{"role": "user", "content": SECRET}]
    body = {"model": NAME, "messages": messages, "temperature": 0, "max_tokens": 30, "seed": 7}
    carried = {"traceparent": f"00-{TRACE}-{PARENT}-01"}
    with otlp_receiver(monkeypatch) as receiver, telemetry.sending():
        server = start_server()
        with server.http() as http:
            assert http.post("/v1/chat/completions", json=body, headers=carried).status_code == 200
            assert "[DONE]" in http.post("/v1/chat/completions", json={**body, "stream": True}).text
            assert http.post("/v1/chat/completions", json={**body, "model": "other"}).status_code == 404
            assert http.get("/healthz").status_code == 200
            engine.answer = lambda *_: 1 / 0  # type: ignore[return-value]
            assert http.post("/v1/chat/completions", json=body).status_code == 500
            shown = http.get("/metrics").text
        server.stop()
    plain, streams, failed = receiver.named(f"chat {NAME}")
    stated = attributes(plain)
    expected = {
        "http.request.method": "POST", "http.route": "/v1/chat/completions", "http.response.status_code": 200,
        "gen_ai.operation.name": "chat", "gen_ai.provider.name": "tunesmith", "gen_ai.request.model": NAME,
        "gen_ai.response.model": f"{NAME}@v1", "gen_ai.response.finish_reasons": ["stop"],
        "gen_ai.request.temperature": 0.0, "gen_ai.request.max_tokens": 30, "gen_ai.request.seed": 7,
        "tunesmith.rollout.arm": "stable",
    }  # fmt: skip
    assert {key: stated.get(key) for key in expected} == expected
    assert stated["gen_ai.usage.input_tokens"] > 0
    assert (plain.trace_id.hex(), plain.parent_span_id.hex()) == (TRACE, PARENT)
    assert attributes(streams)["gen_ai.request.stream"] is True
    assert attributes(streams)["gen_ai.usage.output_tokens"] > 0
    assert attributes(failed)["error.type"] == "500"
    assert failed.status.code == 2
    parts = [span for span in receiver.spans if span.parent_span_id == plain.span_id]
    assert [span.name for span in parts] == ["queue", "answer"]
    (refused,) = receiver.named("POST /v1/chat/completions")
    assert attributes(refused)["http.response.status_code"] == 404
    assert refused.status.code == 0, "the client's mistake is no error of the server"
    assert len(receiver.spans) == 4 + 3 * 2, "health checks are not traced"

    (answered, duration), (_, broken) = sorted(
        receiver.points("gen_ai.server.request.duration"), key=lambda point: point[0]["tunesmith.outcome"]
    )
    assert (duration.count, broken.count) == (2, 1)
    assert (answered["gen_ai.response.model"], answered["tunesmith.rollout.arm"]) == (f"{NAME}@v1", "stable")
    tokens = {stated["gen_ai.token.type"]: point for stated, point in receiver.points("gen_ai.client.token.usage")}
    assert tokens["input"].sum == 2 * stated["gen_ai.usage.input_tokens"]
    assert f'tunesmith_tokens_total{{arm="stable",kind="prompt"}} {tokens["input"].sum:.1f}' in shown
    ((_, refusals),) = [each for each in receiver.points("tunesmith_refused") if each[0]["status"] == "404"]
    assert refusals.as_double == 1
    assert receiver.points("tunesmith_waiting_requests")[0][1].as_double == 0
    assert receiver.resource["service.name"] == "tunesmith"
    assert SECRET.encode() not in receiver.raw
