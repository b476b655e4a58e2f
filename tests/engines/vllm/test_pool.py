"""Several vLLM servers that answer as one: each request is answered once, also where a server ends in the middle."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.adapters import write_adapter
from tests.engines.vllm.vllm_server import FakeVllm, serving, serving_process
from tests.tiny import write_model
from tests.waiting import until
from tunesmith.core.errors import Refused, TunesmithError
from tunesmith.core.messages import Message
from tunesmith.engines.protocol import Generation, Question
from tunesmith.engines.settings import VllmSettings
from tunesmith.engines.vllm import http as vllm_http
from tunesmith.engines.vllm import pool as vllm_pool
from tunesmith.engines.vllm.engine import VllmEngine
from tunesmith.models.base import Base, resolve_base
from tunesmith.store.store import Store

REQUESTS = [
    Generation((Message(role="user", content=f"turn on light {number}"),), max_tokens=8) for number in range(24)
]


class Heard:
    """A Progress that keeps what it is told, and does something when some units are done."""

    def __init__(self, after: int = 0, do: object = None) -> None:
        self.lines: list[str] = []
        self.done, self._after, self._do = 0.0, after, do

    def __enter__(self) -> Heard:
        return self

    def __exit__(self, *_: object) -> None:
        return None

    def task(self, title: str, total: float) -> Heard:
        return self

    def say(self, text: str) -> None:
        self.lines.append(text)

    def note(self, text: str) -> None:
        return None

    def advance(self, amount: float = 1.0) -> None:
        self.done += amount
        if self.done == self._after and callable(self._do):
            self._do()


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TUNESMITH_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(vllm_http, "_FIRST_WAIT", 0.001)
    monkeypatch.setattr(vllm_pool, "_FIRST_WAIT", 0.01)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Base:
    folder = tmp_path_factory.mktemp("base")
    write_model(folder / "m")
    return resolve_base(Store(folder / "store"), "m", folder)


@pytest.fixture(scope="module")
def adapter(base: Base, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_adapter(tmp_path_factory.mktemp("adapter") / "a", base, strength=0.5)


@pytest.fixture
def two(base: Base) -> Iterator[tuple[list[FakeVllm], list[str]]]:
    """Two servers and their URLs."""
    fakes = [FakeVllm(base.folder), FakeVllm(base.folder)]
    with ExitStack() as stack:
        yield fakes, [stack.enter_context(serving(fake)) for fake in fakes]


def _settings(urls: list[str], concurrency: int = 3) -> VllmSettings:
    return VllmSettings(kind="vllm", urls=tuple(urls), retries=1, concurrency=concurrency)


def _completions(fake: FakeVllm) -> list[tuple[int, ...]]:
    """The prompts of the requests for answers that a server heard."""
    return [tuple(body["prompt"]) for path, body in fake.heard if path == "/v1/completions" and "logprobs" not in body]


def test_servers_share_the_requests(base: Base, adapter: Path, two: tuple[list[FakeVllm], list[str]]) -> None:
    fakes, urls = two
    alone = VllmEngine(base, VllmSettings(kind="vllm", url=urls[0]))
    alone.load_adapter("a", adapter)
    expected = alone.generate(REQUESTS, "a")
    fakes[0].restart()
    fakes[0].heard.clear()
    fakes[0].busiest = 0
    reported = Heard()
    engine = VllmEngine(base, _settings(urls), reported)
    engine.load_adapter("a", adapter)
    assert reported.lines == []
    assert [len(fake.paths) for fake in fakes] == [1, 1], "each server has the adapter"
    assert engine.generate(REQUESTS, "a") == expected
    heard = [_completions(fake) for fake in fakes]
    assert sorted(heard[0] + heard[1]) == sorted({*heard[0], *heard[1]}), "each was sent once"
    assert min(map(len, heard)) >= 3, "the least busy server gets the next one"
    assert max(fake.busiest for fake in fakes) <= 3, "as many at once on each as the settings say"
    questions = [Question(REQUESTS[0].messages, ("yes", "no", "the light"))]
    fakes[1].faults = ["drop"] * 3
    assert engine.choose(questions) == alone.choose(questions)


def test_a_server_killed_in_the_middle_loses_nothing(base: Base, adapter: Path) -> None:
    with serving(FakeVllm(base.folder)) as kept, serving_process(base.folder) as (killed, url):
        engine = VllmEngine(base, _settings([kept, url]))
        engine.load_adapter("a", adapter)
        undisturbed = engine.generate(REQUESTS, "a")
        heard = Heard(after=4, do=killed.kill)  # SIGKILL
        engine = VllmEngine(base, _settings([url, kept]), heard)
        engine.load_adapter("a", adapter)
        assert engine.generate(REQUESTS, "a", heard) == undisturbed
        assert heard.done == len(REQUESTS), "each was answered once"
        killed.join(300)
        assert killed.exitcode == -9
        assert any("cannot be reached" in line and line.endswith("the other servers answer") for line in heard.lines)
        (answer,) = engine.generate(REQUESTS[:1], "a")
        assert answer == undisturbed[0]


def test_a_server_that_comes_back_is_checked_and_used_again(
    base: Base, adapter: Path, two: tuple[list[FakeVllm], list[str]]
) -> None:
    fakes, urls = two
    heard = Heard()
    engine = VllmEngine(base, _settings(urls), heard)
    engine.load_adapter("a", adapter)
    expected = engine.generate(REQUESTS, "a")
    fakes[0].faults = ["fail"]  # EngineCore died
    assert engine.generate(REQUESTS[:6], "a") == expected[:6]
    fakes[0].restart()  # without the adapter
    until(lambda: any("answers again" in line for line in heard.lines))
    fakes[0].heard.clear()
    assert engine.generate(REQUESTS, "a") == expected
    assert _completions(fakes[0]), "it is used again"
    assert len(fakes[0].paths) == 1, "it has the adapter again"


def test_a_server_that_comes_back_as_another_is_not_used(
    base: Base, two: tuple[list[FakeVllm], list[str]], tmp_path: Path
) -> None:
    fakes, urls = two
    heard = Heard()
    engine = VllmEngine(base, _settings(urls), heard)
    expected = engine.generate(REQUESTS)
    fakes[0].restart(write_model(tmp_path / "other", seed=1))
    fakes[0].faults = ["fail"]
    assert engine.generate(REQUESTS[:6]) == expected[:6]
    until(lambda: any("runs another model" in line and "not used" in line for line in heard.lines))
    fakes[0].heard.clear()
    assert engine.generate(REQUESTS) == expected
    assert _completions(fakes[0]) == []
    with pytest.raises(Refused, match="runs another model"):
        VllmEngine(base, _settings(urls))


def test_a_server_that_is_away_at_first_is_used_later(
    base: Base, adapter: Path, two: tuple[list[FakeVllm], list[str]]
) -> None:
    fakes, urls = two
    heard = Heard()
    fakes[1].faults = ["drop"] * 10_000  # until the engine was opened
    engine = VllmEngine(base, _settings(urls), heard)
    assert any(f"{urls[1]}: the vLLM server cannot be reached" in line for line in heard.lines)
    engine.load_adapter("a", adapter)
    fakes[1].faults = []
    until(lambda: any("answers again" in line for line in heard.lines))
    fakes[1].heard.clear()
    assert len(engine.generate(REQUESTS, "a")) == len(REQUESTS)
    assert _completions(fakes[1])
    assert len(fakes[1].paths) == 1, "it loads the adapter when it is needed there"
    with pytest.raises(TunesmithError, match="cannot be reached"):
        VllmEngine(base, _settings(["http://127.0.0.1:9", "http://127.0.0.1:10"]))


def test_a_request_that_every_server_fails_is_an_error(base: Base, two: tuple[list[FakeVllm], list[str]]) -> None:
    fakes, urls = two
    engine = VllmEngine(base, _settings(urls))
    for fake in fakes:
        fake.faults = ["fail"]
    before = sum(len(fake.heard) for fake in fakes)
    with pytest.raises(TunesmithError, match="status 500: EngineCore"):
        engine.generate(REQUESTS[:1])
    heard = [body for fake in fakes for _, body in fake.heard][before:]
    assert sum(body is not None and "logprobs" not in body for body in heard) <= 2, "once to each"


def test_a_stream_is_sent_again_only_before_its_first_text(base: Base, two: tuple[list[FakeVllm], list[str]]) -> None:
    fakes, urls = two
    engine = VllmEngine(base, _settings(urls))
    (expected,) = engine.generate(REQUESTS[:1])
    fakes[0].faults = ["fail"]
    *pieces, last = engine.stream(REQUESTS[0])
    assert (last, "".join(map(str, pieces))) == (expected, expected.text)
    until(lambda: all(server.usable for server in engine._pool._servers))
    fakes[0].faults = ["break"]
    with pytest.raises(TunesmithError, match="EngineCore died"):
        list(engine.stream(REQUESTS[0]))
