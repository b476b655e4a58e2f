"""What both engines that answer in this process do, held against transformers' own: alone and in company, greedy and
drawn, streamed and whole."""

import json
import os
import pickle
import re
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from tests.hf_models import OF_2026, base_of_family, change_adapter
from tests.said import Said
from tests.schemas import SWITCH
from tunesmith.core.errors import Refused, UsageError
from tunesmith.core.messages import Message
from tunesmith.engines.factory import engine_kind, open_engine
from tunesmith.engines.hf.engine import LoadedHFModel
from tunesmith.engines.native import engine as embedded
from tunesmith.engines.native.adapters import trainable as losses
from tunesmith.engines.native.engine import NativeEngine
from tunesmith.engines.native.network.weights import load_network
from tunesmith.engines.protocol import Completion, Generation, Question
from tunesmith.engines.settings import EngineSettings, WeightSettings
from tunesmith.models.base import _LOADING, Base
from tunesmith.models.rendering import Rendered

NATIVE = "qwen3"
FAMILIES = (NATIVE, *OF_2026, "gpt2", "opt", "falcon", "phi3", "cohere", "mamba")
SYSTEM = Message(role="system", content="You are a very brief assistant that turns on the kitchen light.")
TEXTS = ["turn on", "is the door locked?", "x", "turn on the kitchen light and the hall light, please", "off"]
Opened = tuple[Base, Any]


def _requests(**how: object) -> list[Generation]:
    how = {"max_tokens": 12, **how}
    return [Generation((SYSTEM, Message(role="user", content=text)), **how) for text in TEXTS]  # type: ignore[arg-type]


@pytest.fixture(scope="module", autouse=True)
def _in_fp32() -> Iterator[None]:
    """fp32, so that a wrong token is a mistake and not rounding."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(embedded, "load_network", lambda folder: load_network(folder, torch.float32))
        yield


def _opened(base: Base) -> Any:
    return NativeEngine(base) if engine_kind(base) == "native" else open_engine(base)


@pytest.fixture(scope="module", params=[NATIVE, "gpt2"])
def opened(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, _in_fp32: None) -> Opened:
    base = base_of_family(tmp_path_factory.mktemp("base"), request.param)
    return base, _opened(base)


def _transformers(base: Base) -> Any:
    return AutoModelForCausalLM.from_pretrained(base.folder, dtype=torch.float32)


def _greedy(model: Any, engine: Any, request: Generation) -> list[int]:
    ids = torch.tensor([engine._renderer.prompt(request.messages)])
    how = {"max_new_tokens": request.max_tokens, "do_sample": False, "pad_token_id": 1}
    given = model.generate(input_ids=ids, **how)[0, ids.shape[1] :].tolist()
    return [token for token in given if token not in engine._renderer.stop_ids]


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_answers_equal_transformers(tmp_path: Path, family: str) -> None:
    base = base_of_family(tmp_path, family)
    assert engine_kind(base) == ("native" if family == NATIVE else "hf")
    engine = _opened(base)
    model, together = _transformers(base), engine.generate(_requests())
    for request, answer in zip(_requests(), together, strict=True):
        expected = _greedy(model, engine, request)
        assert (answer.text, answer.completion_tokens) == (engine._renderer.text(expected), len(expected))
        assert answer.prompt_tokens == engine._renderer.count_prompt(request.messages)
    assert [engine.generate([request])[0] for request in _requests()] == together
    assert engine.generate(_requests()[::-1])[::-1] == together
    if family == NATIVE:
        assert len(engine._prefixes) >= 1, "the shared beginning was kept"
        return
    assert engine._model.pads
    engine._model.pads = False  # a family that cannot be padded on the left is answered row by row
    assert engine.generate(_requests()) == together


def test_sampled_answers_depend_on_the_seed_only(opened: Opened) -> None:
    _, engine = opened
    how = {"temperature": 1.5, "top_p": 0.9}
    one = engine.generate(_requests(**how, seed=1))
    assert engine.generate(_requests(**how, seed=1)[::-1])[::-1] == one
    assert engine.generate(_requests(**how, seed=2)) != one
    assert engine.generate(_requests(temperature=1.5, seed=3, top_p=1e-9)) == engine.generate(_requests())


def test_limits_stop_texts_and_streams(opened: Opened) -> None:
    _, engine = opened
    free = engine.generate(_requests(max_tokens=30))
    limits = [Generation(each.messages, max_tokens=n) for n, each in enumerate(_requests(), 1)]
    for n, (limited, whole) in enumerate(zip(engine.generate(limits), free, strict=True), 1):
        assert whole.text.startswith(limited.text)
        assert limited.completion_tokens == min(n, whole.completion_tokens)
    place = max(range(len(free)), key=lambda one: len(free[one].text))
    stop = free[place].text[4:7]
    requests = _requests(max_tokens=30, stop=(stop,))
    cut = engine.generate(requests)[place]
    assert (cut.text, cut.finish, cut.by_stop_text) == (free[place].text.split(stop)[0], "stop", True)
    for request, expected in ((requests[place], cut), (_requests(max_tokens=30)[place], free[place])):
        *pieces, last = engine.stream(request)
        assert isinstance(last, Completion)
        assert last == expected
        assert "".join(map(str, pieces)) == last.text
    assert len(pieces) > 1
    for _ in engine.stream(_requests(max_tokens=200)[0]):
        break
    assert engine.generate(_requests()[:1]), "a caller that left early does not block the next one"


def test_a_constrained_answer_fits(opened: Opened) -> None:
    _, engine = opened
    held = _requests(max_tokens=40, schema=json.dumps(SWITCH))
    free = engine.generate(_requests(max_tokens=40))
    answers = engine.generate([*held[:3], *_requests(max_tokens=40)[3:]])
    assert answers[3:] == free[3:], "rows without a schema are left alone"
    drawn = engine.generate(_requests(max_tokens=40, schema=json.dumps(SWITCH), temperature=2.0, seed=1))
    for answer in (*answers[:3], *drawn):
        assert answer.finish == "stop"
        jsonschema.validate(json.loads(answer.text), SWITCH)
    *pieces, last = engine.stream(held[0])
    assert last == answers[0]
    assert "".join(map(str, pieces)) == answers[0].text
    for answer in engine.generate(_requests(grammar='start: "say " /[a-c]{2}/', temperature=2.0)):
        assert (bool(re.fullmatch("say [a-c]{2}", answer.text)), answer.finish) == (True, "stop")
    for schema in ('{"type": "object", "properties": {"a": {"$ref": "#/nowhere"}}}', '{"pattern": "(?=a)b"}'):
        with pytest.raises(UsageError, match="cannot be held to this schema"):
            engine.generate(_requests(schema=schema))


def _of_labels(model: Any, row: Rendered) -> float:
    """The summed log-probability of a row's labels, which are its last tokens, by transformers."""
    labels = torch.tensor(row.ids)[torch.tensor(row.trained)]
    with torch.no_grad():
        scores = model(torch.tensor([row.ids])).logits[0, -len(labels) - 1 : -1].log_softmax(-1)
    return float(scores.gather(1, labels[:, None]).sum())


def test_log_probabilities_are_the_models_own(opened: Opened, monkeypatch: pytest.MonkeyPatch) -> None:
    base, engine = opened
    questions = [Question((Message(role="user", content=text),), ("yes", "no" * 9, "the light")) for text in TEXTS]
    model, whole = _transformers(base), engine.choose(questions)
    for question, scores in zip(questions, whole, strict=True):
        for choice, score in zip(question.choices, scores, strict=True):
            row = engine._renderer.answered(question.messages, choice)
            assert score == pytest.approx(_of_labels(model, row), abs=1e-3)
    for answer in engine.generate(_requests(top_logprobs=3)):
        assert all(score.logprob == score.top[0].logprob for score in answer.scores), "greedy"
    drawn = _requests(top_logprobs=3, temperature=1.3, top_p=0.9, seed=5)  # which changes no probability
    for request, answer in zip(drawn, engine.generate(drawn), strict=True):
        with torch.no_grad():
            scores = model(torch.tensor([engine._renderer.prompt(request.messages)])).logits[0, -1].log_softmax(-1)
        for first in answer.scores[:1]:
            assert [each.logprob for each in first.top] == pytest.approx(scores.topk(3).values.tolist(), abs=1e-4)
            assert (scores - first.logprob).abs().min() < 1e-4
    monkeypatch.setattr(losses, "LOGIT_ROWS", losses.GRAIN)
    for together, tokens in ((2, 100), (64, 1)):
        monkeypatch.setattr(NativeEngine, "choice_rows", together)
        monkeypatch.setattr(NativeEngine, "choice_tokens", tokens)
        for found, expected in zip(engine.choose(questions), whole, strict=True):
            assert found == pytest.approx(expected, abs=1e-4)


def test_an_answer_ends_with_the_context(opened: Opened) -> None:
    """Rows of very different length: the short one goes on for longer than the long one has positions."""
    base, engine = opened
    room = base.context_length - engine._renderer.count_prompt((Message(role="user", content=""),))
    long, too_long = (Generation((Message(role="user", content="!" * n),), max_tokens=500) for n in (room - 1, room))
    answers = engine.generate([long, Generation((Message(role="user", content="x"),), max_tokens=200)])
    assert answers[0].completion_tokens <= 1
    with pytest.raises(UsageError, match=r"context length|leaves no room"):
        engine.generate([too_long])


def _adapter(base: Base, folder: Path, *, seed: int = 0) -> Path:
    trainable = LoadedHFModel(base).trainable(WeightSettings(rank=4), seed=seed, state_bytes=16)
    change_adapter(trainable, seed=seed, std=0.3)
    folder.mkdir()
    trainable.save(folder)
    return folder


def test_adapters_answer_by_name_as_in_peft(opened: Opened, tmp_path: Path) -> None:
    base, engine = opened
    plain = engine.generate(_requests())
    for seed, name in enumerate(("one", "two")):
        engine.load_adapter(name, _adapter(base, tmp_path / name, seed=seed))
    answers, asked = engine.generate(_requests(), "one"), [Question(_requests()[0].messages, ("on",))]
    scores = {name: engine.choose(asked, name)[0][0] for name in (None, "one", "two")}
    assert len({*scores.values()}) == 3
    assert answers != plain
    assert engine.generate(_requests()) == plain, "the base answers as before"
    model = PeftModel.from_pretrained(_transformers(base), str(tmp_path / "one"))
    for request, answer in zip(_requests(), answers, strict=True):
        assert answer.text == engine._renderer.text(_greedy(model, engine, request))
    assert [engine.holds(name) for name in ("one", "three")] == [True, False]
    with pytest.raises(Refused, match="not loaded"):
        engine.generate(_requests(), "three")
    other = base_of_family(tmp_path / "other", base.family, seed=3)
    with pytest.raises(Refused, match="another base"):
        engine.load_adapter("one", _adapter(other, tmp_path / "x"))
    engine.load_adapter("one", tmp_path / "two")
    assert engine.choose(asked, "one")[0][0] == scores["two"], "loaded again under the name, it is replaced"


def test_an_adapter_that_does_not_fit_is_refused(tmp_path: Path) -> None:
    base = base_of_family(tmp_path, "gpt2")
    engine, folder = open_engine(base), _adapter(base, tmp_path / "a")
    before, tensors = engine.generate(_requests()), load_file(folder / "adapter_model.safetensors")
    config = json.loads((folder / "adapter_config.json").read_text())
    first = "base_model.model.transformer.h.0.attn.c_attn.lora_A.weight"

    def renamed(old: str, new: str) -> tuple[dict[str, torch.Tensor], list[str]]:
        targets = [name.replace(old, new) for name in config["target_modules"]]
        return {name.replace(old, new): each for name, each in tensors.items()}, targets

    same = config["target_modules"]
    for changed, targets, reason in (
        ({**tensors, first: tensors[first][:, :-1].contiguous()}, same, "fit the base's layers: .*size mismatch"),
        ({k: v for k, v in tensors.items() if "h.0.attn.c_attn" not in k}, same, "or missing: .*h.0.attn.c_attn"),
        ({**tensors, **{k.replace("h.0", "h.7"): v.clone() for k, v in tensors.items()}}, same, "left over .*h.7"),
        (*renamed("c_attn", "q_proj"), "left over or missing: .*q_proj"),
        (*renamed("c_proj", "ln_1"), "ln_1 is not a linear layer"),
    ):
        bound = {"base": base.digest, "fingerprint": base.fingerprint}
        save_file(changed, folder / "adapter_model.safetensors", metadata={"tunesmith": json.dumps(bound)})
        (folder / "adapter_config.json").write_text(json.dumps({**config, "target_modules": targets}))
        with pytest.raises(Refused, match=reason):
            engine.load_adapter("x", folder)
        assert not engine.holds("x")
    assert engine.generate(_requests()) == before


def test_opening_says_that_there_is_no_compiler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base, said = base_of_family(tmp_path, NATIVE), Said()
    monkeypatch.setattr("tunesmith.engines.native.kernels.slowness", lambda: "several times slower")
    assert open_engine(base, EngineSettings(train="native"), said).base == base.digest
    assert said.lines == ["several times slower"]


@pytest.mark.slow
def test_decoding_stops_before_the_process_ends(tmp_path: Path) -> None:
    given = tmp_path / "given"
    given.write_bytes(pickle.dumps((base_of_family(tmp_path, "llama"), _requests(max_tokens=400))))
    script = f"""
import atexit, pickle, threading, time

# Called last, since it is registered first: the decoding thread must be gone by then.
atexit.register(lambda: print([each.name for each in threading.enumerate() if "decoding" in each.name]))
from tunesmith.engines.native.engine import NativeEngine

base, requests = pickle.load(open({str(given)!r}, "rb"))
engine = NativeEngine(base)
threading.Thread(target=lambda: engine.generate(requests), daemon=True).start()
while not any("decoding" in each.name for each in threading.enumerate()):
    time.sleep(0.01)
"""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    ended = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, env=environment, timeout=300, check=False
    )
    assert (ended.returncode, ended.stdout) == (0, "[]\n"), ended.stderr


def test_one_thread_at_a_time_loads_a_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers puts its own classes back as it found them, which two loads at once would get wrong."""
    base, free = base_of_family(tmp_path, "gpt2"), []

    def from_pretrained(*_: object, **__: object) -> None:
        with ThreadPoolExecutor(1) as another:
            free.append(another.submit(_LOADING.acquire, blocking=False).result())
        raise ValueError

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", from_pretrained)
    with pytest.raises(Refused):
        open_engine(base).generate(_requests())
    assert free == [False]
