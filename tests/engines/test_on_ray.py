"""Requests shared over workers of Ray, with a stand-in for Ray. A real cluster: tests/pipeline/test_together.py."""

from __future__ import annotations

import json
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tests.said import Said
from tests.tiny import write_model
from tunesmith.core.errors import Refused, TunesmithError, UsageError
from tunesmith.core.messages import Message
from tunesmith.core.progress import Silent
from tunesmith.engines import on_ray
from tunesmith.engines.factory import open_engine
from tunesmith.engines.on_ray import RayEngine
from tunesmith.engines.protocol import Generation, Question
from tunesmith.engines.settings import RaySettings
from tunesmith.models.base import Base, resolve_base
from tunesmith.store.store import Store
from tunesmith.training.launchers.on_ray import _fit, _Written


class _Lost(Exception):
    """What Ray raises for a worker that ended."""


class _TaskFailed(_Lost):
    """What Ray raises for an error in a worker."""


class _StandIn:
    """Runs workers in this process. dies: the numbers of the calls during which the worker ends."""

    exceptions = SimpleNamespace(RayError=_Lost, RayTaskError=_TaskFailed)

    def __init__(self, dies: frozenset[int] = frozenset()) -> None:
        self.dies, self.calls, self.started, self.ended = dies, 0, 0, 0

    def cluster_resources(self) -> dict[str, float]:
        return {"CPU": 4.0}

    def nodes(self) -> list[str]:
        return ["this machine"]

    def put(self, value: Any) -> Any:
        return value

    def wait(self, references: list[Any], **_: Any) -> tuple[list[Any], list[Any]]:
        return references[-1:], references[:-1]  # the newest first, so that answers come out of order

    def get(self, reference: Any) -> Any:
        return reference() if callable(reference) else reference

    def kill(self, _worker: Any) -> None:
        self.ended += 1

    def remote(self, kind: type) -> Any:
        def start() -> Any:
            self.started += 1
            worker = kind()
            return SimpleNamespace(load=self._method(worker.load), answer=self._method(worker.answer))

        return SimpleNamespace(options=lambda **_: SimpleNamespace(remote=start))

    def _method(self, method: Callable[..., Any]) -> Any:
        def call(*given: Any) -> Callable[[], Any]:
            self.calls += 1
            number = self.calls

            def result() -> Any:
                if number in self.dies:
                    raise _Lost
                return method(*given)

            return result

        return SimpleNamespace(remote=call)


@pytest.fixture
def base(tmp_path: Path) -> Base:
    write_model(tmp_path / "model")
    return resolve_base(Store(tmp_path / "store"), str(tmp_path / "model"), tmp_path)


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch) -> Callable[[_StandIn], _StandIn]:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")  # a worker sets it

    def use(ray: _StandIn) -> _StandIn:
        @contextmanager
        def connected(*_: Any) -> Iterator[_StandIn]:
            yield ray

        monkeypatch.setattr(on_ray, "connected", connected)
        monkeypatch.setitem(sys.modules, "ray", ray)
        return ray

    return use


def _requests(count: int) -> list[Generation]:
    texts = [f"turn on light {number}" for number in range(count)]
    return [Generation((Message(role="user", content=text),), max_tokens=4) for text in texts]


@pytest.mark.parametrize(
    "dies", [frozenset[int](), frozenset({2}), frozenset({4, 5})], ids=["none", "loads", "answers"]
)
def test_the_answers_of_this_process_in_their_order(
    base: Base, cluster: Callable[[_StandIn], _StandIn], dies: frozenset[int]
) -> None:
    ray, heard, here = cluster(_StandIn(dies)), Said(), open_engine(base)
    engine = RayEngine(base, "native", RaySettings(workers=2), heard)
    requests = _requests(9)
    assert engine.generate(requests) == here.generate(requests)
    assert list(engine.stream(requests[0]))[-1] == here.generate(requests[:1])[0]
    questions = [Question(request.messages, ("yes", "no")) for request in requests]
    for ours, theirs in zip(engine.choose(questions), here.choose(questions), strict=True):
        assert ours == pytest.approx(theirs, abs=1e-4)
    assert ray.started == 2 + len(dies)
    assert len(heard.lines) == len(dies)


def test_workers_that_keep_ending_are_given_up(base: Base, cluster: Callable[[_StandIn], _StandIn]) -> None:
    cluster(_StandIn(frozenset(range(100))))
    with pytest.raises(TunesmithError, match="4 workers that answer ended"):
        RayEngine(base, "native", RaySettings(workers=2)).generate(_requests(4))


def test_a_request_that_cannot_be_answered(base: Base, cluster: Callable[[_StandIn], _StandIn]) -> None:
    """As in this process; the workers end, and the next call starts others."""
    ray = cluster(_StandIn())
    engine = RayEngine(base, "native", RaySettings(workers=2))
    long = Generation((Message(role="user", content="light " * 2000),), max_tokens=4)
    with pytest.raises(UsageError):
        engine.generate([*_requests(3), long])
    assert len(engine.generate(_requests(2))) == 2
    assert ray.started == 4
    engine.release()
    with pytest.raises(Refused, match="not loaded"):
        engine.generate(_requests(1), "unknown")


def test_more_workers_than_this_machine_holds(
    base: Base, cluster: Callable[[_StandIn], _StandIn], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    cluster(_StandIn())
    with pytest.raises(Refused, match="5 workers with 1 CPU each, and the Ray cluster has 4 CPU"):
        RayEngine(base, "native", RaySettings(workers=5)).generate(_requests(1))


# The command that trains on a Ray cluster, while it waits


def test_it_shows_what_rank_0_says_and_returns_what_it_returns(tmp_path: Path) -> None:
    def fit() -> SimpleNamespace:
        said = _Written(tmp_path / "progress.txt")
        said.say("step 1")
        said.say("step 2")
        return SimpleNamespace(return_value="sha256:1")

    heard = Said()
    assert _fit(SimpleNamespace(fit=fit), tmp_path, heard) == "sha256:1"
    assert heard.lines == ["step 1", "step 2"]


def test_an_error_of_rank_0_ends_the_wait(tmp_path: Path) -> None:
    """The other ranks would wait for rank 0, and Ray for them."""
    never = threading.Event()

    def fit() -> None:
        error = Refused("the loss is not a number", where="step 3", fix="lower the rate")
        (tmp_path / "failed.json").write_text(json.dumps(error.as_json()["error"]))
        never.wait()

    with pytest.raises(Refused, match="not a number") as raised:
        _fit(SimpleNamespace(fit=fit), tmp_path, Silent())
    assert (raised.value.where, raised.value.fix) == ("step 3", "lower the rate")
    never.set()
