"""Decoding: held against transformers' own, alone and in company, greedy and drawn, streamed and whole."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.said import Said
from tests.tiny import write_model
from tests.trained import lora_model, saved
from tunesmith.core.errors import Refused, UsageError
from tunesmith.core.messages import Message
from tunesmith.engines.factory import open_engine
from tunesmith.engines.native import engine as embedded
from tunesmith.engines.native.engine import NativeEngine
from tunesmith.engines.native.network.weights import load_network
from tunesmith.engines.protocol import Completion, Generation, Question
from tunesmith.engines.settings import EngineSettings
from tunesmith.models.base import Base, resolve_base
from tunesmith.models.rendering import Rendered
from tunesmith.store.store import Store
from tunesmith.training.settings import TrainSettings

SYSTEM = Message(role="system", content="You are a very brief assistant that turns on the kitchen light.")
TEXTS = ["turn on", "is the door locked?", "x", "turn on the kitchen light and the hall light, please", "off"]


def _requests(**how: object) -> list[Generation]:
    how = {"max_tokens": 12, **how}
    return [Generation((SYSTEM, Message(role="user", content=text)), **how) for text in TEXTS]  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Base:
    folder = tmp_path_factory.mktemp("base")
    write_model(folder / "m", "qwen3")
    return resolve_base(Store(folder / "store"), "m", folder)


@pytest.fixture(scope="module", autouse=True)
def _in_fp32() -> Iterator[None]:
    """fp32, so that a wrong token is a mistake and not rounding."""
    real = embedded.load_network
    embedded.load_network = lambda folder: load_network(folder, torch.float32)  # type: ignore[assignment]
    yield
    embedded.load_network = real


@pytest.fixture
def engine(base: Base) -> NativeEngine:
    return NativeEngine(base)


def _reference(base: Base, engine: NativeEngine, request: Generation) -> list[int]:
    model = AutoModelForCausalLM.from_pretrained(base.folder, dtype=torch.float32)
    ids = torch.tensor([engine._renderer.prompt(request.messages)])
    given = model.generate(ids, max_new_tokens=request.max_tokens, do_sample=False, pad_token_id=1)
    return [token for token in given[0, ids.shape[1] :].tolist() if token not in engine._renderer.stop_ids]


def test_greedy_answers_equal_those_of_transformers(base: Base, engine: NativeEngine) -> None:
    for request, answer in zip(_requests(), engine.generate(_requests()), strict=True):
        expected = _reference(base, engine, request)
        assert answer.text == engine._renderer.text(expected)
        assert answer.completion_tokens == len(expected)
        assert answer.prompt_tokens == engine._renderer.count_prompt(request.messages)


def test_an_answer_does_not_depend_on_other_requests(engine: NativeEngine) -> None:
    together = engine.generate(_requests())
    limits = [1, 7, 2, 12, 3]
    cut = [Generation(each.messages, max_tokens=limit) for each, limit in zip(_requests(), limits, strict=True)]
    for limited, free, limit in zip(engine.generate(cut), together, limits, strict=True):
        assert free.text.startswith(limited.text)
        assert limited.completion_tokens == limit
    assert [engine.generate([request])[0] for request in _requests()] == together
    assert engine.generate(list(reversed(_requests()))) == list(reversed(together))
    assert len(engine._prefixes) >= 1, "the shared beginning was kept"


def test_sampled_answers_repeat_with_their_seed(engine: NativeEngine) -> None:
    first = engine.generate(_requests(temperature=1.5, seed=3))
    assert engine.generate(_requests(temperature=1.5, seed=3)) == first
    assert engine.generate(_requests(temperature=1.5, seed=4)) != first
    assert engine.generate(_requests(temperature=1.5, seed=3, top_p=1e-9)) == engine.generate(_requests())


def test_streams_and_stop_texts(engine: NativeEngine) -> None:
    free = engine.generate(_requests(max_tokens=30))
    *pieces, last = engine.stream(_requests(max_tokens=30)[1])
    assert last == free[1]
    assert isinstance(last, Completion)
    assert len(pieces) > 1
    assert "".join(piece for piece in pieces if isinstance(piece, str)) == free[1].text
    place = max(range(len(free)), key=lambda one: len(free[one].text))
    stop = free[place].text[4:7]
    request = _requests(max_tokens=30, stop=(stop,))[place]
    (answer,) = engine.generate([request])
    assert answer.text == free[place].text.split(stop)[0]
    assert answer.finish == "stop"
    *pieces, last = engine.stream(request)
    assert last == answer
    assert "".join(pieces) == answer.text  # type: ignore[arg-type]


def _of_labels(model: Any, row: Rendered) -> float:
    """The summed log-probability of a row's labels, which are its last tokens, by transformers."""
    labels = torch.tensor(row.ids)[torch.tensor(row.trained)]
    with torch.no_grad():
        scores = model(torch.tensor([row.ids])).logits[0, -len(labels) - 1 : -1].log_softmax(-1)
    return float(scores.gather(1, labels[:, None]).sum())


def test_choices_score_as_in_transformers_in_batches_of_any_size(
    base: Base, engine: NativeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    questions = [Question((Message(role="user", content=text),), ("yes", "no" * 9, "the light")) for text in TEXTS]
    model = AutoModelForCausalLM.from_pretrained(base.folder, dtype=torch.float32)
    whole = engine.choose(questions)
    for question, scores in zip(questions, whole, strict=True):
        for choice, score in zip(question.choices, scores, strict=True):
            row = engine._renderer.answered(question.messages, choice)
            assert score == pytest.approx(_of_labels(model, row), abs=1e-3)
    monkeypatch.setattr(embedded, "_LOGIT_ROWS", 3)
    for together, tokens in ((2, 100), (64, 1)):
        monkeypatch.setattr(NativeEngine, "choice_rows", together)
        monkeypatch.setattr(NativeEngine, "choice_tokens", tokens)
        for found, expected in zip(engine.choose(questions), whole, strict=True):
            assert found == pytest.approx(expected, abs=1e-4)


def _adapter(folder: Path, base: Base, seed: int) -> Path:
    network = load_network(base.folder, torch.float32)
    lora = lora_model(network, TrainSettings(rank=4, seed=seed), base)
    with torch.no_grad():
        for master in lora.masters:
            master.normal_(std=0.3, generator=torch.Generator().manual_seed(seed))
    return saved(lora, folder)


def test_adapters_answer_as_in_peft(tmp_path: Path, base: Base, engine: NativeEngine) -> None:
    from peft import PeftModel

    plain = engine.generate(_requests())
    for name, seed in (("a", 1), ("b", 2)):
        engine.load_adapter(name, _adapter(tmp_path / name, base, seed))
    answers = {name: engine.generate(_requests(), name) for name in ("a", "b")}
    assert answers["a"] != plain
    assert answers["a"] != answers["b"]
    assert engine.generate(_requests()) == plain, "the base answers as before"
    model = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(base.folder, dtype=torch.float32), str(tmp_path / "a")
    )
    ids = torch.tensor([engine._renderer.prompt(_requests()[1].messages)])
    given = model.generate(input_ids=ids, max_new_tokens=12, do_sample=False, pad_token_id=1)[0, ids.shape[1] :]
    assert answers["a"][1].text == engine._renderer.text(given.tolist())
    with pytest.raises(Refused, match="not loaded"):
        engine.generate(_requests(), "nobody")
    write_model(tmp_path / "other", "qwen3", seed=5)
    other = resolve_base(Store(tmp_path / "store"), "other", tmp_path)
    with pytest.raises(Refused, match="another base"):
        engine.load_adapter("foreign", _adapter(tmp_path / "x", other, 1))


def test_a_prompt_as_long_as_the_context_is_refused(engine: NativeEngine) -> None:
    room = engine.context_length - engine._renderer.count_prompt((Message(role="user", content=""),))
    fits = Generation((Message(role="user", content="!" * (room - 1)),), max_tokens=5)
    (answer,) = engine.generate([fits])
    assert answer.completion_tokens <= 1
    with pytest.raises(UsageError, match="context length"):
        engine.generate([Generation((Message(role="user", content="!" * room),), max_tokens=5)])


SCHEMA = {
    "type": "object",
    "properties": {"a": {"enum": ["on", "off"]}, "n": {"type": "integer", "minimum": 1, "maximum": 3}},
    "required": ["a", "n"],
    "additionalProperties": False,
}


def test_a_constrained_answer_fits_its_schema(engine: NativeEngine) -> None:
    held = _requests(max_tokens=40, schema=json.dumps(SCHEMA))
    mixed = [*held[:3], *_requests(max_tokens=40)[3:]]
    free = engine.generate(_requests(max_tokens=40))
    answers = engine.generate(mixed)
    for answer in answers[:3]:
        assert answer.finish == "stop"
        jsonschema.validate(json.loads(answer.text), SCHEMA)
    assert answers[3:] == free[3:], "rows without a schema are left alone"
    with pytest.raises(UsageError, match="cannot be held to this schema"):
        engine.generate(_requests(schema='{"type": "object", "properties": {"a": {"$ref": "#/nowhere"}}}'))
    drawn = engine.generate(_requests(max_tokens=40, schema=json.dumps(SCHEMA), temperature=2.0, seed=1))
    for answer in drawn:
        jsonschema.validate(json.loads(answer.text), SCHEMA)
    *pieces, last = engine.stream(held[0])
    assert last == answers[0]
    assert "".join(pieces) == answers[0].text  # type: ignore[arg-type]


def test_opening_says_that_there_is_no_compiler(base: Base, monkeypatch: pytest.MonkeyPatch) -> None:
    said = Said()
    monkeypatch.setattr("tunesmith.engines.native.kernels.slowness", lambda: "several times slower")
    assert open_engine(base, EngineSettings(train="native"), said).base == base.digest
    assert said.lines == ["several times slower"]


@pytest.mark.slow
def test_decoding_stops_before_the_process_ends(tmp_path: Path) -> None:
    write_model(tmp_path / "m", "llama")
    script = f"""
import atexit, threading, time

# Called last, since it is registered first: the decoding thread must be gone by then.
atexit.register(lambda: print([each.name for each in threading.enumerate() if "decoding" in each.name]))
from pathlib import Path
from typing import Any
from tunesmith.core.messages import Message
from tunesmith.engines.native.engine import NativeEngine
from tunesmith.engines.protocol import Generation
from tunesmith.models.base import resolve_base
from tunesmith.store.store import Store

folder = Path({str(tmp_path)!r})
engine = NativeEngine(resolve_base(Store(folder / "store"), "m", folder))
asked = [Generation((Message(role="user", content=f"hello {{place}}"),), max_tokens=400) for place in range(8)]
threading.Thread(target=lambda: engine.generate(asked), daemon=True).start()
while not any("decoding" in each.name for each in threading.enumerate()):
    time.sleep(0.01)
"""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    ended = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, env=environment, timeout=300, check=False
    )
    assert (ended.returncode, ended.stdout) == (0, "[]\n"), ended.stderr
