"""The engine's arithmetic against transformers and PEFT, number by number, on tiny random models."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, get_scheduler

from tests.tiny import FAMILIES, ROWS, TILED, row, write_model
from tests.trained import (
    base_of,
    batch_loss,
    fit,
    full_model,
    gradients,
    lora_model,
    reference_loss,
    saved,
    set_low_rank,
)
from tunesmith.core.errors import Refused, TunesmithError
from tunesmith.core.system import memory
from tunesmith.engines.batch import lay_out
from tunesmith.engines.native import kernels as native
from tunesmith.engines.native.adapters import lora as lora_module
from tunesmith.engines.native.adapters.full import FullModel
from tunesmith.engines.native.network import products
from tunesmith.engines.native.network.weights import load_network
from tunesmith.engines.settings import TARGETS
from tunesmith.models.rendering import Rendered, Renderer
from tunesmith.training.schedule import learning_rate
from tunesmith.training.settings import TrainSettings
from tunesmith.training.steps import make_optimizer


def _setting(tmp_path: Path, family: str) -> tuple[Path, list[Rendered]]:
    folder = write_model(tmp_path / family, family)
    renderer = Renderer(folder)
    return folder, [renderer.conversation(messages) for messages in ROWS]


@pytest.mark.parametrize("family", list(FAMILIES))
def test_forward_gradients_and_steps_equal_peft(tmp_path: Path, family: str) -> None:
    folder, rows = _setting(tmp_path, family)
    network = load_network(folder, torch.float32)
    settings = TrainSettings(rank=4, epochs=1, learning_rate=0.02, warmup=0.0, schedule="constant", clip=1.0)
    base = base_of(folder)
    lora = lora_model(network, settings, base)
    reference = get_peft_model(
        AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32),
        LoraConfig(r=4, lora_alpha=8, target_modules=list(TARGETS), task_type="CAUSAL_LM"),
    )
    start = saved(lora, tmp_path / "start")
    assert not reference.load_adapter(str(start), "default").unexpected_keys
    reference.train()
    trained = [p for p in reference.parameters() if p.requires_grad]
    batch = lay_out(rows)
    assert batch.prefix > 5, "the rows share their system prompt"
    assert len(set(batch.lengths)) > 1, "rows of unequal length"
    ours = torch.optim.AdamW(lora.masters, lr=0.02, weight_decay=0.0)
    theirs = torch.optim.AdamW(trained, lr=0.02, weight_decay=0.0)
    for _ in range(4):
        expected = reference_loss(reference, rows)
        expected.backward()
        loss = batch_loss(lora, batch, float(batch.labels.numel()))
        loss.backward()
        lora.collect_gradients()
        assert float(loss.detach()) == pytest.approx(float(expected.detach()), rel=2e-5)
        clipped = torch.nn.utils.clip_grad_norm_(lora.masters, 1.0)
        assert float(clipped) == pytest.approx(float(torch.nn.utils.clip_grad_norm_(trained, 1.0)), rel=1e-3)
        ours.step()
        theirs.step()
        lora.parameters_changed()
        ours.zero_grad()
        theirs.zero_grad()
    end = load_file(saved(lora, tmp_path / "end") / "adapter_model.safetensors")
    state = {name.replace(".default", ""): value for name, value in reference.state_dict().items() if "lora_" in name}
    assert set(end) == set(state)
    # Adam divides by the gradient's size: where a gradient is all but zero, rounding decides its sign.
    off = sum(int(((end[name] - state[name]).abs() > 2e-3).sum()) for name in end)
    assert off <= 0.01 * sum(value.numel() for value in end.values())


@pytest.mark.parametrize("family", ["qwen2", "qwen3"])
def test_bf16_gradients_are_as_exact_as_portable_ones(
    tmp_path: Path, family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Sizes that tiles multiply: on a processor with tiles the whole step goes through them."""
    folder = write_model(tmp_path / family, family, sizes=TILED)
    renderer = Renderer(folder)
    batch = lay_out([renderer.conversation(messages) for messages in ROWS])

    def gradient(dtype: torch.dtype) -> tuple[float, list[torch.Tensor]]:
        network = load_network(folder, dtype)
        lora = lora_model(network, TrainSettings(rank=4))
        set_low_rank(lora, 0.1)
        loss = gradients(lora, [batch])
        return loss, [master.grad for master in lora.masters if master.grad is not None]

    loss, wide = gradient(torch.float32)
    compiled_loss, compiled = gradient(torch.bfloat16)
    monkeypatch.setattr(native, "library", lambda: None)
    products._tile_library.cache_clear()
    portable_loss, portable = gradient(torch.bfloat16)
    products._tile_library.cache_clear()
    assert compiled_loss == pytest.approx(loss, rel=2e-2)
    assert portable_loss == pytest.approx(loss, rel=2e-2)
    for exact, one, other in zip(wide, compiled, portable, strict=True):
        size = float(exact.norm())
        off, allowed = float((one - exact).norm()) / size, float((other - exact).norm()) / size
        assert off < max(0.02, 1.5 * allowed), (off, allowed)
        assert off < 0.1


@pytest.mark.parametrize(("family", "portable"), [("llama", False), ("llama", True), ("gemma2", False)])
def test_recomputed_activations_equal_kept_ones(
    tmp_path: Path, family: str, portable: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To the bit, and it is not kept beside: a layer's norms and its gated middle, once each."""
    if portable:
        monkeypatch.setattr(native, "library", lambda: None)
        products._tile_library.cache_clear()
    folder = write_model(tmp_path / family, family, sizes=TILED)
    renderer = Renderer(folder)
    batch = lay_out([renderer.conversation(messages) for messages in ROWS])
    network = load_network(folder)

    def step() -> tuple[list[torch.Tensor], int]:
        trained = lora_model(network, TrainSettings(rank=4))
        set_low_rank(trained, 0.1)
        kept: dict[int, int] = {}

        def keep(x: torch.Tensor) -> torch.Tensor:
            kept[x.data_ptr()] = x.nbytes
            return x

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
            gradients(trained, [batch])
        return [master.grad for master in trained.masters if master.grad is not None], sum(kept.values())

    again, less = step()
    monkeypatch.setattr(lora_module, "recompute", lambda x: None)
    before, more = step()
    products._tile_library.cache_clear()
    assert all(map(torch.equal, again, before))
    assert any(gradient.any() for gradient in again)
    shape = network.shape
    middle = network.layers[0].linear["down"].into
    made = (2 * shape.layers - 1) * shape.width + shape.layers * middle  # the first norm's input needs no gradient
    assert more - less == 2 * batch.tokens * made


@pytest.mark.parametrize(
    ("schedule", "steps", "warmup"),
    [("cosine", 20, 0.2), ("linear", 7, 0.05), ("cosine", 100, 0.0), ("linear", 100, 0.0), ("constant", 4, 0.25)],
)
def test_learning_rates_equal_transformers(schedule: str, steps: int, warmup: float) -> None:
    """But for the warm-up's start: transformers' first step has a rate of zero and learns nothing, ours goes first."""
    settings = TrainSettings(epochs=1, learning_rate=0.5, warmup=warmup, schedule=schedule)  # type: ignore[arg-type]
    warm = math.ceil(warmup * steps)
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=0.5)
    name = "constant_with_warmup" if schedule == "constant" else schedule
    scheduler = get_scheduler(name, optimizer, num_warmup_steps=warm, num_training_steps=steps)
    theirs = []
    for _ in range(steps + 1):
        theirs.append(scheduler.get_last_lr()[0])
        optimizer.step()
        scheduler.step()
    wanted = [theirs[step + 1] if step < warm else theirs[step] for step in range(steps)]
    assert [learning_rate(step, steps, settings) for step in range(steps)] == pytest.approx(wanted, abs=1e-12)


@pytest.mark.parametrize("clip", [0.02, 100.0])
def test_trainer_equals_torch_adamw_with_clipping(tmp_path: Path, clip: float) -> None:

    folder, rows = _setting(tmp_path, "llama")
    network = load_network(folder, torch.float32)
    settings = TrainSettings(rank=4, epochs=1, learning_rate=0.02, warmup=0.2, weight_decay=0.1, clip=clip, keep="last")
    plan = [[lay_out(rows[:2])], [lay_out(rows[2:])], [lay_out(rows)]] * 2
    ours, theirs = lora_model(network, settings), lora_model(network, settings)
    fit(ours, plan, [], settings, tmp_path / "w")
    optimizer = torch.optim.AdamW(theirs.masters, lr=1.0, weight_decay=0.1)
    norms = []
    for place, step in enumerate(plan):
        gradients(theirs, step)
        norms.append(float(torch.nn.utils.clip_grad_norm_(theirs.masters, clip)))
        optimizer.param_groups[0]["lr"] = learning_rate(place, len(plan), settings)
        optimizer.step()
        optimizer.zero_grad()
        theirs.parameters_changed()
    assert (max(norms) > clip) == (clip < 1)
    for one, other in zip(ours.masters, theirs.masters, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


# Full fine-tuning


# More labels than one chunk of the loss has, so that the head's gradient is a sum.
MANY = [*ROWS, *(row(f"say {n}", f'{{"n":{n},"said":"{"na" * 40}"}}') for n in range(8))]
RATE, DECAY = 0.003, 0.1


def _full(folder: Path, **changes: object) -> FullModel:
    settings = TrainSettings(method="full", **changes)  # type: ignore[arg-type]
    return full_model(load_network(folder, torch.float32), settings, folder)


def _rows(folder: Path) -> list[Rendered]:
    renderer = Renderer(folder)
    return [renderer.conversation(messages) for messages in MANY]


def _reference(folder: Path) -> Any:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).train()
    # Where the padding token is the end token, transformers leaves a token out that occurs in every row.
    model.get_input_embeddings().padding_idx = None
    return model


def _weights(trained: FullModel, work: Path) -> dict[str, torch.Tensor]:
    return load_file(saved(trained, work / "saved") / "model.safetensors")


@pytest.mark.parametrize(
    ("family", "layers"), [*((family, None) for family in FAMILIES), *((family, 2) for family in ("qwen2", "gemma3"))]
)
def test_gradients_and_steps_equal_transformers(tmp_path: Path, family: str, layers: int | None) -> None:
    folder = write_model(tmp_path / family, family)
    rows = _rows(folder)
    model = _reference(folder)
    learns = dict(model.named_parameters())
    if layers is not None:
        learns = {
            name: value for name, value in learns.items() if name.startswith(("model.layers.1", "model.layers.2"))
        }
        model.requires_grad_(False)
    for value in learns.values():
        value.requires_grad_()
    matrices = [value for value in learns.values() if value.ndim == 2]
    vectors = [value for value in learns.values() if value.ndim == 1]
    theirs = torch.optim.AdamW(
        [{"params": matrices}, {"params": vectors, "weight_decay": 0.0}], RATE, weight_decay=DECAY
    )
    trained = _full(folder, layers=layers)
    assert trained.trained_numbers == sum(value.numel() for value in learns.values())
    ours = make_optimizer(trained, TrainSettings(method="full", learning_rate=RATE, weight_decay=DECAY))
    step = [lay_out(rows[:4]), lay_out(rows[4:])]
    for turn in range(4):
        expected = reference_loss(model, rows)
        expected.backward()
        assert gradients(trained, step) == pytest.approx(float(expected.detach()), rel=1e-3 if turn else 2e-5)
        for master, kind in zip(trained.masters, (matrices, vectors), strict=True):
            assert master.grad is not None
            found, wanted = master.grad.norm(), torch.cat([value.grad.flatten() for value in kind]).norm()
            assert float(found) == pytest.approx(float(wanted), rel=5e-3 if turn else 1e-4)
        torch.nn.utils.clip_grad_norm_(trained.masters, 1.0)
        torch.nn.utils.clip_grad_norm_(learns.values(), 1.0)
        for optimizer in (ours, theirs):
            optimizer.step()
            optimizer.zero_grad()
        trained.parameters_changed()
    end, state = _weights(trained, tmp_path), model.state_dict()
    tied = model.config.tie_word_embeddings
    assert set(end) == set(state) - ({"lm_head.weight"} if tied else set())
    # Adam divides by the gradient's size: where a gradient is all but zero, rounding decides its sign.
    off = sum(int(((end[name] - state[name]).abs() > RATE / 10).sum()) for name in end)
    assert off <= 0.005 * sum(value.numel() for value in end.values())
    untouched = load_network(folder, torch.float32)
    assert torch.equal(end["model.embed_tokens.weight"], untouched.embedding) == (layers is not None)


def test_embedding_gradient_sums_in_fp32() -> None:
    from tunesmith.engines.native.network.network import embed

    weight = torch.zeros(3, 2, dtype=torch.bfloat16, requires_grad=True)
    embed(torch.zeros(3000, dtype=torch.long), weight).sum().backward()
    assert weight.grad is not None
    assert float(weight.grad[0, 0]) == pytest.approx(3000, rel=0.01)  # added up in bf16 it ends at 256


def test_masters_start_as_the_stored_weights(tmp_path: Path) -> None:
    folder = write_model(tmp_path / "m")
    trained = full_model(load_network(folder), TrainSettings(method="full"), folder)
    assert trained.network.dtype == torch.bfloat16
    with pytest.raises(TunesmithError, match="no weight changed enough"):
        _weights(trained, tmp_path)
    trained.masters[1][0] += 0.5
    changed = _weights(trained, tmp_path)
    stored = load_file(folder / "model.safetensors")
    assert {name for name in changed if not torch.equal(changed[name], stored[name])} == {"model.norm.weight"}
    assert changed["model.norm.weight"].dtype == torch.float32


def test_too_little_memory_is_refused_with_advice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write_model(tmp_path / "m")
    needed = 24 * _full(folder).trained_numbers  # fp32 copies here
    monkeypatch.setattr(memory, "available_memory", lambda: needed - 1)
    with pytest.raises(Refused, match="in full takes") as told:
        _full(folder)
    assert told.value.fix == "set train.layers to 2 or fewer, or train.method to lora"
    _full(folder, layers=2)
    _full(folder, keep="last")
    monkeypatch.setattr(memory, "available_memory", lambda: 1000)
    with pytest.raises(Refused) as told:
        _full(folder, layers=1)
    assert told.value.fix == "set train.method to lora"
