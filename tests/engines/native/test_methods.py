"""Kinds of LoRA, gradient accumulation, best weights and early stopping; compared with PEFT where it has them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from peft import PeftModel
from safetensors.torch import load, load_file, save_file
from transformers import AutoModelForCausalLM

from tests.said import Said
from tests.tiny import row, write_model
from tests.trained import (
    base_of,
    fit,
    gradients,
    lora_model,
    reference_loss,
    saved,
    set_low_rank,
    validation_loss,
)
from tunesmith.core.errors import UsageError
from tunesmith.engines.batch import Batch, lay_out
from tunesmith.engines.native.adapters.adapter import adapted_linear, read_adapter
from tunesmith.engines.native.network.attention import shared_prefix_attention
from tunesmith.engines.native.network.network import forward, logits
from tunesmith.engines.native.network.weights import load_network
from tunesmith.models.rendering import Rendered, Renderer
from tunesmith.models.weight_files import read_adapter_file
from tunesmith.training.batches.batch_plan import lay_out_step
from tunesmith.training.estimates.estimate import trial_step
from tunesmith.training.objectives import CrossEntropy
from tunesmith.training.settings import TrainSettings
from tunesmith.training.state import TrainerState

ROWS = [row(f"turn on light {n}", f'{{"intent":"on","slots":{{"light":{n}}}}}' + " and so on" * n) for n in range(6)]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_model(tmp_path / "model")


@pytest.fixture
def rows(folder: Path) -> list[Rendered]:
    renderer = Renderer(folder)
    return [renderer.conversation(messages) for messages in ROWS]


@pytest.mark.parametrize(
    "settings",
    [
        {"scaling": "root"},
        {"layers": 1},
        {"dora": True},
        {"dora": True, "targets": ("q_proj", "up_proj", "o_proj"), "scaling": "root"},
        {"layers": 2, "targets": ("v_proj", "down_proj"), "scaling": "root", "alpha": 3.0},
    ],
)
def test_peft_reads_every_kind_of_adapter(tmp_path: Path, folder: Path, rows: list[Rendered], settings: dict) -> None:
    network, base = load_network(folder, torch.float32), base_of(folder)
    lora = lora_model(network, TrainSettings(rank=4, **settings), base)
    with torch.no_grad():
        for master in lora.masters[:2]:
            master.normal_(std=0.3, generator=torch.Generator().manual_seed(1))
        if lora.dora is not None:
            lora.dora.master.mul_(1.0 + 0.3 * torch.rand(lora.dora.master.shape))
    lora.parameters_changed()
    path = saved(lora, tmp_path / "adapter")
    facts = read_adapter_file(path, base=base.digest, fingerprint=base.fingerprint)
    assert facts.parameters == lora.trained_numbers
    batch = lay_out(rows[:1])
    with torch.no_grad():
        hidden = forward(network, batch.ids, lora.linear(), shared_prefix_attention(batch, network))
        plain = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        without = plain(batch.ids[None]).logits[0]
        expected = PeftModel.from_pretrained(plain, str(path))(batch.ids[None]).logits[0]
    torch.testing.assert_close(logits(network, hidden), expected, rtol=1e-4, atol=1e-4)
    assert (expected - without).abs().max() > 0.05, "the adapter changes something"
    again, made = read_adapter(path, network, base), lora.adapter()
    with torch.no_grad():
        served = forward(network, batch.ids, adapted_linear(network, again), shared_prefix_attention(batch, network))
    torch.testing.assert_close(served, hidden, rtol=1e-4, atol=1e-4)
    assert again.a.keys() == made.a.keys()
    assert again.config == made.config


def test_accumulated_gradients_equal_the_whole_steps(folder: Path, rows: list[Rendered]) -> None:
    network = load_network(folder, torch.float32)
    whole, parts = lay_out_step(rows, 100_000), lay_out_step(rows, 120)
    assert len(whole) == 1
    assert len(parts) > 2
    lora = lora_model(network, TrainSettings(rank=4))
    set_low_rank(lora, 0.3)
    losses, found = [], []
    for step in (whole, parts):
        losses.append(gradients(lora, step))
        found.append([master.grad.clone() for master in lora.masters])
        for master in lora.masters:
            master.grad = None
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    for one, other in zip(*found, strict=True):
        assert (one - other).norm() < 1e-4 * one.norm()


@given(st.lists(st.integers(1, 40), min_size=1, max_size=12), st.integers(64, 200))
def test_batches_hold_every_row_once_within_the_limit(lengths: list[int], tokens: int) -> None:
    rows = [Rendered((7, 8, 9, *range(100, 100 + n)), (False,) * 3 + (True,) * n) for n in lengths]
    parts = lay_out_step(rows, tokens)
    assert sorted(n for part in parts for n in _labels(part)) == sorted(lengths)
    for part in parts:
        assert part.tokens <= tokens or len(part.lengths) == 1


def _labels(part) -> list[int]:
    ends = [sum(part.lengths[: place + 1]) + part.prefix for place in range(len(part.lengths))]
    starts = [part.prefix, *ends]
    # A row's first label is predicted by the token before it, which may be the prefix's last: no row has that here.
    return [
        int(((part.predicts >= start) & (part.predicts < end)).sum()) for start, end in zip(starts, ends, strict=False)
    ]


def test_trial_step_changes_nothing(folder: Path, rows: list[Rendered]) -> None:
    network = load_network(folder, torch.float32)
    lora = lora_model(network, TrainSettings(rank=4))
    before = [master.clone() for master in lora.masters]
    trial_step(lora, CrossEntropy())(lay_out_step(rows, 120))
    assert all(torch.equal(one, other) for one, other in zip(before, lora.masters, strict=True))
    assert all(master.grad is None for master in lora.masters)


def _contrary(folder: Path) -> Batch:
    """The first three rows' requests with other answers: the better those are learned, the worse these are foretold."""
    renderer = Renderer(folder)
    wrong = [
        (*messages[:-1], messages[-1].model_copy(update={"content": "nothing of the kind"})) for messages in ROWS[:3]
    ]
    return lay_out([renderer.conversation(messages) for messages in wrong])


def _over_trained(folder: Path, rows: list[Rendered], tmp_path: Path, **more: object) -> tuple:
    """A run whose held-out rows get worse from some step on."""
    network = load_network(folder, torch.float32)
    settings = TrainSettings(
        rank=8, epochs=1, learning_rate=0.03, warmup=0.1, schedule="constant", validations=20, **more
    )
    lora = lora_model(network, settings)
    held_out = [_contrary(folder)]
    course = fit(lora, [[lay_out(rows[:3])]] * 60, held_out, settings, tmp_path / "w")
    return course, validation_loss(lora, held_out), settings


def test_best_weights_are_kept(tmp_path: Path, folder: Path, rows: list[Rendered]) -> None:
    course, loss, _ = _over_trained(folder, rows, tmp_path)
    probabilities = [each["probability"] for each in course.validation]
    assert course.step == 60
    assert probabilities[-1] < max(probabilities), "the run went past its best"
    assert loss == pytest.approx(course.validation[probabilities.index(max(probabilities))]["loss"], rel=1e-6)


def test_overfitting_is_reported_and_recorded(tmp_path: Path, folder: Path, rows: list[Rendered]) -> None:
    network, said = load_network(folder, torch.float32), Said()
    settings = TrainSettings(rank=8, epochs=1, learning_rate=0.03, warmup=0.1, schedule="constant", validations=20)
    plan = [[lay_out(rows[:3])]] * 60
    course = fit(lora_model(network, settings), plan, [_contrary(folder)], settings, tmp_path / "w", said)
    warned = [line for line in said.lines if line.startswith("overfitting at step")]
    assert warned, "the held-out rows contradict the learned ones"
    first = course.overfitting[0]
    assert warned[0].startswith(f"overfitting at step {first['step']:.0f}: ")
    last = course.overfitting[-1]
    assert last["lowest_loss"] == min(each["loss"] for each in course.validation) < last["loss"]
    window = [point["loss"] for point in course.curve if last["step"] - 3 < point["step"] <= last["step"]]
    assert last["training_loss"] == pytest.approx(sum(window) / 3)
    assert last["training_loss"] < last["lowest_training_loss"]


def test_rise_with_the_training_loss_is_not_overfitting() -> None:
    def course(training: list[float], validation: list[float]) -> TrainerState:
        curve = [{"step": n + 1.0, "loss": loss} for n, loss in enumerate(training)]
        return TrainerState(len(training), 1.0, curve, [{"step": n + 1.0, "loss": x} for n, x in enumerate(validation)])

    assert [each["step"] for each in course([3.0, 2.0, 1.0], [2.0, 1.5, 1.7]).overfitting] == [3.0]
    assert not course([3.0, 2.0, 4.0], [2.0, 1.5, 1.7]).overfitting
    assert not course([3.0, 2.0, 1.0], [2.0, 1.5, 1.5]).overfitting
    assert not course([], []).overfitting


def test_last_weights_are_kept_on_request(tmp_path: Path, folder: Path, rows: list[Rendered]) -> None:
    course, loss, _ = _over_trained(folder, rows, tmp_path, keep="last")
    assert loss == pytest.approx(course.validation[-1]["loss"], rel=1e-6)


@pytest.mark.parametrize(
    ("keep", "held"),
    [("best", {"parameter", "exp_avg", "exp_avg_sq", "best"}), ("last", {"parameter", "exp_avg", "exp_avg_sq"})],
)
def test_checkpoints_hold_best_weights_only_if_kept(
    tmp_path: Path, folder: Path, rows: list[Rendered], keep: str, held: set[str]
) -> None:
    _over_trained(folder, rows, tmp_path, keep=keep, checkpoint_seconds=1e-9)
    (written,) = {frozenset(load(file.read_bytes())) for file in (tmp_path / "w").glob("step-*/tensors.safetensors")}
    assert {name.partition(".")[2] for name in written} == held


def test_patience_ends_a_training_and_its_resume(tmp_path: Path, folder: Path, rows: list[Rendered]) -> None:
    course, loss, settings = _over_trained(folder, rows, tmp_path, patience=2)
    assert course.step < 60
    assert "2 validations" in str(course.ended)
    assert course.best == len(course.validation) - 3
    network = load_network(folder, torch.float32)
    lora = lora_model(network, settings)
    again = fit(lora, [[lay_out(rows[:3])]] * 60, [_contrary(folder)], settings, tmp_path / "w")
    assert again.step == course.step, "nothing more is trained"
    assert validation_loss(lora, [_contrary(folder)]) == pytest.approx(loss, rel=1e-6)


def test_b_rate_moves_b_only(folder: Path, rows: list[Rendered], tmp_path: Path) -> None:
    network = load_network(folder, torch.float32)
    moved = []
    for rate in (1.0, 4.0):
        settings = TrainSettings(rank=4, epochs=1, learning_rate=1e-3, warmup=0.0, b_rate=rate, clip=100.0, keep="last")
        lora = lora_model(network, settings)
        before = [master.clone() for master in lora.masters]
        fit(lora, [[lay_out(rows)]], [], settings, tmp_path / f"{rate}")
        moved.append([(new - old).abs().max() for new, old in zip(lora.masters, before, strict=True)])
    assert float(moved[1][1] / moved[0][1]) == pytest.approx(4.0, rel=1e-3)
    assert float(moved[1][0]) == pytest.approx(float(moved[0][0]), abs=1e-6)


def test_dora_on_a_weight_with_a_row_of_zeros(tmp_path: Path, folder: Path, rows: list[Rendered]) -> None:
    """Its length is nought, and what is divided by it no number."""
    path = write_model(tmp_path / "m") / "model.safetensors"
    tensors = load(path.read_bytes())
    for name in ("model.layers.0.mlp.up_proj.weight", "model.layers.1.self_attn.q_proj.weight"):
        tensors[name][:2] = 0.0
    save_file(tensors, path, metadata={"format": "pt"})
    network, settings = load_network(tmp_path / "m", torch.float32), TrainSettings(rank=4, dora=True)
    lora = lora_model(network, settings)
    course = fit(lora, [[lay_out(rows[:3])]] * 8, [], settings, tmp_path / "w")
    assert course.curve[-1]["loss"] < course.curve[0]["loss"]
    assert all(bool(master.isfinite().all()) for master in lora.masters)


def test_unknown_target_is_refused(folder: Path) -> None:
    for targets in (("c_attn",), ("q_proj", "c_attn")):
        with pytest.raises(UsageError, match="no linear layer called 'c_attn'"):
            lora_model(load_network(folder, torch.float32), TrainSettings(targets=targets))


@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_dora_learns_as_in_peft(tmp_path: Path, family: str) -> None:
    folder = write_model(tmp_path / "m", family)
    renderer = Renderer(folder)
    rows = [renderer.conversation(messages) for messages in ROWS[:3]]
    network = load_network(folder, torch.float32)
    settings = TrainSettings(rank=4, dora=True)
    base = base_of(folder)
    lora = lora_model(network, settings, base)
    start = saved(lora, tmp_path / "start")
    plain = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    reference = PeftModel.from_pretrained(plain, str(start), is_trainable=True)
    trained = {name: p for name, p in reference.named_parameters() if p.requires_grad}
    ours = torch.optim.SGD(lora.masters, lr=0.5)
    theirs = torch.optim.SGD(trained.values(), lr=0.5)
    for _ in range(3):
        expected = reference_loss(reference, rows)
        expected.backward()
        assert gradients(lora, [lay_out(rows)]) == pytest.approx(float(expected.detach()), rel=1e-4)
        ours.step()
        lora.parameters_changed()
        theirs.step()
        ours.zero_grad()
        theirs.zero_grad()
    end = load_file(saved(lora, tmp_path / "end") / "adapter_model.safetensors")
    assert sum("magnitude" in name for name in end) == 21
    for name, parameter in trained.items():
        mine = end[name.replace(".default.weight", "" if "magnitude" in name else ".weight")]
        torch.testing.assert_close(mine, parameter.detach(), rtol=2e-3, atol=2e-4)
