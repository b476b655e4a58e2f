"""What a training will take and takes: refused beforehand where it does not fit, and shown while it runs."""

import json
from itertools import accumulate
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch.profiler import ProfilerActivity, profile
from transformers import AutoConfig, AutoModelForCausalLM
from typer.testing import CliRunner

from tests.hf_models import write_hf_model
from tests.tiny import TILED, row, write_model
from tests.trained import full_model, gradients, lora_model
from tunesmith.cli.main import app
from tunesmith.core.errors import Refused, UsageError
from tunesmith.core.system import machine as memory
from tunesmith.core.system.machine import wanted_threads
from tunesmith.engines.batch import Batch
from tunesmith.engines.hf.costs import Shapes
from tunesmith.engines.hf.model import HFModel
from tunesmith.engines.hf.trainable import LoraTrainable
from tunesmith.engines.native.adapters import trainable as costs
from tunesmith.engines.native.adapters.trainable import NativeTrainable
from tunesmith.engines.native.network.network import Network
from tunesmith.engines.native.network.weights import load_network
from tunesmith.engines.process import DeviceMemory
from tunesmith.engines.settings import WeightSettings
from tunesmith.models.base import resolve_base
from tunesmith.models.rendering import Renderer
from tunesmith.store.store import Store
from tunesmith.training.batches.batch_plan import Step, lay_out_steps, step_tokens
from tunesmith.training.estimates.estimate import MemoryNeeds, check_disk, check_memory, estimate
from tunesmith.training.estimates.memory_plan import Memory, read_shapes, training_memory
from tunesmith.training.settings import TrainSettings
from tunesmith.training.steps import parameters

CPU = DeviceMemory(torch.device("cpu"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("model"))


def _step(folder: Path, more: int = 20) -> Step:
    renderer = Renderer(folder)
    rows = [renderer.conversation(row(f"light {n}", f'{{"on":{n}}}' + " and so on" * more)) for n in range(8)]
    return lay_out_steps([rows], 8192)


def test_what_does_not_fit_is_refused_before_it_runs(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plan, tried = [_step(folder, 200), _step(folder, 40), _step(folder, 20)], list[Step]()
    large, second = (step[0].tokens for step in plan[:2])

    def free(count: int, later: int, **more: bool) -> None:
        monkeypatch.setattr(memory, "available_memory", lambda: count)
        needs = MemoryNeeds(CPU, lambda part: 1000 * part.tokens, later, 0, "train.layers")._replace(**more)
        estimate(plan, 0, 1, tried.append, needs)

    largest = r"the largest part of a step \(\d+ tokens\) takes about"
    for count, later, more, said, fix in (
        (1000 * large - 1, 0, {}, largest, "set tokens to "),
        (1000 * second, 0, {}, largest, f"set tokens to {second}, "),
        (1000 * second, 0, {"may_recompute": True}, largest, f"set recompute: true, or tokens to {second}, "),
        (1000 * large + 499, 500, {}, "optimiser's state", ""),
    ):
        with pytest.raises(Refused, match=said) as refused:
            free(count, later, **more)
        assert (refused.value.where, str(refused.value.fix)[: len(fix)]) == ("train.tokens" if fix else "train", fix)
    assert not tried
    free(1000 * large + 500, 500)
    assert tried
    needs = MemoryNeeds(CPU, lambda part: 1000 * part.tokens, 0, 1000, "train.layers")
    assert check_memory(plan, needs).tokens == large
    monkeypatch.setattr(memory, "available_memory", lambda: 1000 * second)
    check_memory(plan[1:], needs)
    check_disk(folder, needs)
    with pytest.raises(Refused, match="2 checkpoints and the next one take") as refused:
        check_disk(folder / "work" / "not there", needs._replace(checkpoint=1 << 60))
    assert "train.layers" in str(refused.value.fix)


def test_a_step_s_time_has_no_validation_in_it(folder: Path) -> None:
    steps, now = [_step(folder), _step(folder, 40), _step(folder, 40)], 0.0

    def trial(step: Step) -> None:
        nonlocal now
        now += step_tokens(step) / 1000  # a thousand tokens a second

    found = estimate(steps, 3000, 16, trial, MemoryNeeds(CPU, lambda _: 0, 0, 0, "train.layers"), clock=lambda: now)
    tokens = sum(map(step_tokens, steps))
    assert found.step_seconds == pytest.approx(tokens / 3 / 1000)
    assert found.seconds == pytest.approx((tokens + 16 * 3000 / 3) / 1000), "forward passes take a third"


def _model(network: Network, settings: TrainSettings, folder: Path) -> NativeTrainable:
    return full_model(network, settings, folder) if settings.method == "full" else lora_model(network, settings)


def _storage(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def _existing(model: NativeTrainable, network: Network, batch: Batch) -> set[int]:
    """Storages that are there before a forward pass: weights, copies of what is trained, the batch."""
    found = [*model.masters, batch.ids, batch.predicts]
    for each in (network, model.network):
        found += [each.embedding, each.final_norm]
        for layer in each.layers:
            found += [value for value in vars(layer).values() if isinstance(value, torch.Tensor)]
            found += [product._forward for product in layer.linear.values()]
    return {_storage(tensor) for tensor in found}


WAYS: list[dict[str, Any]] = [{}, {"layers": 1}, {"method": "full"}, {"method": "full", "layers": 2}]
FAMILIES = ("llama", "qwen3", "gemma2", "mistral-window")


@pytest.mark.parametrize(
    ("settings", "family"), [(way, FAMILIES[(n + turn) % 4]) for n, way in enumerate(WAYS) for turn in (0, 1)]
)
def test_kept_bytes_are_what_autograd_saves(tmp_path: Path, settings: dict[str, Any], family: str) -> None:
    folder = write_model(tmp_path / "model", family, sizes=TILED)
    network, train = load_network(folder), TrainSettings(**settings)
    model, (batch,) = _model(network, train, folder), _step(folder)
    existing, saved = _existing(model, network, batch), dict[int, int]()

    def note(tensor: torch.Tensor) -> torch.Tensor:
        if _storage(tensor) not in existing:
            saved[_storage(tensor)] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        gradients(model, [batch])
    assert costs.kept_bytes(model.network, batch, model.first, model.kept_numbers()) == sum(saved.values())


@pytest.mark.parametrize("settings", WAYS[:2])
def test_memory_estimate_covers_what_is_allocated(tmp_path: Path, settings: dict[str, Any]) -> None:
    folder = write_model(tmp_path / "model", sizes=TILED)
    network = load_network(folder)
    model, (batch,) = lora_model(network, TrainSettings(**settings)), _step(folder)
    gradients(model, [batch])  # lays the weights out for gradients, which happens once
    for parameter in parameters(model):
        parameter.grad = None
    estimated = model.memory_estimate(batch)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        gradients(model, [batch])
    events = [each for each in profiler.profiler.kineto_results.events() if each.name() == "[memory]"]
    allocated = max(accumulate(each.nbytes() for each in sorted(events, key=lambda each: each.start_ns())))
    assert allocated <= estimated <= 1.1 * allocated


def test_flops_count_forward_backward_and_trained_products(folder: Path) -> None:
    network, batch = load_network(folder, torch.float32), _step(folder)[0]
    linear = [sum(product.numel() for product in layer.linear.values()) for layer in network.layers]
    head, tokens, labels = network.head.numel(), batch.tokens, batch.labels.numel()
    full = full_model(network, TrainSettings(method="full"), folder)
    assert full.flops(batch) == 6 * (tokens * sum(linear) + labels * head)
    lora = lora_model(network, TrainSettings())
    assert lora.flops(batch) == tokens * (4 * sum(linear) + 6 * lora.trained_numbers) + 4 * labels * head
    last = lora_model(network, TrainSettings(layers=1))
    once = 2 * sum(linear) + 2 * linear[-1] + 6 * last.trained_numbers
    assert last.flops(batch) == tokens * once + 4 * labels * head
    assert lora.peak_flops(batch) == lora.peak_flops(batch), "measured once"


def test_copies_of_a_scored_validation_take_the_place_of_a_batch(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = [_step(folder)]
    batch = 10**6 * plan[0][0].tokens
    needs = MemoryNeeds(CPU, lambda part: 10**6 * part.tokens, 500, 0, "train.layers", copies=3 * batch)
    monkeypatch.setattr(memory, "available_memory", lambda: 3 * batch + 500)
    check_memory(plan, needs)
    expected = estimate(plan, 0, 1, lambda _: None, needs).peak_memory_bytes
    assert expected - estimate(plan, 0, 1, lambda _: None, needs._replace(copies=0)).peak_memory_bytes > batch
    monkeypatch.setattr(memory, "available_memory", lambda: 2 * batch + 500)
    check_memory(plan, needs._replace(copies=batch))
    with pytest.raises(Refused, match="copies that a scored validation makes"):
        check_memory(plan, needs)


_VERSION_2 = {"memory.max": "1000\n", "memory.current": "700\n", "memory.stat": "anon 500\ninactive_file 100\n"}
_VERSION_1 = {
    "memory.limit_in_bytes": "1000\n",
    "memory.usage_in_bytes": "700\n",
    "memory.stat": "inactive_file 1\ntotal_inactive_file 100\n",
}


@pytest.mark.parametrize(
    ("told", "place", "files", "left"),
    [
        ("0::/a/b", "a", _VERSION_2, [400]),  # a limit of a group above
        ("0::/", "", _VERSION_2, [400]),
        ("0::/shown/as/outside", "", _VERSION_2, [400]),
        ("0::/a", "a", {**_VERSION_2, "memory.max": "max\n"}, []),
        ("7:cpu:/a\n4:memory:/a", "memory/a", _VERSION_1, [400]),
        ("0::/", "", {}, []),
    ],
)
def test_memory_left_in_a_control_group(
    tmp_path: Path, told: str, place: str, files: dict[str, str], left: list[int]
) -> None:
    (tmp_path / "mount" / "a" / "b").mkdir(parents=True)
    (tmp_path / "mount" / place).mkdir(parents=True, exist_ok=True)
    (tmp_path / "cgroup").write_text(told + "\n")
    for name, text in files.items():
        (tmp_path / "mount" / place / name).write_text(text)
    assert memory._group_memory(tmp_path / "cgroup", tmp_path / "mount") == left
    assert memory._group_memory(tmp_path / "none", tmp_path / "mount") == []


@pytest.mark.parametrize("told", ["two", "-1", "1.5"])
def test_wrong_thread_count_is_refused(monkeypatch: pytest.MonkeyPatch, told: str) -> None:
    monkeypatch.setenv("TUNESMITH_THREADS", told)
    with pytest.raises(UsageError, match="not a number of threads") as refused:
        wanted_threads()
    assert refused.value.where == "TUNESMITH_THREADS"


# The predicted memory of a training on a device, from a configuration alone


TOKENS, RANK = 256, 4
WIDE = {**TILED, "num_hidden_layers": 4, "vocab_size": 500}


def _memory(shapes: Shapes, **changes: Any) -> Memory:
    usual = {"quantized": False, "precision": "fp32", "rank": RANK, "tokens": 1, "recompute": False}
    return training_memory(shapes, **{**usual, **changes})


@pytest.mark.parametrize("family", ["llama", "phi3", "gpt2"])
def test_shapes_are_those_of_the_loaded_model(tmp_path: Path, family: str) -> None:
    folder = tmp_path / "model"
    write_model(folder) if family == "llama" else write_hf_model(folder, family)
    shapes = read_shapes(folder)
    model = HFModel(resolve_base(Store(tmp_path / "store"), str(folder), tmp_path))
    assert shapes.linear + shapes.rest == sum(each.numel() for each in model.module.parameters())
    trained = LoraTrainable(model, WeightSettings(rank=RANK), seed=0)
    assert _memory(shapes).trained == 20 * trained.trained_numbers
    whole = [_memory(shapes, precision=precision, rank=None) for precision in ("fp32", "bf16")]
    numbers = shapes.linear + shapes.rest
    assert [(each.base, each.trained) for each in whole] == [(0, 20 * numbers), (2 * numbers, 22 * numbers)]


def _kept_bytes(config: Any, dtype: torch.dtype) -> int:
    """Bytes that autograd keeps of a forward pass, without the weights."""
    module = AutoModelForCausalLM.from_config(config, dtype=dtype).requires_grad_(requires_grad=False)
    adapted = peft.get_peft_model(module, peft.LoraConfig(r=RANK, target_modules="all-linear", task_type="CAUSAL_LM"))
    weights = {each.untyped_storage().data_ptr() for each in adapted.parameters()}
    kept: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        adapted(input_ids=torch.zeros(1, TOKENS, dtype=torch.long), use_cache=False)
    return sum(kept.values())


@pytest.mark.parametrize("family", ["llama", "qwen3"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_activations_are_those_that_autograd_keeps(tmp_path: Path, family: str, precision: str) -> None:
    config = AutoConfig.for_model(family, **WIDE)
    config.save_pretrained(tmp_path)
    shapes = read_shapes(tmp_path)
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[precision]
    logits = 3 * 4 * TOKENS * shapes.vocabulary  # not yet computed with: the loss is not in the pass
    found = _memory(shapes, precision=precision, tokens=TOKENS).activations - logits
    assert found == pytest.approx(_kept_bytes(config, dtype), rel=0.25)
    again = _memory(shapes, precision=precision, tokens=TOKENS, recompute=True).activations - logits
    layer = TOKENS * {"fp32": 4.2, "bf16": 3.9}[precision] * shapes.kept_layer  # one is computed again at a time
    assert layer < again < layer + 0.25 * found


def _run(*words: object) -> tuple[int, dict[str, Any]]:
    result = CliRunner().invoke(app, ["memory", *map(str, words), "--json"])
    return result.exit_code, json.loads(result.stdout)


def test_the_command_says_what_fits(tmp_path: Path) -> None:
    AutoConfig.for_model("llama", **{**WIDE, "vocab_size": 500_000}).save_pretrained(tmp_path)
    code, found = _run(tmp_path, "--device", 1000)
    assert code == 0
    assert [(way["quantize"], way["recompute"], way["fits"]) for way in found["ways"]] == [
        (None, False, True),
        (None, True, True),
        ("4bit", False, True),
        ("4bit", True, True),
    ]
    for way in found["ways"]:
        assert way["total"] == way["base"] + way["trained"] + way["activations"]
    assert _run(tmp_path, "--device", 1, "--tokens", 2048)[0] == 3
    code, spread = _run(tmp_path, "--device", 1000, "--ranks", 4)
    assert [way["quantize"] for way in spread["ways"]] == [None, None], "4 bits are refused on several ranks"
    assert spread["ways"][0]["trained"] == pytest.approx(found["ways"][0]["trained"] / 4, abs=1)
    full = _run(tmp_path, "--device", 1000, "--method", "full")[1]
    assert [(way["quantize"], way["recompute"]) for way in full["ways"]] == [(None, False), (None, True)]
    assert full["ways"][0]["trained"] == 22 * full["numbers"]


def test_time_has_a_stated_basis(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    AutoConfig.for_model("llama", **WIDE).save_pretrained(tmp_path)
    found = _run(tmp_path, "--device", 1, "--tflops", 2, "--utilisation", 0.5, "--row-tokens", 100)[1]
    assert (found["rate"], found["row_tokens"]) == (1e12, 100)
    assert found["basis"] == "50% of a peak of 2 TFLOPS, as stated"
    shapes = read_shapes(tmp_path)
    trained = 16 * shapes.adapted
    for way in found["ways"]:
        again = 2 if way["recompute"] else 0
        operations = 100_000 * ((4 + again) * shapes.linear + (6 + again) * trained + 4 * 500 * WIDE["hidden_size"])
        assert way["seconds"] == pytest.approx(operations / 1e12)
    assert found["cache_rows"] == 16 * 2048 * found["cache_per_token"]
    assert found["cache_tokens"] == ((1 << 30) - 2 * found["numbers"]) // found["cache_per_token"]
    half = _run(tmp_path, "--device", 1, "--tflops", 2, "--utilisation", 0.5, "--row-tokens", 100, "--ranks", 2)[1]
    assert half["ways"][0]["seconds"] == pytest.approx(found["ways"][0]["seconds"] / 2)
    unknown = _run(tmp_path, "--device", 1)[1]
    assert (unknown["rate"], unknown["ways"][0]["seconds"]) == (None, None)
    assert "TFLOPS is not stated" in unknown["basis"]
    monkeypatch.setattr("tunesmith.training.estimates.memory_plan.product_flops", lambda *_: 3e12)
    here = _run(tmp_path)[1]
    assert (here["rate"], "3 TFLOPS, which CPU reached" in here["basis"]) == (pytest.approx(1.2e12), True)


def test_experts_and_windows_count_as_they_are_used(tmp_path: Path) -> None:
    """An expert as often as a token is sent to it; of a sliding window, its own tokens."""
    with pytest.raises(UsageError, match="no config"):
        read_shapes(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "no-such-model"}')
    with pytest.raises(Refused, match="transformers cannot run"):
        read_shapes(tmp_path)
    shapes = read_shapes(write_hf_model(tmp_path / "m", "mixtral"))
    one_expert = (2 * 48 + 32) + (32 + 48)  # gate with up, and down: outputs and inputs
    assert shapes.kept - shapes.adapted == 2 * 2 * one_expert, "two layers, two of four experts"
    assert shapes.computed - shapes.linear == 2 * 2 * (2 * 48 * 32 + 32 * 48)
    kinds = [*["sliding_attention"] * 3, "full_attention"]
    AutoConfig.for_model("gemma3_text", **WIDE, sliding_window=64, layer_types=kinds).save_pretrained(tmp_path)
    found = _run(tmp_path, "--device", 1)[1]
    each_layer = 2 * 2 * WIDE["num_key_value_heads"] * WIDE["head_dim"]
    assert found["cache_per_token"] == 4 * each_layer
    assert found["cache_rows"] == 16 * each_layer * (3 * 64 + 2048)
