"""Answers of the hf engine, compared with transformers' own generate: alone and together, greedy and sampled."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, CompileConfig

from tests.hf_models import base_of_family, change_adapter, use_static_cache, write_hf_model
from tunesmith.core.errors import Refused, UsageError
from tunesmith.core.messages import Message
from tunesmith.engines.batch import lay_out
from tunesmith.engines.factory import engine_kind, open_engine
from tunesmith.engines.hf.costs import cache_bytes
from tunesmith.engines.hf.engine import HFEngine
from tunesmith.engines.hf.generation import MOST_ROWS, static_size
from tunesmith.engines.hf.loaded import LoadedHFModel
from tunesmith.engines.hf.model import HFModel
from tunesmith.engines.protocol import Completion, Generation, Question
from tunesmith.engines.settings import WeightSettings
from tunesmith.models.base import Base, resolve_base
from tunesmith.models.rendering import Rendered
from tunesmith.store.store import Store
from tunesmith.training.objectives import CrossEntropy

FAMILIES = ("gpt2", "opt", "falcon", "phi3", "cohere", "mamba")
SYSTEM = Message(role="system", content="Be brief.")
TEXTS = ("turn on", "is the door locked?", "x", "turn on the kitchen light and the hall light, please", "off")


def _requests(**how: object) -> list[Generation]:
    how = {"max_tokens": 10, **how}
    return [Generation((SYSTEM, Message(role="user", content=text)), **how) for text in TEXTS]  # type: ignore[arg-type]


def _opened(tmp_path: Path, family: str) -> tuple[Base, HFEngine]:
    base = base_of_family(tmp_path, family)
    engine = open_engine(base)
    assert isinstance(engine, HFEngine)
    assert engine_kind(base) == "hf"
    return base, engine


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory: pytest.TempPathFactory) -> tuple[Base, HFEngine]:
    return _opened(tmp_path_factory.mktemp("gpt2"), "gpt2")


def _with_two_adapters(base: Base, work: Path) -> HFEngine:
    engine = LoadedHFModel(base).engine()
    for seed, name in enumerate(("one", "two")):
        engine.load_adapter(name, _adapter(base, work / name, seed=seed))
    return engine


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_answers_equal_transformers(tmp_path: Path, family: str) -> None:
    base, engine = _opened(tmp_path, family)
    model = AutoModelForCausalLM.from_pretrained(base.folder, dtype=torch.float32)
    together = engine.generate(_requests())
    for request, answer in zip(_requests(), together, strict=True):
        ids = torch.tensor([engine._renderer.prompt(request.messages)])
        given = model.generate(ids, max_new_tokens=10, do_sample=False, pad_token_id=1)[0, ids.shape[1] :].tolist()
        expected = [token for token in given if token not in engine._renderer.stop_ids]
        assert answer.text == engine._renderer.text(expected)
        assert answer.prompt_tokens == ids.shape[1] == engine._renderer.count_prompt(request.messages)
    assert [engine.generate([request])[0] for request in _requests()] == together
    assert engine._model.pads
    engine._model.pads = False  # a family that cannot be padded on the left is answered row by row
    assert engine.generate(_requests()) == together


def test_sampled_answers_depend_on_the_seed_only(gpt2: tuple[Base, HFEngine]) -> None:
    _, engine = gpt2
    how = {"temperature": 1.0, "top_p": 0.9}
    one = engine.generate(_requests(**how, seed=1))
    assert engine.generate(_requests(**how, seed=1)[::-1])[::-1] == one
    assert engine.generate(_requests(**how, seed=2)) != one


def test_limits_stops_and_schemas(gpt2: tuple[Base, HFEngine]) -> None:
    _, engine = gpt2
    plain = engine.generate(_requests())
    longest = max(plain, key=lambda answer: len(answer.text))
    place = plain.index(longest)
    stop = longest.text[3:5]
    cut = engine.generate(_requests(stop=(stop,)))[place]
    assert cut.finish == "stop"
    assert cut.text == longest.text[: longest.text.index(stop)]
    limits = [Generation(each.messages, max_tokens=n) for n, each in enumerate(_requests(), 1)]
    assert [answer.completion_tokens for answer in engine.generate(limits)] == [
        min(n, answer.completion_tokens) for n, answer in enumerate(plain, 1)
    ]
    schema = {
        "type": "object",
        "properties": {"on": {"type": "boolean"}},
        "required": ["on"],
        "additionalProperties": False,
    }
    for answer in engine.generate(_requests(schema=json.dumps(schema), max_tokens=40, temperature=1.0)):
        assert isinstance(json.loads(answer.text)["on"], bool)
    for answer in engine.generate(_requests(grammar='start: "say " /[a-c]{2}/', temperature=2.0)):
        assert re.fullmatch("say [a-c]{2}", answer.text)
        assert answer.finish == "stop"
    impossible = Generation(_requests()[0].messages, schema=json.dumps({"type": "string", "pattern": "(?=a)b"}))
    with pytest.raises(UsageError, match="cannot be held"):
        engine.generate([impossible])


def test_a_stream_gives_the_same_answer(gpt2: tuple[Base, HFEngine]) -> None:
    _, engine = gpt2
    for request in _requests(stop=("e",)):
        *pieces, last = list(engine.stream(request))
        assert last == engine.generate([request])[0]
        assert isinstance(last, Completion)
        assert "".join(map(str, pieces)) == last.text
    for _ in engine.stream(_requests(max_tokens=200)[0]):
        break
    assert engine.generate(_requests()[:1]), "a caller that left early does not block the next one"


def test_log_probabilities_are_the_models_own(gpt2: tuple[Base, HFEngine]) -> None:
    base, engine = gpt2
    model = AutoModelForCausalLM.from_pretrained(base.folder, dtype=torch.float32).eval()
    questions = [Question(request.messages, ("on", "off and away")) for request in _requests()]
    for question, found in zip(questions, engine.choose(questions), strict=True):
        for choice, total in zip(question.choices, found, strict=True):
            row = engine._renderer.answered(question.messages, choice)
            with torch.no_grad():
                scores = model(torch.tensor([row.ids])).logits[0].log_softmax(-1)
            labels = [place for place, trained in enumerate(row.trained) if trained]
            expected = sum(float(scores[place - 1, row.ids[place]]) for place in labels)
            assert total == pytest.approx(expected, abs=1e-3)
    for answer in engine.generate(_requests(top_logprobs=3)):
        for score in answer.scores:
            assert score.logprob == score.top[0].logprob, "greedy"


def test_an_answer_ends_with_the_context(gpt2: tuple[Base, HFEngine]) -> None:
    """Rows of very different length: the short one goes on for longer than the long one has positions."""
    base, engine = gpt2
    long = Generation((Message(role="user", content="turn on " * 40),), max_tokens=500, stop=())
    room = base.context_length - engine._renderer.count_prompt(long.messages)
    assert 0 < room < 150
    answers = engine.generate([long, Generation((Message(role="user", content="x"),), max_tokens=200)])
    assert answers[0].completion_tokens <= room
    with pytest.raises(UsageError, match="leaves no room"):
        engine.generate([Generation((Message(role="user", content="turn on " * 400),))])


def _adapter(base: Base, folder: Path, *, seed: int = 0) -> Path:
    trainable = LoadedHFModel(base).trainable(WeightSettings(rank=4), seed=seed, state_bytes=16)
    change_adapter(trainable, seed=seed)
    folder.mkdir()
    trainable.save(folder)
    return folder


def test_adapters_answer_by_name(gpt2: tuple[Base, HFEngine], tmp_path: Path) -> None:
    base, engine = gpt2
    for seed, name in enumerate(("one", "two")):
        engine.load_adapter(name, _adapter(base, tmp_path / name, seed=seed))
    asked = [Question(_requests()[0].messages, ("on",))]
    plain, one, two = (engine.choose(asked, name)[0][0] for name in (None, "one", "two"))
    assert len({plain, one, two}) == 3
    assert engine.choose(asked)[0][0] == plain
    assert engine.holds("one")
    assert not engine.holds("three")
    with pytest.raises(Refused, match="not loaded"):
        engine.generate(_requests(), "three")
    config = json.loads((tmp_path / "one" / "adapter_config.json").read_text())
    (tmp_path / "one" / "adapter_config.json").write_text(json.dumps({**config, "target_modules": ["c_attn"]}))
    with pytest.raises(Refused, match="not a LoRA tensor"):
        engine.load_adapter("one", tmp_path / "one")
    engine.load_adapter("one", tmp_path / "two")
    assert engine.choose(asked, "one")[0][0] == two, "loaded again under the name, it is replaced"


def test_an_adapter_that_does_not_fit_is_refused(gpt2: tuple[Base, HFEngine], tmp_path: Path) -> None:
    base, engine = gpt2
    path = _adapter(base, tmp_path / "a") / "adapter_model.safetensors"
    tensors = load_file(path)
    first = "base_model.model.transformer.h.0.attn.c_attn.lora_A.weight"
    config = json.loads((tmp_path / "a" / "adapter_config.json").read_text())

    def refused(changed: dict[str, torch.Tensor], reason: str, **more: object) -> None:
        bound = {"base": base.digest, "fingerprint": base.fingerprint}
        save_file(changed, path, metadata={"tunesmith": json.dumps(bound)})
        (tmp_path / "a" / "adapter_config.json").write_text(json.dumps({**config, **more}))
        with pytest.raises(Refused, match=reason):
            engine.load_adapter("x", tmp_path / "a")
        assert not engine.holds("x")

    refused({**tensors, first: tensors[first][:, :-1].contiguous()}, "does not fit the base's layers: .*size mismatch")
    refused({k: v for k, v in tensors.items() if "h.0.attn.c_attn" not in k}, "left over or missing: .*h.0.attn.c_attn")
    refused(
        {**tensors, **{k.replace("h.0", "h.7"): v.clone() for k, v in tensors.items()}}, "left over or missing: .*h.7"
    )
    refused({k.replace("c_attn", "q_proj"): v for k, v in tensors.items()}, "left over or missing: .*q_proj",
            target_modules=[name.replace("c_attn", "q_proj") for name in config["target_modules"]])  # fmt: skip
    refused({k.replace("c_proj", "ln_1"): v for k, v in tensors.items()}, "ln_1 is not a linear layer",
            target_modules=[name.replace("c_proj", "ln_1") for name in config["target_modules"]])  # fmt: skip
    other = resolve_base(Store(tmp_path / "store"), str(write_hf_model(tmp_path / "other", seed=3)), tmp_path)
    with pytest.raises(Refused, match="another base"):
        engine.load_adapter("x", _adapter(other, tmp_path / "b"))
    before = engine.generate(_requests())
    assert engine.generate(_requests()) == before


# transformers' static cache, compared with its dynamic one


SCHEMA = json.dumps(
    {"type": "object", "properties": {"on": {"type": "boolean"}}, "required": ["on"], "additionalProperties": False}
)


def _lengths(**how: Any) -> list[Generation]:
    """Prompts and limits of several lengths."""
    messages = [(Message(role="user", content=text),) for text in TEXTS]
    return [Generation(each, **{"max_tokens": 4 + 5 * n, **how}) for n, each in enumerate(messages)]


def _alike(one: Completion, other: Completion) -> None:
    assert (one.text, one.finish, one.completion_tokens) == (other.text, other.finish, other.completion_tokens)
    scores = [[score.logprob for score in each.scores] for each in (one, other)]
    assert scores[0] == pytest.approx(scores[1], abs=1e-4)


def test_answers_are_those_of_the_dynamic_cache(tmp_path: Path) -> None:
    """Together and alone, with adapters, schemas, stop texts and sampling, and with a cache that was used before.
    Gemma's windows are shorter than the prompts."""
    base = base_of_family(tmp_path, "gemma3")
    engine = _with_two_adapters(base, tmp_path)
    letter = engine.generate(_lengths(), "one")[3].text[4]
    asked: list[tuple[list[Generation], str | None]] = [
        (_lengths(top_logprobs=2), None),
        (_lengths(top_logprobs=2), "one"),
        (_lengths(schema=SCHEMA, max_tokens=30), "two"),
        (_lengths(stop=(letter,)), "one"),
        (_lengths(temperature=1.0, seed=3), "two"),
        (_lengths(max_tokens=250)[:2], None),  # another length of the cache
        (_lengths(top_logprobs=0)[3:4], "one"),  # another number of rows
        (_lengths(top_logprobs=2), None),
    ]
    answers = {}
    for static in (False, True):
        use_static_cache(engine, static)
        answers[static] = [engine.generate(requests, adapter) for requests, adapter in asked]
    for one, other in zip(*answers.values(), strict=True):
        for each in zip(one, other, strict=True):
            _alike(*each)
    assert any(each.by_stop_text for each in answers[True][3])
    assert answers[True][0] != answers[True][1], "the adapter changes answers"
    *_, streamed = engine.stream(_lengths(top_logprobs=2)[3], "one")
    assert isinstance(streamed, Completion)
    _alike(streamed, answers[False][1][3])
    cache = engine._model._cache
    assert cache is not None
    (rows, tokens), kept = cache
    assert (rows, tokens) == (1, 256)
    stored = sum(layer.keys.nbytes + layer.values.nbytes for layer in kept.layers)
    assert stored == rows * cache_bytes(engine._model.shapes, torch.float32, tokens)


def test_where_the_static_cache_is_not_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = LoadedHFModel(base_of_family(tmp_path, "llama"))
    engine, trainable = loaded.engine(), loaded.trainable(WeightSettings(rank=4), seed=0, state_bytes=16)
    assert engine._model is trainable._model
    assert not engine._model.static, "on a CPU, steps are not compiled"
    expected = engine.generate(_lengths())
    use_static_cache(engine, True)
    assert engine.generate(_lengths()) == expected
    assert engine._model._cache is not None
    trainable.loss(lay_out([Rendered((5, 9, 2, 7), (False, True, True, True))]), CrossEntropy(), 3.0)
    assert engine._model._cache is None, "a training gets its memory"
    monkeypatch.setattr("tunesmith.engines.hf.model.DeviceMemory.available", lambda _self: 1000)
    assert engine.generate(_lengths()) == expected
    assert engine._model._cache is None, "there is no room for it"
    sizes = {static_size(rows, tokens, 5000) for rows in range(1, MOST_ROWS + 1) for tokens in range(1, 5001)}
    assert sizes == {(rows, tokens) for rows in (1, 16) for tokens in (256, 512, 1024, 2048, 4096, 5000)}


@pytest.mark.parametrize(("family", "same"), [("llama", True), ("gemma3", True), ("mixtral", True), ("falcon", False)])
def test_a_family_that_cannot_use_the_static_cache_is_found_out(tmp_path: Path, family: str, same: bool) -> None:
    """Falcon's ALiBi fails with it, though transformers says that the family can be compiled."""
    model = HFModel(base_of_family(tmp_path, family))
    assert model.module._can_compile_fullgraph
    assert model.same_with_static_cache() == same


def _compile_with(monkeypatch: pytest.MonkeyPatch, engine: HFEngine, backend: Any) -> None:
    """Have steps compiled on this CPU as transformers does on a GPU, but by another backend."""
    module = type(engine._model.module)
    monkeypatch.setattr(module, "_valid_auto_compile_criteria", lambda _self, given, _: given["cache"].is_compileable)
    monkeypatch.setattr(module, "_default_compile_config", lambda _self: CompileConfig(backend=backend))
    use_static_cache(engine, True)


def test_one_graph_serves_every_batch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """torch traces a step without a break, once for other prompts, numbers of rows and lengths within a cache's sizes,
    and once more for an adapter. What stands for its compiler here runs the graph as it is."""
    engine = _with_two_adapters(base_of_family(tmp_path, "phi3"), tmp_path)
    asked: list[tuple[list[Generation], str | None]] = [
        (_lengths(), None), (_lengths()[:3], None), (_lengths(), "one"), (_lengths(), None)
    ]  # fmt: skip
    expected = [engine.generate(*each) for each in asked]
    graphs: list[Any] = []

    def backend(graph: torch.fx.GraphModule, _inputs: Any, **_how: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    _compile_with(monkeypatch, engine, backend)
    counts = []
    for each, answers in zip(asked, expected, strict=True):
        assert engine.generate(*each) == answers
        counts.append(len(graphs))
    assert counts == [1, 1, 2, 2]

    def no_compiler(graph: torch.fx.GraphModule, _inputs: Any, **_how: Any) -> Any:
        graphs.append(graph)
        raise RuntimeError("Failed to find C compiler")

    engine = LoadedHFModel(engine._model.base).engine()
    _compile_with(monkeypatch, engine, no_compiler)
    assert engine.generate(*asked[0]) == expected[0], "a step that cannot be compiled is computed as it is"
    assert len(graphs) > 2
