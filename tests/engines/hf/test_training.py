"""LoRA under training in transformers' modules, compared with PEFT and a plain torch loop, on tiny random models."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM
from transformers.pytorch_utils import Conv1D

from tests.hf_models import base_of_family, change_adapter, write_hf_model
from tests.tiny import ROWS
from tests.trained import gradients, reference_loss
from tunesmith.core.errors import Refused, UsageError
from tunesmith.engines.batch import Batch, label_count, lay_out
from tunesmith.engines.hf.loaded import LoadedHFModel
from tunesmith.engines.hf.model import HFModel
from tunesmith.engines.hf.trainable import HFTrainable
from tunesmith.engines.protocol import Question
from tunesmith.engines.settings import WeightSettings
from tunesmith.models.base import Base, resolve_base
from tunesmith.models.rendering import LossOn, Rendered, Renderer
from tunesmith.models.weight_files import read_adapter_file
from tunesmith.store.store import Store
from tunesmith.training.objectives import CrossEntropy
from tunesmith.training.settings import TrainSettings
from tunesmith.training.steps import make_optimizer, update

FAMILIES = ("gpt2", "gpt_neox", "opt", "falcon", "phi3", "stablelm", "olmo2", "granite", "cohere")
NATIVE_TOO = ("llama", "gemma3")  # families that this engine trains on several ranks and in 4 bits
EXPERTS = ("mixtral", "qwen3_moe")
ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")


def _trainable(base: Base, seed: int = 0, **settings: Any) -> HFTrainable:
    weights = WeightSettings.model_validate({"rank": 4, **settings})
    return LoadedHFModel(base).trainable(weights, seed=seed, state_bytes=16)


def _rows(base: Base, loss_on: LossOn = "assistant") -> list[Rendered]:
    renderer = Renderer(base.folder)
    return [renderer.conversation(messages, loss_on) for messages in ROWS]


def _optimizer(trainable: HFTrainable) -> torch.optim.Optimizer:
    tensors = [tensor for group in trainable.parameter_groups() for tensor in group.tensors]
    return torch.optim.AdamW(tensors, lr=0.01, weight_decay=0.0)


def _save(trainable: HFTrainable, folder: Path) -> Path:
    folder.mkdir()
    trainable.save(folder)
    return folder


def _model(base: Base) -> torch.nn.Module:
    model: torch.nn.Module = AutoModelForCausalLM.from_pretrained(base.folder, dtype=torch.float32)
    return model


def _logits(model: torch.nn.Module, rows: list[Rendered]) -> torch.Tensor:
    """Logits at the places of rows that predict a label, rows computed one at a time."""
    found = []
    with torch.no_grad():
        for one in rows:
            scores = model(torch.tensor([one.ids])).logits[0]
            found.append(scores[[place - 1 for place, marked in enumerate(one.trained) if marked]])
    return torch.cat(found)


@torch.no_grad()
def _own_logits(trainable: HFTrainable, batch: Batch) -> torch.Tensor:
    with trainable._model.using(trainable.adapter):
        return trainable._model._padded_outputs(batch)


@pytest.mark.parametrize("family", FAMILIES + NATIVE_TOO + EXPERTS)
def test_loss_gradients_and_steps_equal_peft(tmp_path: Path, family: str) -> None:
    base = base_of_family(tmp_path, family)
    rows, ours = _rows(base), _trainable(base, targets=ATTENTION if family in EXPERTS else ("all",))
    start = _save(ours, tmp_path / "start")
    names = json.loads((start / "adapter_config.json").read_text())["target_modules"]
    plain = _model(base)
    head = plain.get_output_embeddings()  # type: ignore[operator]
    linear = {n for n, m in plain.named_modules() if isinstance(m, torch.nn.Linear | Conv1D) and m is not head}
    if family in EXPERTS:
        linear = {name for name in linear if name.endswith(ATTENTION)}
    assert set(names) == {name.rsplit(".", 1)[-1] for name in linear}
    config = LoraConfig(r=4, lora_alpha=8, target_modules=names, task_type="CAUSAL_LM", fan_in_fan_out=family == "gpt2")
    reference = get_peft_model(plain, config)
    found = reference.load_adapter(str(start), "default")
    assert not found.unexpected_keys
    assert not [key for key in found.missing_keys if "lora" in key]
    for parameter_name, parameter in reference.named_parameters():
        parameter.requires_grad_("lora_" in parameter_name)
    reference.eval()  # gradients, without dropout
    theirs = {n.replace(".default", ""): p for n, p in reference.named_parameters() if p.requires_grad}
    assert len(theirs) == 2 * len(linear)
    assert ours.trained_numbers == sum(parameter.numel() for parameter in theirs.values())
    batches = [lay_out(rows[:2], share=False), lay_out(rows[2:], share=False)]
    one, two = _optimizer(ours), torch.optim.AdamW(list(theirs.values()), lr=0.01, weight_decay=0.0)
    pairs = [
        (tensor, theirs[f"base_model.model.{name.replace('.' + ours.adapter, '')}"])
        for name, tensor in ours.parameters.items()
    ]
    for _ in range(2):
        expected = reference_loss(reference, rows)
        expected.backward()
        each = torch.cat([ours.label_losses(batch) for batch in batches])
        assert not each.requires_grad
        assert float(each.mean()) == pytest.approx(float(expected.detach()), rel=1e-5)
        assert gradients(ours, batches) == pytest.approx(float(expected.detach()), rel=1e-5)
        for tensor, parameter in pairs:
            torch.testing.assert_close(tensor.grad, parameter.grad, rtol=1e-3, atol=1e-6)
        for optimizer in (one, two):
            optimizer.step()
            optimizer.zero_grad()
        ours.parameters_changed()
        # Adam divides by the gradient's size: where a gradient is nearly zero, rounding decides its sign.
        off = sum(int(((tensor - parameter).abs() > 1e-4).sum()) for tensor, parameter in pairs)
        assert off <= 0.01 * ours.trained_numbers
        with torch.no_grad():  # so that the next gradients are those of the same weights
            for tensor, parameter in pairs:
                parameter.copy_(tensor)
    change_adapter(ours)
    end = _save(ours, tmp_path / "end")
    assert set(load_file(end / "adapter_model.safetensors")) == set(theirs)
    _gives_peft_the_same_logits(base, ours, end, rows)


def _gives_peft_the_same_logits(base: Base, trained: HFTrainable, folder: Path, rows: list[Rendered]) -> None:
    """PEFT on the unchanged base, and an engine that loads the adapter's files, compute what the training does."""
    batch, before = lay_out(rows, share=False), _logits(_model(base).eval(), rows)
    ours = _own_logits(trained, batch)
    assert (before - ours).abs().max() > 0.05, "the adapter changes something"
    model = PeftModel.from_pretrained(_model(base), str(folder)).eval()
    torch.testing.assert_close(_logits(model, rows), ours, rtol=1e-3, atol=1e-3)
    engine = HFModel(base)
    with engine.using(engine.load_adapter(folder)), torch.no_grad():
        torch.testing.assert_close(engine._padded_outputs(batch), ours, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(
    ("family", "settings"),
    [
        ("gpt2", {"dora": True}),
        ("gpt_neox", {"start": "pissa", "scaling": "root", "alpha": 3.0}),
        ("opt", {"layers": 1}),
        ("phi3", {"start": "pissa", "dora": True, "layers": 1}),
        ("gpt2", {"start": "pissa"}),
    ],
)
def test_what_is_trained_is_what_peft_reads(tmp_path: Path, family: str, settings: dict[str, Any]) -> None:
    """DoRA, PiSSA and the last layers: the released adapter gives the unchanged base the logits of the training."""
    base = base_of_family(tmp_path, family)
    rows, trainable = _rows(base), _trainable(base, **settings)
    batch = lay_out(rows, share=False)
    before = _logits(_model(base).eval(), rows)
    torch.testing.assert_close(_own_logits(trainable, batch), before, rtol=1e-3, atol=1e-3)
    optimizer, losses = _optimizer(trainable), []
    for _ in range(6):
        losses.append(gradients(trainable, [batch]))
        optimizer.step()
        optimizer.zero_grad()
    assert losses[-1] < losses[0]
    folder = _save(trainable, tmp_path / "adapter")
    _gives_peft_the_same_logits(base, trainable, folder, rows)
    file = read_adapter_file(folder, base=base.digest, fingerprint=base.fingerprint)
    assert file.config.rank == (8 if settings.get("start") == "pissa" else 4)
    assert file.config.layers == ((1,) if "layers" in settings else None)


@pytest.mark.slow
def test_the_loss_curve_is_that_of_trl(tmp_path: Path) -> None:
    """On the same token ids and labels, from the same adapter, with rows of uneven lengths one at a time."""
    from datasets import Dataset
    from transformers import AutoTokenizer
    from trl.trainer.sft_config import SFTConfig
    from trl.trainer.sft_trainer import SFTTrainer

    base, rate = base_of_family(tmp_path, "llama"), 0.01
    ours = _trainable(base)
    start, rows = _save(ours, tmp_path / "start"), _rows(base)
    assert len({label_count(each) for each in rows}) > 1
    theirs = PeftModel.from_pretrained(_model(base), str(start), is_trainable=True)
    optimizer, losses = make_optimizer(ours, TrainSettings(learning_rate=rate)), []
    for _ in range(8):
        losses.append(gradients(ours, [lay_out(rows, share=False)]))
        update(ours, optimizer, rate, 1.0)
    config = SFTConfig(
        output_dir=str(tmp_path / "trl"),
        per_device_train_batch_size=1,
        gradient_accumulation_steps=len(rows),
        max_length=None,
        num_train_epochs=1,
        learning_rate=rate,
        lr_scheduler_type="constant",
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        completion_only_loss=True,
        train_sampling_strategy="sequential",
        disable_tqdm=True,
        bf16=False,
        use_cpu=True,
        gradient_checkpointing=False,
        dataloader_pin_memory=False,
    )
    told = [{"input_ids": list(one.ids), "completion_mask": [int(mark) for mark in one.trained]} for one in rows] * 8
    tokenizer = AutoTokenizer.from_pretrained(base.folder)
    trainer = SFTTrainer(model=theirs, args=config, train_dataset=Dataset.from_list(told), processing_class=tokenizer)
    trainer.train()
    found = [line["loss"] for line in trainer.state.log_history if "loss" in line]
    assert found == pytest.approx(losses, rel=1e-3)
    assert losses[-1] < 0.9 * losses[0]


def test_b_has_its_own_rate(tmp_path: Path) -> None:
    groups = _trainable(base_of_family(tmp_path, "gpt2"), b_rate=16.0, dora=True).parameter_groups()
    assert [group.rate_multiple for group in groups] == [1.0, 16.0, 1.0]
    assert [len(group.tensors) for group in groups] == [8, 8, 8]


@pytest.mark.parametrize("loss_on", ["last", "all"])
def test_the_labels_are_those_of_the_setting(tmp_path: Path, loss_on: LossOn) -> None:
    base = base_of_family(tmp_path, "gpt2")
    rows, trainable = _rows(base, loss_on), _trainable(base)
    expected = float(reference_loss(_model(base).eval(), rows).detach())
    for batch in (lay_out(rows), lay_out(rows, share=False)):
        assert gradients(trainable, [batch]) == pytest.approx(expected, rel=1e-5)


def test_targets_and_seed(tmp_path: Path) -> None:
    base = base_of_family(tmp_path, "gpt2")
    loaded = LoadedHFModel(base)

    def made(seed: int, *targets: str) -> dict[str, torch.Tensor]:
        trainable = loaded.trainable(WeightSettings(rank=2, targets=targets), seed=seed, state_bytes=16)
        return {name.replace(f".{trainable.adapter}", ""): t for name, t in trainable.parameters.items()}

    first, again, other = made(3, "c_attn"), made(3, "c_attn"), made(4, "c_attn")
    assert {name.split(".lora_")[0] for name in first} == {f"transformer.h.{number}.attn.c_attn" for number in range(2)}
    assert all(torch.equal(tensor, again[name]) for name, tensor in first.items())
    assert not all(torch.equal(tensor, other[name]) for name, tensor in first.items())
    with pytest.raises(UsageError, match="no linear layer called 'q_proj'"):
        made(3, "q_proj")


def test_an_adapter_leaves_the_model_with_its_training(tmp_path: Path) -> None:
    loaded = LoadedHFModel(base_of_family(tmp_path, "gpt2"))
    kept = [name for name, _ in loaded._model.module.named_parameters()]
    trainable = loaded.trainable(WeightSettings(rank=2), seed=0, state_bytes=16)
    assert [name for name, _ in loaded._model.module.named_parameters() if "lora_" in name]
    del trainable
    assert [n.replace(".base_layer", "") for n, _ in loaded._model.module.named_parameters()] == kept
    question = [Question(ROWS[0][:-1], ("on", "off"))]
    before = loaded.engine().choose(question)
    again = loaded.trainable(WeightSettings(rank=2), seed=0, state_bytes=16)
    change_adapter(again)
    assert loaded.engine().choose(question) == before, "the engine does not see the adapter under training"


@pytest.mark.parametrize("family", EXPERTS)
def test_all_is_refused_where_experts_are_fused(tmp_path: Path, family: str) -> None:
    """An adapter beside them would learn, and nobody would know that the experts did not."""
    base = base_of_family(tmp_path, family)
    with pytest.raises(Refused, match=r"experts whose weights are fused \(model\.layers\.1\.mlp\.experts\)|layers\.0"):
        _trainable(base)
    with pytest.raises(UsageError, match="no linear layer called 'experts'"):
        _trainable(base, targets=("experts",))


def test_high_pissa_ranks_are_refused(tmp_path: Path) -> None:
    base = base_of_family(tmp_path, "gpt2")
    with pytest.raises(UsageError, match="a weight has only 32"):
        _trainable(base, rank=33, start="pissa")


def test_layers_that_the_model_does_not_call_are_refused(tmp_path: Path) -> None:
    base = base_of_family(tmp_path, "mamba")
    with pytest.raises(Refused, match=r"does not run .*dt_proj as a layer"):
        _trainable(base)
    folder = _save(_trainable(base, targets=("in_proj", "x_proj")), tmp_path / "adapter")
    assert PeftModel.from_pretrained(_model(base), str(folder))


def test_a_row_as_long_as_the_context_is_trained_on(tmp_path: Path) -> None:
    """The batch's filler reaches beyond the positions that the model has."""
    base = base_of_family(tmp_path, "gpt2")
    ids = tuple(3 + place % 7 for place in range(256))
    long = Rendered(ids, (False, *(True,) * 255))
    trainable, batch = _trainable(base), lay_out([long, _rows(base)[0]], share=False)
    assert torch.isfinite(trainable.loss(batch, CrossEntropy(), 1.0))
    assert trainable.memory_estimate(batch) > 2 * 256 * 4 * trainable._model.vocabulary
    assert trainable.flops(batch) > 0 < trainable.peak_flops(batch)


def _refused(tmp_path: Path, reason: str) -> None:
    base = resolve_base(Store(tmp_path / "store"), str(tmp_path / "m"), tmp_path)
    with pytest.raises(Refused, match=reason):
        HFModel(base)


def test_what_cannot_be_run_safely_is_refused(tmp_path: Path) -> None:
    write_hf_model(tmp_path / "m", "bert")
    _refused(tmp_path, "see later ones")
    folder = write_hf_model(tmp_path / "m", "gpt2")
    config = json.loads((folder / "config.json").read_text())

    def change(**changes: object) -> None:
        (folder / "config.json").write_text(json.dumps({**config, **changes}))

    change(model_type="of_my_own", auto_map={"AutoConfig": "code.C", "AutoModelForCausalLM": "code.M"})
    (folder / "code.py").write_text("raise SystemExit('ran')")
    _refused(tmp_path, "without code from its folder")
    change(quantization_config={"quant_method": "bitsandbytes"})
    _refused(tmp_path, "quantised")
    change(n_positions=0)
    _refused(tmp_path, "context length")
    change(n_layer=3)
    _refused(tmp_path, "missing keys")
    change(n_layer=1)
    _refused(tmp_path, "unexpected keys")


def test_an_adapter_in_the_bases_folder_is_not_applied(tmp_path: Path) -> None:
    base = base_of_family(tmp_path, "gpt2")
    trainable, batch = _trainable(base), lay_out(_rows(base), share=False)
    before = _own_logits(trainable, batch)
    change_adapter(trainable)
    trainable.save(base.folder)
    with torch.no_grad():
        assert torch.equal(HFModel(base)._padded_outputs(batch), before)
