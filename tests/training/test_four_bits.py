"""A base in 4 bits: what it computes held against transformers' and PEFT's, what it is not combined with, resuming."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import Linear4bit
from pydantic import ValidationError
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from tests import tiny
from tests.chain.scene import settings as scene_settings
from tests.chain.scene import write_project
from tests.foreign import write_foreign
from tests.tiny import TILED, row, write_model
from tests.training.test_resume import ROWS, SETTINGS, run
from tunesmith.api import Project
from tunesmith.chain.verbs import train
from tunesmith.core.errors import Refused, UsageError
from tunesmith.models import four_bit
from tunesmith.models.adapter import adapted_linear, encode_adapter, read_adapter
from tunesmith.models.attention import shared_prefix_attention
from tunesmith.models.base import resolve_base
from tunesmith.models.batch import label_count, lay_out
from tunesmith.models.four_bit import FourBit
from tunesmith.models.network import forward, logits
from tunesmith.models.products import Frozen, Pair
from tunesmith.models.rendering import Renderer
from tunesmith.models.weights import load_network
from tunesmith.store.store import Store
from tunesmith.training import loop
from tunesmith.training.four_bits import check_four_bits
from tunesmith.training.loop import gradients
from tunesmith.training.lora import Lora
from tunesmith.training.settings import TARGETS, TrainSettings

FOUR = SETTINGS.model_copy(update={"quantize": "4bit"})
CONVERSATIONS = [row(f"turn on light {n}", f'{{"on":true,"light":{n}}}' + " and so on" * n) for n in range(3)]


@given(rows=st.integers(1, 40), columns=st.integers(1, 200), seed=st.integers(0, 9), wide=st.booleans())
def test_a_weight_comes_back_within_half_a_step_of_its_block(rows: int, columns: int, seed: int, wide: bool) -> None:
    weight = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))
    found = FourBit([weight if wide else weight.bfloat16()]).weight.float()
    missing = -weight.numel() % 64
    largest = torch.nn.functional.pad(weight.flatten(), (0, missing)).view(-1, 64).abs().amax(1)
    allowed = largest.repeat_interleave(64)[: weight.numel()].view(rows, columns)
    # The widest gap between NF4's values is 0.304; a scale is rounded to 8 bits, and bf16 to as many.
    assert bool(((found - weight).abs() <= 0.152 * allowed + 0.03 * allowed.max()).all())


def test_a_part_is_packed_as_it_is_alone_and_takes_a_quarter_of_bf16() -> None:
    torch.manual_seed(0)
    parts = [torch.randn(size, 576).bfloat16() for size in (576, 192, 192)]
    whole = FourBit(parts)
    assert torch.equal(whole.weight, torch.cat([FourBit([part]).weight for part in parts]))
    assert (whole.out, whole.into, whole.numel()) == (960, 576, 960 * 576)
    assert whole.nbytes < 0.27 * 2 * whole.numel()


@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_products_are_those_of_the_unpacked_weight(biased: bool, dtype: torch.dtype) -> None:
    """In bf16 too, where pairs may be laid out for tiles."""
    torch.manual_seed(0)
    bias = torch.randn(64).to(dtype) if biased else None
    packed = FourBit([torch.randn(48, 64).to(dtype), torch.randn(16, 64).to(dtype)], bias)
    x, gradient, low = (torch.randn(7, size).to(dtype) for size in (64, 64, 32))
    pair = Pair(torch.randn(32, 64).to(dtype), torch.randn(32, 64).to(dtype))
    weight, a, c = packed.weight.float(), pair.a.float(), pair.c.float()
    there = x.float() @ weight.t() + (0.0 if bias is None else bias.float())
    back = gradient.float() @ weight
    near = {"rtol": 0.02, "atol": 0.2} if dtype == torch.bfloat16 else {"rtol": 1e-5, "atol": 1e-4}
    torch.testing.assert_close(packed(x).float(), there, **near)
    torch.testing.assert_close(packed.back(gradient).float(), back, **near)
    torch.testing.assert_close(packed(x, low, pair).float(), there + low.float() @ c, **near)
    torch.testing.assert_close(packed.back(gradient, low, pair).float(), back + low.float() @ a, **near)


def test_a_step_in_bf16_lowers_the_loss_as_one_on_the_same_weights_does(tmp_path: Path) -> None:
    folder = write_model(tmp_path / "model")
    network = load_network(folder, four_bits=True)
    unpacked = [
        replace(layer, linear={group: Frozen(each.weight, each.bias) for group, each in layer.linear.items()})
        for layer in network.layers
    ]
    renderer = Renderer(folder)
    step = [lay_out([renderer.conversation(messages) for messages in CONVERSATIONS])]
    losses = []
    for each in (network, replace(network, layers=tuple(unpacked))):
        lora = Lora(each, TrainSettings(rank=4))
        optimizer = torch.optim.AdamW(lora.masters, lr=0.02, weight_decay=0.0)
        losses.append([])
        for _ in range(6):
            losses[-1].append(gradients(each, lora, step))
            optimizer.step()
            optimizer.zero_grad()
            lora.refresh_copies()
    assert losses[0] == pytest.approx(losses[1], rel=0.01)
    assert losses[0][-1] < 0.9 * losses[0][0]


@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_losses_gradients_and_steps_equal_pefts_on_the_same_4_bits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, family: str
) -> None:
    for name, size in {"hidden_size": 64, "intermediate_size": 128, "head_dim": 16}.items():
        monkeypatch.setitem(tiny.SIZES, name, size)  # rows that whole blocks fit: others bitsandbytes unpacks wrongly
    folder = write_model(tmp_path / "model", family)
    renderer = Renderer(folder)
    rows = [renderer.conversation(messages) for messages in CONVERSATIONS]
    network = load_network(folder, torch.float32, four_bits=True)
    lora = Lora(network, TrainSettings(rank=4, quantize="4bit"))
    how = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.float32,
    )
    packed = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, quantization_config=how, device_map={"": "cpu"}
    )
    config = LoraConfig(r=4, lora_alpha=8, target_modules=list(TARGETS), task_type="CAUSAL_LM")
    reference = get_peft_model(packed, config)
    assert sum(isinstance(module, Linear4bit) for module in reference.modules()) == 21, "PEFT's are in 4 bits too"
    base = resolve_base(Store(tmp_path / "store"), str(folder), tmp_path)
    start = _written(tmp_path / "start", encode_adapter(lora.adapter(), network, base))
    assert not reference.load_adapter(str(start), "default").unexpected_keys
    reference.train()
    trained = [p for p in reference.parameters() if p.requires_grad]
    ours = torch.optim.AdamW(lora.masters, lr=0.02, weight_decay=0.0)
    theirs = torch.optim.AdamW(trained, lr=0.02, weight_decay=0.0)
    seen = []
    for _ in range(4):
        expected = torch.zeros(())
        for one in rows:
            ids = torch.tensor(one.ids)
            wanted = torch.where(torch.tensor(one.trained), ids, -100)[1:]
            scores = reference(ids[None]).logits[0, :-1]
            expected = expected + torch.nn.functional.cross_entropy(scores, wanted, ignore_index=-100, reduction="sum")
        expected = expected / sum(map(label_count, rows))
        expected.backward()
        seen.append(gradients(network, lora, [lay_out(rows)]))
        assert seen[-1] == pytest.approx(float(expected.detach()), rel=1e-4)
        norms = [
            torch.linalg.vector_norm(torch.cat([x.flatten() for x in each]))
            for each in ([m.grad for m in lora.masters], [p.grad for p in trained])
        ]
        assert float(norms[0]) == pytest.approx(float(norms[1]), rel=1e-3)
        for optimizer in (ours, theirs):
            optimizer.step()
            optimizer.zero_grad()
        lora.refresh_copies()
    assert seen[-1] < seen[0]
    plain = load_network(folder, torch.float32)
    before = gradients(plain, Lora(plain, TrainSettings(rank=4)), [lay_out(rows)])
    assert abs(before - seen[0]) > 1e-3, "4 bits make a difference"


def test_what_is_trained_is_an_ordinary_adapter_of_the_base_as_it_is(tmp_path: Path) -> None:
    folder = write_model(tmp_path / "model")
    weights = run(tmp_path, FOUR)
    store = Store(tmp_path / "store")
    (digest,) = store.records_of("training")
    record = store.record(digest)
    assert record.blobs["adapter_model.safetensors"] == weights
    assert record.body["environment"]["quantized"] == four_bit.described()
    assert record.body["environment"]["quantized"].keys() == {"type", "block", "double", "bitsandbytes"}
    assert record.body["final_loss"] < record.body["curve"][0]["loss"]
    files = {name: store.read_blob(blob) for name, blob in record.blobs.items()}
    adapter = _written(tmp_path / "adapter", files)
    base = resolve_base(store, str(folder), tmp_path)
    network = load_network(folder, torch.float32)
    batch = lay_out([Renderer(folder).conversation(ROWS[0].messages)])
    plain = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        linear = adapted_linear(network, read_adapter(adapter, network, base))
        hidden = forward(network, batch.ids, linear, shared_prefix_attention(batch, network))
        expected = PeftModel.from_pretrained(plain, str(adapter))(batch.ids[None]).logits[0]
    torch.testing.assert_close(logits(network, hidden), expected, rtol=1e-4, atol=2e-4)


def test_stopped_and_carried_on_it_ends_in_the_same_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("whole", "stopped"):
        write_model(tmp_path / name / "model")
    whole = run(tmp_path / "whole", FOUR)
    assert whole != run(tmp_path / "whole", SETTINGS, restart=True), "4 bits make a difference"
    with monkeypatch.context() as patch:
        patch.setattr(loop, "save_checkpoint", _stopping_after(20, loop.save_checkpoint))
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path / "stopped", FOUR)
    assert sorted(each.name for each in (tmp_path / "stopped" / "work").glob("step-*"))[-1] == "step-00000020"
    assert run(tmp_path / "stopped", FOUR) == whole


def _stopping_after(step: int, save: Callable[..., None]) -> Callable[..., None]:
    def saving(folder: Path, number: int, *rest: Any) -> None:
        save(folder, number, *rest)
        if number >= step:
            raise KeyboardInterrupt

    return saving


@pytest.mark.parametrize("changed", ["settings", "library"])
def test_it_is_not_carried_on_in_other_bits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changed: str) -> None:
    write_model(tmp_path / "model")
    run(tmp_path, FOUR)
    if changed == "library":
        monkeypatch.setattr(four_bit, "version", lambda _: "0.49.1")
    with pytest.raises(Refused, match="begun with other"):
        run(tmp_path, FOUR if changed == "library" else SETTINGS)


@pytest.mark.parametrize("other", [{"method": "full"}, {"start": "pissa"}, {"dora": True}])
def test_what_goes_by_the_weights_themselves_is_refused(other: dict[str, Any]) -> None:
    with pytest.raises(ValidationError, match=r"quantize: 4bit cannot be combined with .*leave one of the two out"):
        TrainSettings(quantize="4bit", **other)


def test_it_joins_no_others_and_no_processes() -> None:
    assert not FOUR.joins
    assert SETTINGS.joins
    with pytest.raises(Refused, match="not shared among processes"):
        check_four_bits("llama", 2)


def test_a_missing_library_and_another_family_are_refused_before_any_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tuned = {"prompt": "prompt.txt", "train": {"rank": 2, "batch": 8, "quantize": "4bit"}, "max_tokens": 8}
    candidates = {"plain": scene_settings()["candidates"]["plain"], "tuned": tuned}  # type: ignore[index]
    write_project(tmp_path / "p", candidates=candidates)
    write_foreign(tmp_path / "q" / "model", "gpt2")
    write_project(tmp_path / "q", candidates=candidates)
    with pytest.raises(Refused, match="family gpt2 runs in transformers' own modules") as told:
        train(Project.load(tmp_path / "q"))
    assert told.value.where == "candidates.tuned.train.quantize"
    real = importlib.util.find_spec
    monkeypatch.setattr(
        "tunesmith.training.four_bits.find_spec", lambda name: None if name == "bitsandbytes" else real(name)
    )
    project = Project.load(tmp_path / "p")
    with pytest.raises(UsageError, match="needs bitsandbytes, which is not installed") as error:
        train(project)
    assert "tunesmith[qlora]" in str(error.value.fix)
    assert not project.store.records_of("dataset")
    with pytest.raises(UsageError, match="not installed"):
        run(write_model(tmp_path / "r" / "model").parent, FOUR)


def test_it_goes_through_the_chain(tmp_path: Path) -> None:
    tuned = {"prompt": "prompt.txt", "train": {"rank": 2, "batch": 8, "quantize": "4bit"}, "max_tokens": 8}
    write_project(tmp_path / "p", candidates={"plain": scene_settings()["candidates"]["plain"], "tuned": tuned})  # type: ignore[index]
    project = Project.load(tmp_path / "p")
    document = project.run()
    body = project.store.record(document["train"]["tuned"]["training"]).body
    assert body["settings"]["quantize"] == "4bit"
    assert json.loads(json.dumps(body))["environment"]["quantized"]["type"] == "nf4"
    assert document["register"]["version"] == "tiny@v1"


def test_no_code_is_fetched_as_the_library_is_imported(tmp_path: Path) -> None:
    """bitsandbytes asks the package `kernels` for code from a hub, on processors that multiply bf16."""
    (tmp_path / "kernels.py").write_text("def get_kernel(*_, **__):\n    print('fetched')\n    raise RuntimeError\n")
    told = "from tunesmith.models import four_bit; four_bit._library(); import kernels; print(kernels.__name__)"
    done = subprocess.run(
        [sys.executable, "-c", told],
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), *sys.path])},
        capture_output=True,
        text=True,
        check=True,
    )
    assert (done.stdout, done.stderr) == ("kernels\n", "")


def _written(folder: Path, files: dict[str, bytes]) -> Path:
    folder.mkdir()
    for name, data in files.items():
        (folder / name).write_bytes(data)
    return folder


@pytest.mark.parametrize("kind", ["four bits", "a width that tiles do not multiply", "tiles"])
def test_gradients_do_not_lie_where_products_read(tmp_path: Path, kind: str) -> None:
    """Of steps of one part and of two, held against fp32 on the same weights. Where a product reads the pair as it
    lies, gradients written over it would be read as factors."""
    sizes = {**TILED, "intermediate_size": 40} if kind.startswith("a width") else TILED
    folder = write_model(tmp_path / "model", sizes=sizes)
    network, exact = load_network(folder, four_bits=kind == "four bits"), load_network(folder, torch.float32)
    same = [
        {group: Frozen(each.weight.float(), None) for group, each in layer.linear.items()} for layer in network.layers
    ]
    exact = replace(
        exact, layers=tuple(replace(layer, linear=own) for layer, own in zip(exact.layers, same, strict=True))
    )
    renderer = Renderer(folder)
    parts = [lay_out([renderer.conversation(one) for one in some]) for some in (CONVERSATIONS[:2], CONVERSATIONS[1:])]
    for step in (parts[:1], parts):
        found = []
        for each in (network, exact):
            lora = Lora(each, TrainSettings(rank=4))
            with torch.no_grad():
                for master in lora.masters:
                    master.normal_(std=0.1, generator=torch.Generator().manual_seed(1))
            lora.refresh_copies()
            loss = gradients(each, lora, step)
            found.append((loss, [master.grad for master in lora.masters]))
        (loss, ours), (expected, wide) = found
        assert loss == pytest.approx(expected, rel=2e-2)
        for one, other in zip(ours, wide, strict=True):
            assert float((one - other).norm() / other.norm()) < 0.1
