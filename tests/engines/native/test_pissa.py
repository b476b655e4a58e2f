"""PiSSA: its start, its steps and the saved adapter, compared with PEFT's."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import Linear
from transformers import AutoModelForCausalLM

from tests.tiny import row, write_model
from tests.trained import base_of, gradients, lora_model, reference_loss, saved
from tunesmith.core.errors import UsageError
from tunesmith.engines.batch import Batch, lay_out
from tunesmith.engines.native.adapters.adapter import adapted_linear, read_adapter
from tunesmith.engines.native.adapters.lora import LoraModel
from tunesmith.engines.native.adapters.pissa import principal_factors
from tunesmith.engines.native.network.attention import shared_prefix_attention
from tunesmith.engines.native.network.network import Network, forward, logits
from tunesmith.engines.native.network.weights import load_network
from tunesmith.engines.settings import TARGETS
from tunesmith.models.rendering import Rendered, Renderer
from tunesmith.models.weight_files import read_adapter_file
from tunesmith.training.settings import TrainSettings

ROWS = [row(f"turn on light {n}", f'{{"intent":"on","slots":{{"light":{n}}}}}' + " and so on" * n) for n in range(3)]


@pytest.fixture(params=["llama", "qwen2"])
def folder(tmp_path: Path, request: pytest.FixtureRequest) -> Path:
    return write_model(tmp_path / "model", request.param)


@pytest.fixture
def rows(folder: Path) -> list[Rendered]:
    renderer = Renderer(folder)
    return [renderer.conversation(messages) for messages in ROWS]


@given(out=st.integers(1, 24), into=st.integers(1, 24), rank=st.integers(1, 8), seed=st.integers(0, 9))
def test_start_is_the_best_approximation_of_its_rank(out: int, into: int, rank: int, seed: int) -> None:
    weight = torch.randn(out, into, generator=torch.Generator().manual_seed(seed))
    if rank > min(out, into):
        with pytest.raises(UsageError, match=f"rank {rank} exceeds"):
            principal_factors(weight, rank, 2.0)
        return
    a, c = principal_factors(weight, rank, 2.0)
    values = torch.linalg.svdvals(weight.double())
    left = torch.linalg.matrix_norm(weight.double() - 2.0 * c.double().t() @ a.double())
    assert float(left) == pytest.approx(float(values[rank:].square().sum().sqrt()), abs=1e-4)
    assert all(torch.equal(one, other) for one, other in zip((a, c), principal_factors(weight, rank, 2.0), strict=True))
    torch.testing.assert_close(a.norm(dim=1), c.norm(dim=1), rtol=1e-4, atol=1e-5)


def test_zero_weight_starts_at_zero() -> None:
    a, c = principal_factors(torch.zeros(4, 6), 2, 1.0)
    assert torch.equal(c.t() @ a, torch.zeros(4, 6))


@pytest.mark.parametrize("settings", [{}, {"dora": True}, {"scaling": "root", "targets": ("q_proj", "down_proj")}])
def test_start_equals_the_base_exactly(folder: Path, rows: list[Rendered], settings: dict) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        network = load_network(folder, dtype)
        lora = lora_model(network, TrainSettings(rank=4, start="pissa", **settings))
        plain = lora_model(network, TrainSettings(rank=4, **settings))
        batch = lay_out(rows)
        with torch.no_grad():
            assert torch.equal(_hidden(network, lora, batch), _hidden(network, plain, batch))
        assert lora.trained_numbers == plain.trained_numbers


def _hidden(network: Network, lora: LoraModel, batch: Batch) -> torch.Tensor:
    return forward(network, batch.ids, lora.linear(), shared_prefix_attention(batch, network))


@pytest.mark.parametrize("root", [False, True])
def test_learns_and_saves_as_peft_does(tmp_path: Path, folder: Path, rows: list[Rendered], root: bool) -> None:
    network, base = load_network(folder, torch.float32), base_of(folder)
    lora = lora_model(
        network, TrainSettings(rank=4, alpha=6.0, start="pissa", scaling="root" if root else "rank"), base
    )
    config = LoraConfig(
        r=4,
        lora_alpha=6,
        target_modules=list(TARGETS),
        use_rslora=root,
        init_lora_weights="pissa",
        task_type="CAUSAL_LM",
    )
    reference = get_peft_model(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32), config)
    reference.peft_config["default"].init_lora_weights = True  # as PEFT asks: else the start is made again at loading
    reference.save_pretrained(str(tmp_path / "start"))
    reference.peft_config["default"].init_lora_weights = "pissa"
    trained = [p for p in reference.parameters() if p.requires_grad]
    ours, theirs = torch.optim.SGD(lora.masters, lr=0.5), torch.optim.SGD(trained, lr=0.5)
    for _ in range(4):
        expected = reference_loss(reference, rows)
        expected.backward()
        assert gradients(lora, [lay_out(rows)]) == pytest.approx(float(expected.detach()), rel=1e-4)
        norms = [
            torch.linalg.vector_norm(torch.cat([x.flatten() for x in each]))
            for each in ([m.grad for m in lora.masters], [p.grad for p in trained])
        ]
        assert float(norms[0]) == pytest.approx(float(norms[1]), rel=1e-3)
        ours.step()
        lora.parameters_changed()
        theirs.step()
        ours.zero_grad()
        theirs.zero_grad()
    reference.save_pretrained(str(tmp_path / "end"), path_initial_model_for_weight_conversion=str(tmp_path / "start"))
    released = saved(lora, tmp_path / "ours")
    facts = read_adapter_file(released, base=base.digest, fingerprint=base.fingerprint)
    assert (facts.config.rank, facts.parameters) == (8, 2 * lora.trained_numbers)
    mine, converted = _changes(folder, released), _changes(folder, tmp_path / "end")
    assert mine.keys() == converted.keys()
    assert len(mine) == 21
    for name, change in mine.items():
        assert change.abs().max() > 1e-3, "something was learned"
        assert (change - converted[name]).norm() < 2e-3 * change.norm(), name


@pytest.mark.parametrize("settings", [{}, {"dora": True}, {"scaling": "root", "layers": 1, "targets": ("k_proj",)}])
def test_peft_and_engine_load_it_onto_the_base(
    tmp_path: Path, folder: Path, rows: list[Rendered], settings: dict
) -> None:
    network, base = load_network(folder, torch.float32), base_of(folder)
    lora = lora_model(network, TrainSettings(rank=4, start="pissa", **settings), base)
    with torch.no_grad():
        for master in lora.masters[:2]:
            noise = torch.randn(master.shape, generator=torch.Generator().manual_seed(1))
            master.add_(0.2 * noise)
    lora.parameters_changed()
    path = saved(lora, tmp_path / "adapter")
    batch = lay_out(rows[:1])
    with torch.no_grad():
        hidden = _hidden(network, lora, batch)
        plain = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        without = plain(batch.ids[None]).logits[0]
        expected = PeftModel.from_pretrained(plain, str(path))(batch.ids[None]).logits[0]
        again = adapted_linear(network, read_adapter(path, network, base))
        served = forward(network, batch.ids, again, shared_prefix_attention(batch, network))
    torch.testing.assert_close(logits(network, hidden), expected, rtol=1e-4, atol=2e-4)
    torch.testing.assert_close(served, hidden, rtol=1e-4, atol=2e-4)
    assert (expected - without).abs().max() > 0.02


def test_small_change_survives_bf16(folder: Path, rows: list[Rendered]) -> None:
    """bf16 copies of A and A0 that are subtracted would lose a change of a thousandth."""
    losses = {}
    for dtype in (torch.float32, torch.bfloat16):
        network = load_network(folder, dtype)
        lora = lora_model(network, TrainSettings(rank=4, start="pissa"))
        with torch.no_grad():
            for master in lora.masters[:2]:
                master.mul_(1 + 1e-3)
        lora.parameters_changed()
        change = {place: factors.c.float().t() @ factors.a.float() for place, (factors, _, _) in lora.copies().items()}
        losses[dtype] = change
    for place, exact in losses[torch.float32].items():
        assert exact.norm() > 0
        assert (losses[torch.bfloat16][place] - exact).norm() < 0.02 * exact.norm()


def _changes(folder: Path, adapter: Path) -> dict[str, torch.Tensor]:
    """What PEFT adds to each weight of the base for an adapter."""
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32), str(adapter))
    return {
        name: module.get_delta_weight("default") for name, module in model.named_modules() if isinstance(module, Linear)
    }
