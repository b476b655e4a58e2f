"""The vLLM engine against recorded answers of a real server, which a tiny model fills: what it says and what it bears.

tests/slow/test_vllm.py asks a real one.
"""

import json
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.adapters import write_adapter
from tests.engines.vllm import vllm_server
from tests.engines.vllm.vllm_server import FakeVllm, serving
from tests.hf_models import base_of_family, write_hf_model
from tests.said import Said
from tests.tiny import write_model
from tests.waiting import until
from tunesmith.core.errors import Refused, TunesmithError, UsageError
from tunesmith.core.messages import Message
from tunesmith.core.progress import Task
from tunesmith.engines.factory import open_engine
from tunesmith.engines.native import engine as embedded
from tunesmith.engines.native.engine import NativeEngine
from tunesmith.engines.native.network.weights import load_network
from tunesmith.engines.protocol import Completion, Generation, Question
from tunesmith.engines.settings import VllmSettings
from tunesmith.engines.vllm import http as vllm_http
from tunesmith.engines.vllm import model_server
from tunesmith.engines.vllm.engine import VllmEngine
from tunesmith.models.base import Base, resolve_base
from tunesmith.store.store import Store

TEXTS = ["turn on", "is the door locked?", "x", "turn on the kitchen light and the hall light, please"]


def _requests(**how: Any) -> list[Generation]:
    return [Generation((Message(role="user", content=text),), **{"max_tokens": 10, **how}) for text in TEXTS]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Base:
    return base_of_family(tmp_path_factory.mktemp("base"), "llama")


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("other") / "m", seed=1)


@pytest.fixture(scope="module")
def adapter(base: Base, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_adapter(tmp_path_factory.mktemp("adapter") / "a", base, strength=0.5)


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """fp32, so that a wrong token is a mistake; no waiting; a cache of the test's own."""
    monkeypatch.setenv("TUNESMITH_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(vllm_http, "_FIRST_WAIT", 0.001)
    monkeypatch.setattr(model_server, "_FIRST_WAIT", 0.01)
    monkeypatch.setattr(embedded, "load_network", lambda folder: load_network(folder, torch.float32))


@pytest.fixture
def fake(base: Base) -> FakeVllm:
    return FakeVllm(base.folder)


@pytest.fixture
def url(fake: FakeVllm) -> Iterator[str]:
    with serving(fake) as found:
        yield found


@pytest.fixture
def engine(base: Base, url: str) -> VllmEngine:
    return VllmEngine(base, VllmSettings(kind="vllm", url=f"{url}/v1/", retries=2, concurrency=3))


def test_answers_equal_those_of_the_native_engine(
    base: Base, engine: VllmEngine, fake: FakeVllm, adapter: Path
) -> None:
    here = NativeEngine(base)
    for each in (here, engine):
        each.load_adapter("a", adapter)
    questions = [Question((Message(role="user", content=text),), ("yes", "no", "the light")) for text in TEXTS[:2]]
    for name in (None, "a"):
        assert engine.generate(_requests(), name) == here.generate(_requests(), name)
        for ours, theirs in zip(engine.choose(questions, name), here.choose(questions, name), strict=True):
            assert ours == pytest.approx(theirs, abs=1e-3)
        for request in _requests():
            *pieces, last = engine.stream(request, name)
            assert [last] == here.generate([request], name)
            assert isinstance(last, Completion)
            assert "".join(pieces) == last.text  # type: ignore[arg-type]
    whole = max(engine.generate(_requests(max_tokens=30)), key=lambda one: len(one.text)).text
    stopped = _requests(max_tokens=30, stop=(whole[4:7],))
    cut = engine.generate(stopped)
    assert cut == here.generate(stopped)
    assert any(one.by_stop_text for one in cut)
    assert engine.generate(_requests(), "a") != engine.generate(_requests())
    assert 1 < fake.busiest <= 3, "as many at once as the settings say"
    assert (engine.base, engine.context_length) == (here.base, here.context_length)
    fake.faults = ["page"]
    with pytest.raises(TunesmithError, match="not a JSON object"):
        engine.generate(_requests())


def test_requests_set_every_option(engine: VllmEngine, fake: FakeVllm) -> None:
    schema = {"type": "object", "properties": {"on": {"type": "boolean"}}}
    request = Generation(
        (Message(role="user", content="on"),), 7, 0.5, 0.9, seed=3, stop=("\n",), schema=json.dumps(schema)
    )
    engine.generate([request])
    path, body = fake.heard[-1]
    rendered = engine._renderer.prompt(request.messages)  # here, and sent as ids
    assert (path, body["prompt"]) == ("/v1/completions", rendered)
    wanted = {"max_tokens": 7, "temperature": 0.5, "top_p": 0.9, "seed": 3, "stop": ["\n"], "stop_token_ids": [1]}
    plain = {"top_k": 0, "min_p": 0.0, "repetition_penalty": 1.0, "presence_penalty": 0.0, "frequency_penalty": 0.0}
    assert body.items() >= (wanted | plain).items()
    assert body["structured_outputs"]["json"].items() >= schema.items()
    with pytest.raises(UsageError, match="cannot hold answers to a grammar"):
        engine.generate(_requests(grammar='start: "x"'))
    with pytest.raises(UsageError, match="own schema and another one at once") as caught:
        engine.generate(_requests(schema='{"allOf": [{}, {}]}', constrained_by="response_format.json_schema"))
    assert caught.value.where == "response_format"


def test_a_schema_that_the_server_rejects_is_the_requests_fault(
    engine: VllmEngine, fake: FakeVllm, monkeypatch: pytest.MonkeyPatch
) -> None:
    def reject(*_: Any) -> Any:
        raise UsageError("the vLLM server rejects the request: no such format", where="http://x")

    asked = _requests(schema='{"type": "object"}', constrained_by="response_format.json_schema")
    engine.generate(asked)
    assert fake.heard[-1][1]["structured_outputs"]["json"]["type"] == "object"
    monkeypatch.setattr(engine._pool, "choices", reject)
    for by, where in (("response_format.json_schema", "response_format.json_schema"), ("constrain", "http://x")):
        (request, *_) = _requests(schema="{}", constrained_by=by)
        for answer in (lambda: engine.generate([request]), lambda: list(engine.stream(request))):  # noqa: B023
            with pytest.raises(UsageError, match="no such format") as caught:
                answer()
            assert caught.value.where == where


def test_another_model_is_refused(base: Base, other: Path, tmp_path: Path) -> None:
    def refused(fake: FakeVllm, match: str, base: Base = base) -> None:
        with serving(fake) as url, pytest.raises(Refused, match=match):
            open_engine(base, VllmSettings(kind="vllm", url=url))

    phi3, another = (
        resolve_base(Store(tmp_path / "store"), str(write_hf_model(tmp_path / f"phi3-{seed}", "phi3", seed)), tmp_path)
        for seed in (0, 1)
    )
    with serving(FakeVllm(phi3.folder, room=256)) as url:  # a family that the native engine does not compute
        assert VllmEngine(phi3, VllmSettings(kind="vllm", url=url)).generate(_requests()[:1])
    refused(FakeVllm(phi3.folder, room=256), "log-probabilities", another)

    empty = FakeVllm(other)
    empty.models.clear()
    refused(empty, "no such model")
    refused(FakeVllm(other), "runs another model(.|\n)*log-probabilities")
    refused(FakeVllm(base.folder, room=4096), "context length is 4096")
    shuffled = write_model(tmp_path / "shuffled")
    tokenizer = json.loads((shuffled / "tokenizer.json").read_text())
    vocabulary = tokenizer["model"]["vocab"]
    vocabulary["a"], vocabulary["e"] = vocabulary["e"], vocabulary["a"]
    (shuffled / "tokenizer.json").write_text(json.dumps(tokenizer))
    refused(FakeVllm(shuffled), "tokenizer reads a fixed text differently")


def test_a_server_with_a_shorter_context(base: Base) -> None:
    with serving(FakeVllm(base.folder, room=64)) as url:
        engine = VllmEngine(base, VllmSettings(kind="vllm", url=url))
        assert engine.context_length == 64
        with pytest.raises(UsageError, match="context length is 64"):
            engine.generate([Generation((Message(role="user", content="!" * 60),))])
        (answer,) = engine.generate([Generation((Message(role="user", content="!" * 40),), max_tokens=500)])
        assert answer.prompt_tokens + answer.completion_tokens <= 64


def test_an_adapter_is_named_by_its_bytes(
    base: Base, engine: VllmEngine, fake: FakeVllm, adapter: Path, tmp_path: Path
) -> None:
    engine.load_adapter("a", adapter)
    engine.load_adapter("same", adapter)
    (there,) = fake.paths
    engine.load_adapter("a", write_adapter(tmp_path / "b", base, seed=7))
    assert len(fake.paths) == 2
    assert engine.generate(_requests(), "a") != engine.generate(_requests(), "same"), "reading it again replaces it"
    fake.paths[there] = "/elsewhere"
    engine.load_adapter("same", adapter)
    assert fake.paths[there] == str(tmp_path / "cache" / "vllm" / there), "a name that came to mean other files"


def test_adapters_that_the_server_rejects(
    base: Base, engine: VllmEngine, fake: FakeVllm, adapter: Path, other: Path, tmp_path: Path
) -> None:
    with pytest.raises(Refused, match="not loaded"):
        engine.generate(_requests(), "nobody")
    foreign = resolve_base(Store(tmp_path / "store"), other.name, other.parent)
    with pytest.raises(Refused, match="another base"):
        engine.load_adapter("x", write_adapter(tmp_path / "x", foreign))
    with pytest.raises(Refused, match=r"LoRA rank 64 is greater(.|\n)*--max-lora-rank"):
        engine.load_adapter("x", write_adapter(tmp_path / "y", base, rank=40))
    fake.ignore_adapters = True
    with pytest.raises(Refused, match="under the adapter's name exactly as the base does"):
        engine.load_adapter("x", adapter)
    fake.restart()
    with pytest.MonkeyPatch.context() as patch:
        real = fake._adapter
        patch.setattr(fake, "_adapter", lambda body: real({**body, "lora_path": "/nowhere"}))
        with pytest.raises(Refused, match=r"cannot read the adapter's files(.|\n)*engine.adapters"):
            engine.load_adapter("x", adapter)
    fake.loading = False
    with pytest.raises(Refused, match=r"Not Found(.|\n)*VLLM_ALLOW_RUNTIME_LORA_UPDATING"):
        engine.load_adapter("x", adapter)


def test_a_busy_or_restarted_server_is_tried_again_and_checked(
    base: Base, engine: VllmEngine, fake: FakeVllm, adapter: Path, other: Path
) -> None:
    engine.load_adapter("a", adapter)
    expected = engine.generate(_requests(), "a")
    for faults in (["busy", "busy"], ["drop"], ["drop", "busy"]):
        fake.faults = faults
        assert engine.generate(_requests()[:1], "a") == expected[:1], faults
        assert fake.faults == []
    fake.restart()
    assert engine.generate(_requests(), "a") == expected, "it gets its adapters again"
    fake.restart()
    *_, last = engine.stream(_requests()[0], "a")
    assert last == expected[0]
    fake.restart(other)
    with pytest.raises(Refused, match="another model"):
        engine.generate(_requests())
    fake.models[str(base.folder)] = fake.models[str(other)]  # under the old name: only the lost connection tells
    fake.faults = ["drop"]
    with pytest.raises(Refused, match="another model"):
        engine.generate(_requests()[:1])


def test_errors_of_the_server(base: Base, fake: FakeVllm, url: str) -> None:
    engine = VllmEngine(base, VllmSettings(kind="vllm", url=url, retries=2, concurrency=1))
    fake.faults = ["break"]
    with pytest.raises(TunesmithError, match="EngineCore died"):
        list(engine.stream(_requests()[0]))
    for faults, match in (
        (["busy"] * 3, "status 503: overloaded"),
        (["drop"] * 3, r"cannot be reached(.|\n)*vllm serve"),
        (["fail"], "status 500: EngineCore"),
    ):
        fake.faults = faults
        with pytest.raises(TunesmithError, match=match) as caught:
            engine.generate(_requests()[:1])
        assert caught.value.exit_code == 1
    for ends in ("abort", None):
        fake.ends = ends
        with pytest.raises(TunesmithError, match=f"ended an answer as {ends!r}"):
            engine.generate(_requests(max_tokens=1)[:1])
    fake.scores = False
    with pytest.raises(TunesmithError, match="no finite log-probability"):
        engine.choose([Question(_requests()[0].messages, ("yes",))])
    fake.faults = ["stall"]
    server = vllm_http.Server(url, VllmSettings(kind="vllm", url=url, answer_seconds=0.5), None)
    with pytest.raises(TunesmithError, match=r"no answer within 0\.5 s(.|\n)*engine.answer_seconds") as caught:
        server.ask("/v1/models")
    assert caught.value.exit_code == 1


def test_the_api_key_is_sent(base: Base, fake: FakeVllm, url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    fake.key = "k"
    with pytest.raises(Refused, match=r"does not accept the API key(.|\n)*engine.key_env"):
        VllmEngine(base, VllmSettings(kind="vllm", url=url))
    named = VllmSettings(kind="vllm", url=url, key_env="VLLM_KEY_OF_A_TEST")
    with pytest.raises(UsageError, match="VLLM_KEY_OF_A_TEST is not set"):
        VllmEngine(base, named)
    monkeypatch.setenv("VLLM_KEY_OF_A_TEST", "k")
    assert VllmEngine(base, named).generate(_requests()[:1])


# Several servers that answer as one: each request is answered once, also where a server ends in the middle


REQUESTS = [
    Generation((Message(role="user", content=f"turn on light {number}"),), max_tokens=8) for number in range(24)
]


class Heard(Said):
    """Keeps what it is told, and does something when some units are done."""

    def __init__(self, after: int = 0, do: Callable[[], object] = lambda: None) -> None:
        super().__init__()
        self.done, self._after, self._do = 0.0, after, do

    @contextmanager
    def task(self, name: str, total: float) -> Iterator[Task]:
        with super().task(name, total) as task:
            task.advance = self._advance  # type: ignore[method-assign]
            yield task

    def _advance(self, amount: float = 1.0) -> None:
        self.done += amount
        if self.done == self._after:
            self._do()


@pytest.fixture
def two(base: Base) -> Iterator[tuple[list[FakeVllm], list[str]]]:
    """Two servers and their URLs."""
    fakes = [FakeVllm(base.folder), FakeVllm(base.folder)]
    with ExitStack() as stack:
        yield fakes, [stack.enter_context(serving(fake)) for fake in fakes]


def _pool(urls: list[str], concurrency: int = 3) -> VllmSettings:
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
    engine = VllmEngine(base, _pool(urls), reported)
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
    command = [sys.executable, vllm_server.__file__, str(base.folder), "--port", "0"]
    with ExitStack() as stack:
        kept = stack.enter_context(serving(FakeVllm(base.folder)))
        killed = stack.enter_context(subprocess.Popen(command, stdout=subprocess.PIPE, text=True))
        stack.callback(killed.kill)
        assert killed.stdout is not None
        url = killed.stdout.readline().strip()
        engine = VllmEngine(base, _pool([kept, url]))
        engine.load_adapter("a", adapter)
        undisturbed = engine.generate(REQUESTS, "a")
        heard = Heard(after=4, do=killed.kill)  # SIGKILL
        engine = VllmEngine(base, _pool([url, kept]), heard)
        engine.load_adapter("a", adapter)
        assert engine.generate(REQUESTS, "a", heard) == undisturbed
        assert heard.done == len(REQUESTS), "each was answered once"
        assert killed.wait(300) == -9
        assert any("cannot be reached" in line and line.endswith("the other servers answer") for line in heard.lines)
        (answer,) = engine.generate(REQUESTS[:1], "a")
        assert answer == undisturbed[0]


def test_a_server_that_comes_back_is_checked_and_used_again(
    base: Base, other: Path, adapter: Path, two: tuple[list[FakeVllm], list[str]]
) -> None:
    fakes, urls = two
    heard = Heard()
    fakes[1].faults = ["drop"] * 10_000  # until the engine was opened
    engine = VllmEngine(base, _pool(urls), heard)
    assert any(f"{urls[1]}: the vLLM server cannot be reached" in line for line in heard.lines)
    engine.load_adapter("a", adapter)
    expected = engine.generate(REQUESTS, "a")
    for place in (1, 0):
        if place == 1:
            fakes[1].faults = []
        else:
            fakes[0].faults = ["fail"]  # EngineCore died
            assert engine.generate(REQUESTS[:6], "a") == expected[:6]
            fakes[0].restart()  # without the adapter
        until(lambda: any("answers again" in line for line in heard.lines))
        heard.lines.clear()
        fakes[place].heard.clear()
        assert engine.generate(REQUESTS, "a") == expected
        assert _completions(fakes[place]), "it is used again"
        assert len(fakes[place].paths) == 1, "it has the adapter again"
    fakes[0].restart(other)
    fakes[0].faults = ["fail"]
    assert engine.generate(REQUESTS[:6], "a") == expected[:6]
    until(lambda: any("runs another model" in line and "not used" in line for line in heard.lines))
    fakes[0].heard.clear()
    assert engine.generate(REQUESTS, "a") == expected
    assert _completions(fakes[0]) == []
    for wrong, error, said in (
        (urls, Refused, "runs another model"),
        (["http://127.0.0.1:9", "http://127.0.0.1:10"], TunesmithError, "cannot be reached"),
    ):
        with pytest.raises(error, match=said):
            VllmEngine(base, _pool(wrong))


def test_a_stream_is_sent_again_only_before_its_first_text(base: Base, two: tuple[list[FakeVllm], list[str]]) -> None:
    fakes, urls = two
    engine = VllmEngine(base, _pool(urls))
    (expected,) = engine.generate(REQUESTS[:1])
    fakes[0].faults = ["fail"]
    *pieces, last = engine.stream(REQUESTS[0])
    assert (last, "".join(map(str, pieces))) == (expected, expected.text)
    until(lambda: all(server.usable for server in engine._pool._servers))
    fakes[0].faults = ["break"]
    with pytest.raises(TunesmithError, match="EngineCore died"):
        list(engine.stream(REQUESTS[0]))
    until(lambda: all(server.usable for server in engine._pool._servers))
    before = sum(len(_completions(fake)) for fake in fakes)
    fakes[0].faults, fakes[1].faults = ["fail"], ["fail"]
    with pytest.raises(TunesmithError, match="status 500: EngineCore"):
        engine.generate(REQUESTS[:1])
    assert sum(len(_completions(fake)) for fake in fakes) - before <= 2, "once to each"


def test_a_process_that_ends_while_it_checks_a_server_says_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    class Ending:
        def check_failed(self) -> bool:
            raise RuntimeError("cannot schedule new futures after interpreter shutdown")

    with pytest.raises(RuntimeError):  # of a process that lives it is an error
        model_server._check_again(Ending)  # type: ignore[arg-type]
    monkeypatch.setattr(threading.main_thread(), "is_alive", lambda: False)
    model_server._check_again(Ending)  # type: ignore[arg-type]
