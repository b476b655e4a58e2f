"""What torch's fully_shard does with PEFT's adapters, over gloo on tiny random models: what the sharded trainer is
built on. Plain transformers, PEFT and torch, without the trainer."""

from __future__ import annotations

import json
import os
import shutil
import signal
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.distributed.checkpoint import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig, Phi3Config, PreTrainedConfig

from tests.process_group import run_ranks

pytestmark = pytest.mark.slow

STEPS = 6
_SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "vocab_size": 90, "pad_token_id": 1}
# Tied and untied heads, one projection for queries, keys and values, and weights that are kept transposed.
FAMILIES: dict[str, PreTrainedConfig] = {
    "llama": LlamaConfig(num_hidden_layers=3, num_key_value_heads=2, tie_word_embeddings=True, **_SIZES),
    "phi3": Phi3Config(num_hidden_layers=2, **_SIZES),
    "gpt2": GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=90, resid_pdrop=0, embd_pdrop=0, attn_pdrop=0),
}
# (length, number of labels at the end). The ranks of a step have different numbers of labels, and one has no row.
ROWS = [(12, 1), (7, 5), (9, 2), (16, 13), (5, 3)]
RANK = 3  # of the adapters: it is divided by neither two ranks nor, as a number of rows of B, by three


def _model(family: str) -> Any:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(FAMILIES[family], dtype=torch.float32)
    return get_peft_model(model, LoraConfig(r=RANK, lora_alpha=6, target_modules="all-linear", lora_dropout=0.0))


def _trained(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: each for name, each in model.named_parameters() if each.requires_grad}


def _shard(model: Any) -> None:
    """Shard the layers, then what is left, over all ranks. Gradients of the ranks are added, not averaged."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    module = model.base_model.model
    for layer in [each for each in module.modules() if type(each).__name__ in module._no_split_modules]:
        fully_shard(layer, mesh=mesh)
    fully_shard(module, mesh=mesh)
    for each in module.modules():
        if isinstance(each, FSDPModule):
            each.set_gradient_divide_factor(1.0)
            each.set_force_sum_reduction_for_comms(True)  # gloo has no other


def _loss(model: Any, rows: Sequence[int], step: int, labels: int) -> Tensor:
    """The rows' part of the mean over all labels of the step. All ranks have the same number of forward passes, or they
    would wait for each other's parameters for ever: so a rank without rows computes one token for nothing."""
    if not rows:
        return model(input_ids=torch.tensor([[0]]), use_cache=False).logits.sum() * 0.0
    ids = torch.zeros(len(rows), max(length for length, _ in ROWS), dtype=torch.long)
    wanted = torch.full_like(ids, -100)
    for place, number in enumerate(rows):
        length, learned = ROWS[number]
        row = torch.randint(0, 90, (length,), generator=torch.Generator().manual_seed(97 * step + number))
        ids[place, :length], wanted[place, length - learned : length] = row, row[length - learned :]
    scores = model(input_ids=ids, use_cache=False).logits  # padded on the right, where no token sees it
    return F.cross_entropy(scores[:, :-1].flatten(0, 1), wanted[:, 1:].flatten(), reduction="sum") / labels


def _train(model: Any, optimizer: torch.optim.AdamW, steps: range, mine: Sequence[int], kill_at: int | None) -> None:
    for step in steps:
        if step == kill_at:
            os.kill(os.getpid(), signal.SIGKILL)
        _loss(model, mine, step, sum(learned for _, learned in ROWS)).backward()
        _update(model, optimizer)


def _update(model: Any, optimizer: torch.optim.AdamW) -> None:
    trained = list(_trained(model).values())
    norm = torch.nn.utils.get_total_norm([each.grad for each in trained])
    norm = norm.full_tensor() if isinstance(norm, DTensor) else norm
    torch.nn.utils.clip_grads_with_norm_(trained, 1.0, norm)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


def _state(model: Any, optimizer: torch.optim.AdamW) -> dict[str, Tensor]:
    """What a checkpoint holds: the adapter and the moments of its gradients, and nothing of the base."""
    found: dict[str, Tensor] = {}
    for name, each in _trained(model).items():
        moments = optimizer.state[each] or {"exp_avg": torch.zeros_like(each), "exp_avg_sq": torch.zeros_like(each)}
        optimizer.state[each] = {"step": optimizer.state[each].get("step", torch.tensor(0.0)), **moments}
        found[f"{name}.parameter"] = each.detach()
        found |= {f"{name}.{key}": optimizer.state[each][key] for key in ("exp_avg", "exp_avg_sq")}
    return found


def _rank(rank: int, size: int, family: str, folder: Path, first: int, last: int, kill_at: int | None) -> None:
    """Train the steps from first to last on this rank's rows, from and to checkpoints in the folder."""
    model = _model(family)
    numbers = sum(each.numel() for each in model.parameters())
    _shard(model)
    _check_sharded(model, rank, size, numbers)
    optimizer = torch.optim.AdamW(_trained(model).values(), lr=0.01, weight_decay=0.01, fused=True)
    if first:
        state = _state(model, optimizer)
        dcp.load(state, storage_reader=HuggingFaceStorageReader(str(folder / f"step-{first}")))
        for each in optimizer.state.values():
            each["step"] = torch.tensor(float(first))
    mine = [row for row in range(len(ROWS)) if row % 2 == rank]  # the third rank has none
    _train(model, optimizer, range(first, last), mine, kill_at if rank == size - 1 else None)
    path = str(folder / f"step-{last}")
    dcp.save(_state(model, optimizer), storage_writer=HuggingFaceStorageWriter(path, save_distributed=True))
    whole = {name: each.full_tensor() for name, each in _state(model, optimizer).items()}  # type: ignore[attr-defined]
    adapter = {name: each.full_tensor() for name, each in get_peft_model_state_dict(model).items()}
    if rank == 0:
        save_file(whole, folder / f"whole-{last}.safetensors")
        save_file(adapter, folder / f"adapter-{last}.safetensors")


def _check_sharded(model: Any, rank: int, size: int, numbers: int) -> None:
    """Every parameter is a DTensor of which this rank holds its rows only, those of the base too."""
    held = 0
    for each in model.parameters():
        assert isinstance(each, DTensor)
        chunk = -(-each.shape[0] // size)
        rows = max(0, min(chunk, each.shape[0] - rank * chunk))
        assert each.to_local().shape == (rows, *each.shape[1:])
        held += each.to_local().numel()
    assert held < 1.1 * numbers / size


def _alone(family: str, last: int) -> dict[str, Tensor]:
    """The state after so many steps in one process."""
    model = _model(family)
    optimizer = torch.optim.AdamW(_trained(model).values(), lr=0.01, weight_decay=0.01, fused=True)
    _train(model, optimizer, range(last), range(len(ROWS)), None)
    return _state(model, optimizer)


def _whole(folder: Path, last: int = STEPS) -> dict[str, Tensor]:
    return load_file(folder / f"whole-{last}.safetensors")


def _furthest(one: dict[str, Tensor], other: dict[str, Tensor]) -> float:
    assert one.keys() == other.keys()
    return max(float((one[name] - other[name]).abs().max()) for name in one)


def _run(size: int, family: str, folder: Path, first: int = 0, last: int = STEPS, kill_at: int | None = None) -> None:
    codes = run_ranks(_rank, size, folder, family, folder, first, last, kill_at)
    assert (signal.SIGKILL in {-code for code in codes}) if kill_at else codes == [0] * size


@pytest.mark.parametrize(("size", "family"), [(2, "llama"), (3, "gpt2")])
def test_the_gradient_is_that_of_the_labels_of_all_ranks(tmp_path: Path, size: int, family: str) -> None:
    """With a mean of the ranks' means the adapter would be another one after the first step."""
    _run(size, family, tmp_path)
    found, alone = _whole(tmp_path), _alone(family, STEPS)
    assert _furthest(found, alone) < 1e-5
    started = _state(model := _model(family), torch.optim.AdamW(_trained(model).values()))
    assert _furthest(found, started) > 1e-2  # so that 1e-5 says something
    adapter = load_file(tmp_path / f"adapter-{STEPS}.safetensors")
    assert all("lora_" in name for name in adapter)
    assert sum(each.numel() for each in adapter.values()) == sum(each.numel() for each in _trained(model).values())


def test_killed_it_resumes_on_the_same_and_on_other_ranks(tmp_path: Path) -> None:
    """Every rank's part of the adapter and of the optimiser's state comes back, also where the parts are others."""
    _run(2, "phi3", tmp_path, last=3)
    _check_files(tmp_path / "step-3", sum(each.numel() for each in _trained(_model("phi3")).values()))
    _run(2, "phi3", tmp_path, first=3, kill_at=4)
    assert not (tmp_path / f"step-{STEPS}").exists()
    for size in (2, 3):
        shutil.rmtree(tmp_path / f"step-{STEPS}", ignore_errors=True)
        _run(size, "phi3", tmp_path, first=3)
        assert _furthest(_whole(tmp_path), _alone("phi3", STEPS)) < 1e-5


def _check_files(folder: Path, adapter: int) -> None:
    """Each rank wrote its part of the adapter and its two moments, nothing of the base, and no pickle."""
    assert not list(folder.rglob("*.metadata"))
    held = 0
    for path in (parts := sorted(folder.glob("*.safetensors"))):
        data = path.read_bytes()
        header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
        ends = [each["data_offsets"] for name, each in header.items() if name != "__metadata__"]
        held += sum(end - start for start, end in ends)
    assert (len(parts), held) == (2, 3 * 4 * adapter)
