"""Native trainings: accumulation, best weights, early stopping, how rows are laid out, and the arithmetic."""

import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load, load_file
from transformers import get_scheduler

from tests.said import Said
from tests.tiny import TILED, row, write_model
from tests.trained import fit, full_model, gradients, lora_model, saved, set_low_rank, validation_loss
from tunesmith.core.errors import Refused
from tunesmith.core.system import machine as memory
from tunesmith.engines.batch import Batch, computed_tokens, label_count, lay_out
from tunesmith.engines.native.adapters import lora as lora_module
from tunesmith.engines.native.adapters.full import FullModel
from tunesmith.engines.native.network.weights import load_network
from tunesmith.models.rendering import Rendered, Renderer
from tunesmith.training.batches.batch_plan import lay_out_steps, lay_out_validation, plan
from tunesmith.training.estimates.estimate import trial_step
from tunesmith.training.objectives import CrossEntropy
from tunesmith.training.schedule import Schedule, TrainerState
from tunesmith.training.settings import TrainSettings

ROWS = [row(f"turn on light {n}", f'{{"intent":"on","slots":{{"light":{n}}}}}' + " and so on" * n) for n in range(6)]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_model(tmp_path / "model")


@pytest.fixture
def rows(folder: Path) -> list[Rendered]:
    renderer = Renderer(folder)
    return [renderer.conversation(messages) for messages in ROWS]


def test_accumulated_gradients_equal_the_whole_steps(folder: Path, rows: list[Rendered]) -> None:
    network = load_network(folder, torch.float32)
    whole, parts = lay_out_steps([rows], 100_000), lay_out_steps([rows], 120)
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
    for parts in (lay_out_steps([rows], tokens), lay_out_validation(rows, TrainSettings(batch=60, tokens=tokens))):
        labels = [label for part in parts for label in part.labels.tolist()]
        assert sorted(labels) == sorted(100 + place for n in lengths for place in range(n))
        for part in parts:
            assert part.tokens <= tokens or len(part.lengths) == 1


def test_trial_step_changes_nothing(folder: Path, rows: list[Rendered]) -> None:
    network = load_network(folder, torch.float32)
    lora = lora_model(network, TrainSettings(rank=4))
    before = [master.clone() for master in lora.masters]
    trial_step(lora, CrossEntropy())(lay_out_steps([rows], 120))
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
    assert warned[0].startswith(f"overfitting at step {course.overfitting[0].step}: ")
    last = course.overfitting[-1]
    assert last.lowest_loss == min(each["loss"] for each in course.validation) < last.loss
    window = [point["loss"] for point in course.curve if last.step - 3 < point["step"] <= last.step]
    assert last.training_loss == pytest.approx(sum(window) / 3)
    assert last.training_loss < last.lowest_training_loss
    assert _kept(tmp_path / "w") == {"parameter", "exp_avg", "exp_avg_sq", "best"}


def _kept(work: Path) -> set[str]:
    """What the checkpoints hold of each tensor."""
    (written,) = {frozenset(load(file.read_bytes())) for file in work.glob("step-*/tensors.safetensors")}
    return {name.partition(".")[2] for name in written}


def test_last_weights(tmp_path: Path, folder: Path, rows: list[Rendered]) -> None:
    course, loss, _ = _over_trained(folder, rows, tmp_path / "last", keep="last", checkpoint_seconds=1e-9)
    assert loss == pytest.approx(course.validation[-1]["loss"], rel=1e-6)
    assert _kept(tmp_path / "last") == {"parameter", "exp_avg", "exp_avg_sq"}
    again, same, _ = _over_trained(folder, rows, tmp_path / "last", keep="last", checkpoint_seconds=1e-9)
    assert (again.step, same) == (course.step, pytest.approx(loss, rel=1e-6)), "nothing more is trained"


def test_rise_with_the_training_loss_is_not_overfitting() -> None:
    def course(training: list[float], validation: list[float]) -> TrainerState:
        curve = [{"step": n + 1.0, "loss": loss} for n, loss in enumerate(training)]
        return TrainerState(len(training), 1.0, curve, [{"step": n + 1.0, "loss": x} for n, x in enumerate(validation)])

    assert [each.step for each in course([3.0, 2.0, 1.0], [2.0, 1.5, 1.7]).overfitting] == [3]
    assert not course([3.0, 2.0, 4.0], [2.0, 1.5, 1.7]).overfitting
    assert not course([3.0, 2.0, 1.0], [2.0, 1.5, 1.5]).overfitting
    assert not course([], []).overfitting


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
    assert max(batch.lengths) % 4 == 0, "so that many lengths give few shapes"
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
    many = [Rendered(tuple(range(length)), (False, *(True,) * (length - 1))) for length in range(20, 50)]
    first = plan(many, 4, seed=1, epoch=0)
    assert first == plan(many, 4, seed=1, epoch=0)
    assert first != plan(many, 4, seed=1, epoch=1)
    assert first != plan(many, 4, seed=2, epoch=0)
    assert sorted(place for batch in first for place in batch) == list(range(30))


# The arithmetic, against transformers and torch alone


def _setting(tmp_path: Path, family: str) -> tuple[Path, list[Rendered]]:
    folder = write_model(tmp_path / family, family)
    renderer = Renderer(folder)
    return folder, [renderer.conversation(messages) for messages in ROWS]


@pytest.mark.parametrize("family", ["qwen2", "qwen3"])
def test_bf16_gradients_are_as_exact_as_portable_ones(
    tmp_path: Path, family: str, portable: Callable[[], None]
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
    portable()
    portable_loss, others = gradient(torch.bfloat16)
    assert compiled_loss == pytest.approx(loss, rel=2e-2)
    assert portable_loss == pytest.approx(loss, rel=2e-2)
    for exact, one, other in zip(wide, compiled, others, strict=True):
        size = float(exact.norm())
        off, allowed = float((one - exact).norm()) / size, float((other - exact).norm()) / size
        assert off < max(0.02, 1.5 * allowed), (off, allowed)
        assert off < 0.1


@pytest.mark.parametrize(("family", "compiled"), [("llama", True), ("llama", False), ("gemma2", True)])
def test_recomputed_activations_equal_kept_ones(
    tmp_path: Path, family: str, compiled: bool, portable: Callable[[], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """To the bit, and it is not kept beside: a layer's norms and its gated middle, once each."""
    if not compiled:
        portable()
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
    assert [Schedule(steps, settings).rate(step) for step in range(steps)] == pytest.approx(wanted, abs=1e-12)


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
        optimizer.param_groups[0]["lr"] = Schedule(len(plan), settings).rate(place)
        optimizer.step()
        optimizer.zero_grad()
        theirs.parameters_changed()
    assert (max(norms) > clip) == (clip < 1)
    for one, other in zip(ours.masters, theirs.masters, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


# Full fine-tuning


def _full(folder: Path, **changes: object) -> FullModel:
    settings = TrainSettings(method="full", **changes)  # type: ignore[arg-type]
    return full_model(load_network(folder, torch.float32), settings, folder)


def _weights(trained: FullModel, work: Path) -> dict[str, torch.Tensor]:
    return load_file(saved(trained, work / "saved") / "model.safetensors")


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
