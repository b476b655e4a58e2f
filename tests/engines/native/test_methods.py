"""Kinds of LoRA, gradient accumulation, best weights and early stopping; adapters as PEFT reads them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from peft import PeftModel
from safetensors.torch import load
from transformers import AutoModelForCausalLM

from tests.hf_models import change_adapter
from tests.said import Said
from tests.tiny import row, write_model
from tests.trained import (
    base_of,
    fit,
    gradients,
    lora_model,
    saved,
    set_low_rank,
    validation_loss,
)
from tunesmith.core.errors import UsageError
from tunesmith.engines.batch import Batch, computed_tokens, label_count, lay_out
from tunesmith.engines.hf.loaded import LoadedHFModel
from tunesmith.engines.native.adapters.adapter import adapted_linear, read_adapter
from tunesmith.engines.native.network.attention import shared_prefix_attention
from tunesmith.engines.native.network.network import forward, logits
from tunesmith.engines.native.network.weights import load_network
from tunesmith.engines.settings import WeightSettings
from tunesmith.models.rendering import Rendered, Renderer
from tunesmith.models.weight_files import read_adapter_file
from tunesmith.training.batches.batch_plan import lay_out_step, plan
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
        {"targets": ("q_proj", "v_proj", "down_proj")},
        {"layers": 2, "targets": ("v_proj", "down_proj"), "scaling": "root", "alpha": 3.0},
        {"layers": 1},
    ],
)
def test_peft_reads_every_kind_of_adapter(tmp_path: Path, folder: Path, rows: list[Rendered], settings: dict) -> None:
    network, base = load_network(folder, torch.float32), base_of(folder)
    lora = lora_model(network, TrainSettings(rank=4, **settings), base)
    set_low_rank(lora, 0.3)
    path = saved(lora, tmp_path / "adapter")
    facts = read_adapter_file(path, base=base.digest, fingerprint=base.fingerprint)
    assert facts.parameters == lora.trained_numbers
    batch = lay_out(rows[:1])
    with torch.no_grad():
        hidden = forward(network, batch.ids, lora.linear(), shared_prefix_attention(batch, network))
    _serves_as_peft(folder, path, batch, hidden)
    again, made = read_adapter(path, network, base), lora.adapter()
    assert again.config == made.config
    for place, value in made.a.items():
        assert torch.equal(again.a[place], value)
        assert torch.equal(again.b[place], made.b[place])


def _serves_as_peft(folder: Path, path: Path, batch: Batch, hidden: torch.Tensor | None = None) -> None:
    """The network gives an adapter's logits as PEFT does. hidden: what the training computed."""
    network, base = load_network(folder, torch.float32), base_of(folder)
    plain = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        linear = adapted_linear(network, read_adapter(path, network, base))
        served = forward(network, batch.ids, linear, shared_prefix_attention(batch, network))
        without = plain(batch.ids[None]).logits[0]
        expected = PeftModel.from_pretrained(plain, str(path))(batch.ids[None]).logits[0]
    torch.testing.assert_close(logits(network, served), expected, rtol=1e-4, atol=2e-4)
    assert (expected - without).abs().max() > 0.05, "the adapter changes something"
    if hidden is not None:
        torch.testing.assert_close(served, hidden, rtol=1e-4, atol=2e-4)


@pytest.mark.parametrize(
    ("family", "settings"),
    [("llama", {"dora": True, "targets": ("q_proj", "up_proj")}), ("qwen2", {"dora": True, "start": "pissa"})],
)
def test_what_hf_trained_is_served(tmp_path: Path, family: str, settings: dict) -> None:
    """DoRA and PiSSA, which the native engine does not train; qwen2 has biases, which magnitudes leave alone."""
    folder = write_model(tmp_path / "m", family)
    trained = LoadedHFModel(base_of(folder)).trainable(WeightSettings(rank=4, **settings), seed=0, state_bytes=16)
    change_adapter(trained)
    batch = lay_out([Renderer(folder).conversation(ROWS[0])])
    _serves_as_peft(folder, saved(trained, tmp_path / "adapter"), batch)


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
    labels = [label for part in parts for label in part.labels.tolist()]
    assert sorted(labels) == sorted(100 + place for n in lengths for place in range(n))
    for part in parts:
        assert part.tokens <= tokens or len(part.lengths) == 1


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


def _over_trained(folder: Path, rows: list[Rendered], work: Path, **more: object) -> tuple:
    """A run whose held-out rows get worse from some step on: its state, its last loss, what it said."""
    network, said = load_network(folder, torch.float32), Said()
    fixed = {"rank": 8, "epochs": 1, "learning_rate": 0.03, "warmup": 0.1, "schedule": "constant", "validations": 20}
    settings = TrainSettings.model_validate({**fixed, **more})
    lora = lora_model(network, settings)
    held_out = [_contrary(folder)]
    course = fit(lora, [[lay_out(rows[:3])]] * 60, held_out, settings, work, said)
    return course, validation_loss(lora, held_out), said.lines


def test_best_weights_are_kept_and_overfitting_is_reported(tmp_path: Path, folder: Path, rows: list[Rendered]) -> None:
    course, loss, lines = _over_trained(folder, rows, tmp_path / "w", checkpoint_seconds=1e-9)
    probabilities = [each["probability"] for each in course.validation]
    assert course.step == 60
    assert probabilities[-1] < max(probabilities), "the run went past its best"
    assert loss == pytest.approx(course.validation[probabilities.index(max(probabilities))]["loss"], rel=1e-6)
    warned = [line for line in lines if line.startswith("overfitting at step")]
    assert warned, "the held-out rows contradict the learned ones"
    assert warned[0].startswith(f"overfitting at step {course.overfitting[0]['step']:.0f}: ")
    last = course.overfitting[-1]
    assert last["lowest_loss"] == min(each["loss"] for each in course.validation) < last["loss"]
    window = [point["loss"] for point in course.curve if last["step"] - 3 < point["step"] <= last["step"]]
    assert last["training_loss"] == pytest.approx(sum(window) / 3)
    assert last["training_loss"] < last["lowest_training_loss"]
    assert _kept(tmp_path / "w") == {"parameter", "exp_avg", "exp_avg_sq", "best"}


def _kept(work: Path) -> set[str]:
    """What the checkpoints hold of each tensor."""
    (written,) = {frozenset(load(file.read_bytes())) for file in work.glob("step-*/tensors.safetensors")}
    return {name.partition(".")[2] for name in written}


def test_last_weights_and_patience(tmp_path: Path, folder: Path, rows: list[Rendered]) -> None:
    course, loss, _ = _over_trained(folder, rows, tmp_path / "last", keep="last", checkpoint_seconds=1e-9)
    assert loss == pytest.approx(course.validation[-1]["loss"], rel=1e-6)
    assert _kept(tmp_path / "last") == {"parameter", "exp_avg", "exp_avg_sq"}
    course, loss, _ = _over_trained(folder, rows, tmp_path / "w", patience=2)
    assert course.step < 60
    assert "2 validations" in str(course.ended)
    assert course.best == len(course.validation) - 3
    again, same, _ = _over_trained(folder, rows, tmp_path / "w", patience=2)
    assert (again.step, same) == (course.step, pytest.approx(loss, rel=1e-6)), "nothing more is trained"


def test_rise_with_the_training_loss_is_not_overfitting() -> None:
    def course(training: list[float], validation: list[float]) -> TrainerState:
        curve = [{"step": n + 1.0, "loss": loss} for n, loss in enumerate(training)]
        return TrainerState(len(training), 1.0, curve, [{"step": n + 1.0, "loss": x} for n, x in enumerate(validation)])

    assert [each["step"] for each in course([3.0, 2.0, 1.0], [2.0, 1.5, 1.7]).overfitting] == [3.0]
    assert not course([3.0, 2.0, 4.0], [2.0, 1.5, 1.7]).overfitting
    assert not course([3.0, 2.0, 1.0], [2.0, 1.5, 1.5]).overfitting
    assert not course([], []).overfitting


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


def test_unknown_target_is_refused(folder: Path) -> None:
    for targets in (("c_attn",), ("q_proj", "c_attn")):
        with pytest.raises(UsageError, match="no linear layer called 'c_attn'"):
            lora_model(load_network(folder, torch.float32), TrainSettings(targets=targets))


# How rows are laid end to end: what is read stays as it is, what is computed has few shapes


@st.composite
def _batches(draw: st.DrawFn) -> list[Rendered]:
    shared = draw(st.lists(st.integers(1, 9), max_size=40))
    rows = []
    for _ in range(draw(st.integers(1, 12))):
        asked = draw(st.lists(st.integers(1, 9), min_size=1, max_size=60))
        told = draw(st.lists(st.integers(1, 9), min_size=1, max_size=60))
        rows.append(Rendered((*shared, *asked, *told), (False,) * len([*shared, *asked]) + (True,) * len(told)))
    return rows


@given(_batches())
def test_every_label_is_predicted_from_its_row(rows: list[Rendered]) -> None:
    batch = lay_out(rows)
    assert batch.tokens == computed_tokens(rows) == batch.prefix + sum(batch.lengths)
    start, seen = batch.prefix, 0
    for one, length in zip(rows, batch.lengths, strict=True):
        whole = [*batch.ids[: batch.prefix].tolist(), *batch.ids[start : start + length].tolist()]
        places = [*range(batch.prefix), *range(batch.prefix, batch.prefix + length)]
        assert batch.positions[start : start + length].tolist() == places[batch.prefix :]
        for label in range(label_count(one)):
            at = int(batch.predicts[seen + label]) - start + batch.prefix
            assert tuple(whole[: at + 1]) == one.ids[: at + 1]
            assert int(batch.labels[seen + label]) == one.ids[at + 1]
        start, seen = start + length, seen + label_count(one)
    assert seen == batch.labels.numel()


def test_plan_is_a_function_of_seed_and_epoch() -> None:
    many = [_row(length) for length in range(20, 50)]
    first = plan(many, 4, seed=1, epoch=0)
    assert first == plan(many, 4, seed=1, epoch=0)
    assert first != plan(many, 4, seed=1, epoch=1)
    assert first != plan(many, 4, seed=2, epoch=0)
    assert sorted(place for batch in first for place in batch) == list(range(30))


def test_many_lengths_give_few_shapes() -> None:
    made = [_row(length) for length in range(20, 200)]
    batches = [lay_out(made[start : start + 16]) for start in range(len(made) - 16)]
    assert len({max(batch.lengths) for batch in batches}) <= 24
    assert len({batch.tokens for batch in batches}) <= 26
    bare = [sum(len(row.ids) - 1 for row in made[start : start + 16]) for start in range(len(made) - 16)]
    assert sum(batch.tokens for batch in batches) < 1.06 * sum(bare)


def _row(length: int) -> Rendered:
    ids = tuple((length * 7 + place * 3) % 50 + 1 for place in range(length))
    return Rendered(ids, (False,) * (length // 2) + (True,) * (length - length // 2))
