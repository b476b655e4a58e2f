"""Which engine trains and which answers, by `engine:` of the project file, the base's family and a GPU."""

from __future__ import annotations

from typing import Any

import pytest

from tunesmith.core.errors import Refused, UsageError
from tunesmith.engines import factory
from tunesmith.engines.settings import EngineSettings, VllmSettings, WeightSettings
from tunesmith.project import ProjectSettings, parse_settings

FOUR_BITS = {"quantize": "4bit"}


@pytest.mark.parametrize(
    ("family", "train", "weights", "ranks", "gpu", "trains", "answers"),
    [
        ("llama", "auto", {}, 1, False, "native", "native"),
        ("llama", "auto", {}, 1, True, "hf", "hf"),
        ("llama", "auto", FOUR_BITS, 1, False, "hf", "native"),
        ("llama", "auto", {"dora": True}, 1, False, "hf", "native"),
        ("llama", "auto", {"precision": "fp32"}, 1, False, "hf", "native"),
        ("llama", "native", {"precision": "bf16"}, 1, False, "native", "native"),
        ("llama", "auto", {"start": "pissa"}, 1, False, "hf", "native"),
        ("llama", "auto", {}, 2, False, "hf", "native"),
        ("gpt2", "auto", {}, 1, False, "hf", "hf"),
        ("llama", "hf", {}, 1, False, "hf", "native"),
        ("llama", "hf", {}, 1, True, "hf", "hf"),
        ("llama", "native", {}, 1, True, "native", "native"),
    ],
)
def test_settings_family_and_gpu_choose(
    monkeypatch: pytest.MonkeyPatch,
    family: str,
    train: Any,
    weights: dict[str, Any],
    ranks: int,
    gpu: bool,
    trains: str,
    answers: str,
) -> None:
    monkeypatch.setattr(factory, "gpu_present", lambda: gpu)
    settings = EngineSettings(train=train)
    assert factory.training_engine(family, WeightSettings(**weights), settings, ranks=ranks) == trains
    assert factory.answering_engine(family, settings) == answers


@pytest.mark.parametrize(
    ("family", "weights", "ranks", "said"),
    [
        ("gpt2", {}, 1, "does not compute the family 'gpt2'"),
        ("llama", FOUR_BITS, 1, r"4 bits, which candidates\.tuned\.train\.quantize asks for"),
        ("llama", {}, 2, "trains in one process"),
    ],
)
def test_the_native_engine_is_refused_by_name(family: str, weights: dict[str, Any], ranks: int, said: str) -> None:
    native = EngineSettings(train="native")
    with pytest.raises(Refused, match=f"the native engine .*{said}") as refused:
        factory.check_weight_settings(family, WeightSettings(**weights), "candidates.tuned.train", native, ranks=ranks)
    assert refused.value.where == "engine.train"


def _parsed(engine: str) -> ProjectSettings:
    data = "{sources: [{path: rows.jsonl, licence: MIT}]}"
    return parse_settings(f"name: p\nbase: model\ndata: {data}\ncandidates: {{c: {{}}}}\n{engine}", "tunesmith.yaml")


def test_a_server_and_the_training_engine_are_set_in_one_place() -> None:
    assert _parsed("").engine == EngineSettings()
    assert _parsed("engine: {train: hf}").engine == EngineSettings(train="hf")
    server = _parsed('engine: {kind: vllm, url: "http://127.0.0.1:1", train: native}')
    assert server.engine == server.server == VllmSettings(kind="vllm", url="http://127.0.0.1:1", train="native")
    assert _parsed("engine: {train: hf}").server is None


@pytest.mark.parametrize(
    ("engine", "said"),
    [
        ("{train: cuda}", "'auto', 'native' or 'hf'"),
        ("{trian: hf}", "did you mean 'train'"),
        ("{train: hf, kind: vllm}", "give one of url"),
        ('{kind: vllm, ulr: "http://127.0.0.1:1"}', "did you mean 'url'"),
    ],
)
def test_mistakes_are_refused_by_name(engine: str, said: str) -> None:
    with pytest.raises(UsageError, match=said):
        _parsed(f"engine: {engine}")


def test_on_a_ray_cluster_the_workers_resources_say_whether_there_is_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """The command's own machine does not."""
    flash = WeightSettings(attention="flash_attention_2")
    for gpu in (False, True):
        monkeypatch.setattr(factory, "gpu_present", lambda gpu=gpu: gpu)
        monkeypatch.setattr("tunesmith.engines.hf.support.gpu_present", lambda gpu=gpu: gpu)
        on_gpus = EngineSettings.model_validate({"ray": {"workers": 1, "resources": {"GPU": 1}}})
        on_cpus = EngineSettings.model_validate({"ray": {"workers": 1}})
        assert factory.training_engine("llama", WeightSettings(), on_gpus) == "hf"
        assert factory.training_engine("llama", WeightSettings(), on_cpus) == "native"
        with pytest.raises(Refused, match="computes on a GPU"):
            factory.check_weight_settings("gpt2", flash, "train", on_cpus)
        with pytest.raises(UsageError, match="needs flash_attn, which is not installed"):
            factory.check_weight_settings("gpt2", flash, "train", on_gpus)
