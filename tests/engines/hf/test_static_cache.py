"""Answers with transformers' static cache, compared with its dynamic one, on tiny random models."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import CompileConfig

from tests.engines.test_engines import TEXTS, _adapter
from tests.hf_models import base_of_family, use_static_cache
from tunesmith.core.messages import Message
from tunesmith.engines.batch import lay_out
from tunesmith.engines.hf.costs import cache_bytes
from tunesmith.engines.hf.engine import HFEngine
from tunesmith.engines.hf.generation import MOST_ROWS, static_size
from tunesmith.engines.hf.loaded import LoadedHFModel
from tunesmith.engines.hf.model import HFModel
from tunesmith.engines.protocol import Completion, Generation
from tunesmith.engines.settings import WeightSettings
from tunesmith.models.base import Base
from tunesmith.models.rendering import Rendered
from tunesmith.training.objectives import CrossEntropy


def _with_two_adapters(base: Base, work: Path) -> HFEngine:
    engine = LoadedHFModel(base).engine()
    for seed, name in enumerate(("one", "two")):
        engine.load_adapter(name, _adapter(base, work / name, seed=seed))
    return engine


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
