"""The engine's arithmetic against transformers and PEFT, number by number, on tiny random models."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, get_scheduler

from tests.tiny import FAMILIES, ROWS, TILED, row, write_model
from tests.trained import (
    base_of,
    batch_loss,
    fit,
    gradients,
    lora_model,
    reference_loss,
    saved,
    set_low_rank,
)
from tunesmith.engines.batch import label_count, lay_out
from tunesmith.engines.native import kernels as native
from tunesmith.engines.native.adapters import dora as dora_module
from tunesmith.engines.native.adapters import lora as lora_module
from tunesmith.engines.native.adapters.adapter import read_adapter
from tunesmith.engines.native.network import products
from tunesmith.engines.native.network.network import frozen_linear
from tunesmith.engines.native.network.weights import load_network
from tunesmith.engines.settings import TARGETS
from tunesmith.models.rendering import LossOn, Rendered, Renderer
from tunesmith.training.batches.batch_plan import plan
from tunesmith.training.schedule import learning_rate
from tunesmith.training.settings import TrainSettings


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


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "mistral"])
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


@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("family", ["llama", "gemma2"])
@pytest.mark.parametrize("portable", [False, True])
def test_recomputed_activations_equal_kept_ones(
    tmp_path: Path, family: str, dora: bool, portable: bool, monkeypatch: pytest.MonkeyPatch
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
        trained = lora_model(network, TrainSettings(rank=4, dora=dora))
        set_low_rank(trained, 0.1)
        kept: dict[int, int] = {}

        def keep(x: torch.Tensor) -> torch.Tensor:
            kept[x.data_ptr()] = x.nbytes
            return x

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
            gradients(trained, [batch])
        return [master.grad for master in trained.masters if master.grad is not None], sum(kept.values())

    again, less = step()
    for module in (lora_module, dora_module):
        monkeypatch.setattr(module, "recompute", lambda x: None)
    before, more = step()
    products._tile_library.cache_clear()
    assert all(map(torch.equal, again, before))
    assert any(gradient.any() for gradient in again)
    shape = network.shape
    middle = network.layers[0].linear["down"].into
    made = (2 * shape.layers - 1) * shape.width + shape.layers * middle  # the first norm's input needs no gradient
    assert more - less == 2 * batch.tokens * made


def test_adapter_gives_the_same_loss_in_peft(tmp_path: Path) -> None:
    folder, rows = _setting(tmp_path, "llama")
    base = base_of(folder)
    network = load_network(folder, torch.float32)
    lora = lora_model(network, TrainSettings(rank=4, targets=("q_proj", "v_proj", "down_proj")), base)
    set_low_rank(lora, 0.2)
    path = saved(lora, tmp_path / "adapter")
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32), str(path))
    batch = lay_out(rows)
    with torch.no_grad():
        expected = reference_loss(model, rows)
        assert float(batch_loss(lora, batch, batch.labels.numel())) == pytest.approx(float(expected), rel=1e-5)
        without = reference_loss(model.unload(), rows)
    assert abs(float(without) - float(expected)) > 0.01, "the adapter changes something"
    again = read_adapter(path, network, base)
    for place, value in lora.adapter().a.items():
        assert torch.equal(again.a[place], value)
        assert torch.equal(again.b[place], lora.adapter().b[place])


def test_batch_loss_is_the_sum_over_its_rows(tmp_path: Path) -> None:
    folder, rows = _setting(tmp_path, "qwen3")
    network = load_network(folder, torch.float32)
    lora = lora_model(network, TrainSettings(rank=2))
    with torch.no_grad():
        together = float(batch_loss(lora, lay_out(rows), 1.0))
        alone = sum(float(batch_loss(lora, lay_out([one]), 1.0)) for one in rows)
    assert together == pytest.approx(alone, rel=1e-5)


@pytest.mark.parametrize("loss_on", ["assistant", "last", "all"])
def test_loss_equals_transformers_over_the_same_labels(tmp_path: Path, loss_on: LossOn) -> None:
    folder = write_model(tmp_path / "m")
    renderer = Renderer(folder)
    turns = [(*ROWS[0], *row("and the hall", "yes")[1:]), ROWS[1], ROWS[2]]
    rows = [renderer.conversation(messages, loss_on) for messages in turns]
    network = load_network(folder, torch.float32)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        total, labels = 0.0, 0
        for one in rows:
            ids = torch.tensor([one.ids])
            wanted = ids.masked_fill(~torch.tensor([one.trained]), -100)
            count = label_count(one)
            total += float(model(ids, labels=wanted).loss) * count
            labels += count
        batch = lay_out(rows)
        ours = float(batch_loss(lora_model(network, TrainSettings(rank=2)), batch, float(labels)))
    assert batch.labels.numel() == labels
    assert (labels == sum(len(one.ids) - 1 for one in rows)) == (loss_on == "all")
    assert ours == pytest.approx(total / labels, rel=1e-5)


def test_no_label_is_lost_between_rendering_and_batch(tmp_path: Path) -> None:
    folder, rows = _setting(tmp_path, "llama")
    batch = lay_out(rows)
    labels = [token for one in rows for token, marked in zip(one.ids, one.trained, strict=True) if marked]
    assert batch.labels.tolist() == labels
    end = Renderer(folder).stop_ids
    assert sum(token in end for token in labels) == len(rows), "every answer's end token is learned"


def test_plan_is_a_function_of_seed_and_epoch(tmp_path: Path) -> None:
    _, rows = _setting(tmp_path, "llama")
    many = rows * 10
    first = plan(many, 4, seed=1, epoch=0)
    assert first == plan(many, 4, seed=1, epoch=0)
    assert first != plan(many, 4, seed=1, epoch=1)
    assert first != plan(many, 4, seed=2, epoch=0)
    assert sorted(place for batch in first for place in batch) == list(range(30))


@pytest.mark.parametrize("schedule", ["cosine", "linear", "constant"])
def test_schedule_rises_then_falls(schedule: str) -> None:
    settings = TrainSettings(epochs=1, learning_rate=0.5, warmup=0.2, schedule=schedule)  # type: ignore[arg-type]
    rates = [learning_rate(step, 20, settings) for step in range(20)]
    assert rates[:4] == pytest.approx([0.125, 0.25, 0.375, 0.5])
    assert max(rates) == 0.5
    assert all(math.isfinite(rate) and rate > 0 for rate in rates)
    assert (rates[-1] < 0.05) == (schedule != "constant")


@pytest.mark.parametrize("schedule", ["cosine", "linear", "constant"])
@pytest.mark.parametrize(("steps", "warmup"), [(20, 0.2), (7, 0.05), (100, 0.0), (4, 0.25)])
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


def test_frozen_linear_adds_biases(tmp_path: Path) -> None:
    network = load_network(write_model(tmp_path / "m", "qwen2"), torch.float32)
    assert {group for group, product in network.layers[0].linear.items() if product.bias is not None} == {"qkv"}
    zero = frozen_linear(network)(0, "qkv", torch.zeros(1, 32))
    assert torch.equal(zero[0], network.layers[0].linear["qkv"].bias)


def test_trainer_lowers_the_loss(tmp_path: Path) -> None:

    folder, rows = _setting(tmp_path, "llama")
    network = load_network(folder, torch.float32)
    settings = TrainSettings(rank=8, epochs=1, learning_rate=0.02, warmup=0.1)
    steps = [[lay_out(rows)]] * 120
    course = fit(lora_model(network, settings), steps, steps[0], settings, tmp_path / "w")
    assert course.curve[-1]["loss"] < 0.5 * course.curve[0]["loss"]
    assert len(course.validation) == settings.validations
