"""Requests a minute of each token and tenant."""

from __future__ import annotations

from typing import Any

import openai
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.attack_table import Happened
from tests.fabricate import OPERATOR, Scene
from tests.server.conftest import running
from tests.server.fake_engine import FakeEngine
from tunesmith.server.errors import ApiError
from tunesmith.server.intake import rates
from tunesmith.server.intake.rates import Rates
from tunesmith.server.settings import ServerSettings
from tunesmith.store.people.tokens import issue_token


class Clock:
    """A time that a test moves."""

    now = 1000.0

    def __call__(self) -> float:
        return self.now


def limited(clock: Clock, token: int = 0, tenant: int = 0) -> Rates:
    return Rates(ServerSettings(token_rate=token, tenant_rate=tenant), clock)


def taken(limits: Rates, of: str = "a", tenant: str = "") -> dict[str, str]:
    scope: dict[str, Any] = {}
    limits.take(scope, of, tenant)
    return dict(scope.get("tunesmith.rate", {}))


def allowed(limits: Rates, of: str = "a", tenant: str = "") -> bool:
    try:
        taken(limits, of, tenant)
    except ApiError:
        return False
    return True


def test_a_token_sends_its_requests_and_then_one_after_the_other() -> None:
    clock = Clock()
    limits = limited(clock, token=3)
    found = [taken(limits) for _ in range(3)]
    assert [each["x-ratelimit-remaining-requests"] for each in found] == ["2", "1", "0"]
    assert [each["x-ratelimit-reset-requests"] for each in found] == ["20s", "40s", "1m0s"]
    written = [rates._duration(seconds) for seconds in (0, 0.0151, 1, 59.2, 61, 360)]
    assert written == ["0ms", "16ms", "1s", "1m0s", "1m1s", "6m0s"], "as OpenAI writes durations"
    with pytest.raises(ApiError) as caught:
        taken(limits)
    assert (caught.value.status, caught.value.headers["Retry-After"]) == (429, "20")
    assert "3 requests per minute" in caught.value.message
    assert allowed(limits, "b")
    clock.now += 19.9
    assert not allowed(limits)
    clock.now += 0.1
    assert allowed(limits)
    assert not allowed(limits)
    clock.now += 3600
    assert [allowed(limits) for _ in range(4)] == [True, True, True, False]


def test_all_tokens_of_a_tenant_share_its_limit_and_a_refused_request_counts_for_neither() -> None:
    clock = Clock()
    limits = limited(clock, token=2, tenant=3)
    assert [allowed(limits, "a", "acme") for _ in range(3)] == [True, True, False]
    assert [allowed(limits, "b", "acme") for _ in range(2)] == [True, False]
    assert allowed(limits, "c", "umbra")
    with pytest.raises(ApiError, match="for this tenant: 3"):
        taken(limits, "b", "acme")
    clock.now += 20
    assert taken(limits, "b", "acme")["x-ratelimit-limit-requests"] == "3"


@given(st.integers(1, 30), st.lists(st.floats(0, 30), min_size=1, max_size=80))
def test_no_minute_has_more_than_a_full_bucket_and_what_flows_in(most: int, gaps: list[float]) -> None:
    clock = Clock()
    limits = limited(clock, token=most)
    passed: list[float] = []
    for gap in gaps:
        clock.now += gap
        if allowed(limits):
            passed.append(clock.now)
    for place, first in enumerate(passed):
        within = [at for at in passed[place:] if at - first <= 60]
        assert len(within) <= 2 * most + 1
    assert passed[0] == 1000.0 + gaps[0]


@pytest.mark.attack("overload", "a flood of different tokens")
def test_buckets_take_bounded_memory(monkeypatch: pytest.MonkeyPatch, happened: Happened) -> None:
    monkeypatch.setattr(rates, "_KEPT", 100)
    clock = Clock()
    limits = limited(clock, token=2)
    taken(limits, "mine")
    taken(limits, "mine")
    for number in range(60):
        clock.now += 0.001
        taken(limits, f"t{number}")
    assert not allowed(limits, "mine")
    for number in range(1000):
        clock.now += 0.001
        taken(limits, f"u{number}")
    assert limits._tokens is not None
    assert len(limits._tokens._full_at) <= 100
    happened("bounded")


def test_openais_client_is_told_of_the_limit(scene: Scene, engine: FakeEngine) -> None:
    with running(scene, engine, token_rate=2) as served, served.http() as http:
        served.serving.rates._clock = Clock()
        first = http.get("/v1/models").headers
        assert (first["x-ratelimit-limit-requests"], first["x-ratelimit-remaining-requests"]) == ("2", "1")
        assert "x-ratelimit-limit-requests" not in http.get("/healthz").headers
        assert http.get("/api/rollouts/99").headers["x-ratelimit-remaining-requests"] == "0"
        with pytest.raises(openai.RateLimitError) as caught:
            served.client().models.list()
        assert (caught.value.code, caught.value.type) == ("rate_limit_exceeded", "rate_limit_error")
        told = caught.value.response.headers
        assert (told["retry-after"], told["x-ratelimit-remaining-requests"]) == ("30", "0")
        other = issue_token(scene.store, OPERATOR, actor=OPERATOR, name="other")
        assert served.client(other).models.list().data
