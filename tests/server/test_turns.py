"""What callers share: places of the engine, values that are made once for all who look, and requests a minute."""

import asyncio
from typing import Any

import openai
import pytest

from tests.fabricate import OPERATOR, Scene
from tests.server.conftest import running
from tests.server.fake_engine import FakeEngine
from tunesmith.server.console.releases import Shared
from tunesmith.server.errors import ApiError
from tunesmith.server.intake import rates
from tunesmith.server.intake.rates import Rates
from tunesmith.server.limits import ServerSettings
from tunesmith.server.turns import Turns
from tunesmith.store.people.tokens import issue_token


def begun(turns: Turns[str]) -> list[str]:
    found = []
    while (job := turns.begin()) is not None:
        found.append(job)
    return found


@pytest.mark.parametrize(("places", "alone"), [(1, 1), (2, 1), (3, 2), (8, 7), (32, 28)])
def test_one_user_leaves_a_place_for_the_next(places: int, alone: int) -> None:
    turns: Turns[str] = Turns(places)
    for _ in range(100):
        turns.add("first", "f")
    assert len(begun(turns)) == alone
    turns.add("second", "s")
    assert begun(turns) == (["s"] if places > 1 else [])
    assert turns.held_by("first") == 100


def test_a_place_stays_free_for_each_next_user() -> None:
    turns: Turns[str] = Turns(32)
    for user in "abcde":
        for _ in range(100):
            turns.add(user, user)
        assert begun(turns) == (["a"] * 28 if user == "a" else [user])
    turns.end("a")
    assert begun(turns) == []
    for _ in range(4):
        turns.end("a")
    assert begun(turns) == ["b"]


def test_who_waited_longest_is_next_and_fills_fewest_places() -> None:
    turns: Turns[str] = Turns(1)
    for job in ("a1", "a2", "a3", "b1", "b2", "c1"):
        turns.add(job[0], job)
    order = []
    while jobs := begun(turns):
        order += jobs
        turns.end(jobs[0][0])
    assert order == ["a1", "b1", "c1", "a2", "b2", "a3"]
    assert (len(turns), turns.held_by("a")) == (0, 0)


def test_dropped_jobs_hold_nothing() -> None:
    turns: Turns[str] = Turns(1)
    for job in ("a1", "a2", "b1"):
        turns.add(job[0], job)
    turns.drop(lambda job: job.startswith("a"))
    assert (len(turns), turns.held_by("a"), turns.waiting(), begun(turns)) == (1, 0, ["b1"], ["b1"])


# Values that are made once


def test_a_value_is_made_once_until_its_time_is_over() -> None:
    made: list[int] = []

    async def looked(seconds: float) -> list[int]:
        shared = Shared[int](seconds)

        async def make() -> int:
            await asyncio.sleep(0.01)
            made.append(1)
            return len(made)

        together = await asyncio.gather(*(shared.get("a", make) for _ in range(5)))
        return [*together, await shared.get("a", make), await shared.get("b", make)]

    assert asyncio.run(looked(600)) == [1, 1, 1, 1, 1, 1, 2]
    assert asyncio.run(looked(0))[5:] == [4, 5]


def test_a_failure_is_told_to_all_who_wait_and_not_kept() -> None:
    async def looked() -> int:
        shared = Shared[int](600)

        async def fail() -> int:
            await asyncio.sleep(0.01)
            raise ValueError

        async def make() -> int:
            return 7

        waiting = [asyncio.create_task(shared.get("a", fail)) for _ in range(2)]
        for each in waiting:
            with pytest.raises(ValueError):
                await each
        return await shared.get("a", make)

    assert asyncio.run(looked()) == 7


# Requests a minute of each token and tenant


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


@pytest.mark.attack("overload", "a flood of different tokens", "bounded")
def test_buckets_take_bounded_memory(monkeypatch: pytest.MonkeyPatch) -> None:
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
