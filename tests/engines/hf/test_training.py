"""LoRA under training in transformers' modules, compared with PEFT and a plain torch loop, on tiny random models."""

from __future__ import annotations

import json
import sys
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import Linear4bit
from pydantic import ValidationError
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, BitsAndBytesConfig
from transformers.pytorch_utils import Conv1D

from tests.hf_models import base_of_family, change_adapter, write_hf_model
from tests.tiny import ROWS, WIDE
from tests.trained import gradients, reference_loss
from tunesmith.core.errors import Refused, UsageError
from tunesmith.engines import factory
from tunesmith.engines.batch import Batch, lay_out
from tunesmith.engines.factory import check_weight_settings
from tunesmith.engines.hf import libraries, support
from tunesmith.engines.hf.loaded import LoadedHFModel
from tunesmith.engines.hf.loading import model_settings
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
from tunesmith.training.steps import make_optimizer, parameters, update

FAMILIES = ("gpt2", "gpt_neox", "opt", "falcon", "phi3", "stablelm", "olmo2", "granite", "cohere")
NATIVE_TOO = ("llama", "gemma3")  # families that this engine trains on several ranks and in 4 bits
EXPERTS = ("mixtral", "qwen3_moe")
FOUR_BITS = "qwen2 in 4 bits"
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


def _model(base: Base, quantize: str | None = None) -> torch.nn.Module:
    how: dict[str, Any] = {}
    if quantize is not None:
        bits = {
            "bnb_4bit_quant_type": "nf4",
            "bnb_4bit_use_double_quant": True,
            "bnb_4bit_compute_dtype": torch.float32,
        }
        how = {"quantization_config": BitsAndBytesConfig(load_in_4bit=True, **bits), "device_map": {"": "cpu"}}
    model: torch.nn.Module = AutoModelForCausalLM.from_pretrained(base.folder, dtype=torch.float32, **how)
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


@pytest.mark.parametrize("family", [*FAMILIES, *NATIVE_TOO, *EXPERTS, FOUR_BITS])
def test_loss_gradients_and_steps_equal_peft(tmp_path: Path, family: str) -> None:
    base = base_of_family(tmp_path, "qwen2", sizes=WIDE) if family == FOUR_BITS else base_of_family(tmp_path, family)
    quantize, exact = ("4bit", 3e-4) if family == FOUR_BITS else (None, 1e-5)
    targets = ATTENTION if family in EXPERTS else ("all",)
    rows, ours = _rows(base), _trainable(base, targets=targets, quantize=quantize)
    start = _save(ours, tmp_path / "start")
    names = json.loads((start / "adapter_config.json").read_text())["target_modules"]
    plain = _model(base, quantize)
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
    reference.train(family == FOUR_BITS)  # else gradients, without dropout
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
        assert float(each.mean()) == pytest.approx(float(expected.detach()), rel=exact)
        assert gradients(ours, batches) == pytest.approx(float(expected.detach()), rel=exact)
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
    if quantize is None:
        _gives_peft_the_same_logits(base, ours, end, rows)
        return
    assert sum(isinstance(module, Linear4bit) for module in reference.modules()) == 21, "PEFT's are in 4 bits too"
    own = _own_logits(_trainable(base), lay_out(rows, share=False))
    assert (own - _logits(plain, rows)).abs().max() > 1e-3, "4 bits make a difference"
    assert ours.environment()["quantized"].startswith("nf4, blocks of 64, double quantisation, bitsandbytes ")


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


@pytest.mark.parametrize("loss_on", ["last", "all"])
def test_the_labels_are_those_of_the_setting(tmp_path: Path, loss_on: LossOn) -> None:
    base = base_of_family(tmp_path, "gpt2")
    rows, trainable = _rows(base, loss_on), _trainable(base)
    expected = float(reference_loss(_model(base).eval(), rows).detach())
    for batch in (lay_out(rows), lay_out(rows, share=False)):
        assert gradients(trainable, [batch]) == pytest.approx(expected, rel=1e-5)


def test_targets_seed_and_rates(tmp_path: Path) -> None:
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
    with pytest.raises(UsageError, match="a weight has only 32"):
        _trainable(base, rank=33, start="pissa")
    groups = _trainable(base, b_rate=16.0, dora=True).parameter_groups()
    assert [(group.rate_multiple, len(group.tensors)) for group in groups] == [(1.0, 8), (16.0, 8), (1.0, 8)]
    mamba = base_of_family(tmp_path, "mamba")
    with pytest.raises(Refused, match=r"does not run .*dt_proj as a layer"):
        _trainable(mamba)
    folder = _save(_trainable(mamba, targets=("in_proj", "x_proj")), tmp_path / "adapter")
    assert PeftModel.from_pretrained(_model(mamba), str(folder))
    for family, place in (("mixtral", r"layers\.0"), ("qwen3_moe", r"\(model\.layers\.1\.mlp\.experts\)")):
        experts = base_of_family(tmp_path, family)  # an adapter beside them would learn, and the experts would not
        with pytest.raises(Refused, match=place):
            _trainable(experts)
        with pytest.raises(UsageError, match="no linear layer called 'experts'"):
            _trainable(experts, targets=("experts",))


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


# Bases in bf16 under fp32 adapters, and implementations of attention


def _losses(base: Base, trained: HFTrainable, steps: int = 6) -> list[float]:
    settings = TrainSettings(learning_rate=0.01)
    batch = lay_out(_rows(base), share=False)
    optimizer, losses = make_optimizer(trained, settings), []
    for _ in range(steps):
        losses.append(gradients(trained, [batch]))
        update(trained, optimizer, 0.01, 1.0)
    moments = [each for state in optimizer.state.values() for each in state.values()]
    assert {each.dtype for each in [*parameters(trained), *moments]} == {torch.float32}
    return losses


@pytest.mark.parametrize(("family", "changes"), [("phi3", {"dora": True}), ("gpt2", {"b_rate": 4.0})])
def test_an_fp32_adapter_on_a_bf16_base_learns_the_same_within_rounding(
    tmp_path: Path, family: str, changes: dict[str, Any]
) -> None:
    """Losses of six steps are within 1% of those in fp32, and not equal to them."""
    base = base_of_family(tmp_path, family)
    loaded = LoadedHFModel(base)
    rounded, exact = _trainable(base, precision="bf16", **changes), _trainable(base, **changes)
    frozen = [each for each in rounded._model.module.parameters() if not each.requires_grad]
    assert {each.dtype for each in frozen} == {torch.bfloat16}
    assert (rounded.environment()["precision"], exact.environment()["precision"]) == ("bf16", "fp32")
    found, expected = _losses(base, rounded), _losses(base, exact)
    assert found == pytest.approx(expected, rel=0.01)
    assert found != pytest.approx(expected, rel=1e-6)
    assert found[-1] < 0.9 * found[0]
    assert rounded._model.pads
    question = [Question(ROWS[0][:-1], ("on", "off"))]
    (plain,) = loaded.engine().choose(question)
    engine = loaded.engine()
    engine.load_adapter("tuned", _save(rounded, tmp_path / "adapter"))
    assert engine.choose(question, "tuned")[0] != plain, "answered for by the base in fp32"


@pytest.mark.parametrize("family", ["gpt2"])
def test_implementations_of_attention_agree(tmp_path: Path, family: str) -> None:
    base = base_of_family(tmp_path, family)
    made = {name: _trainable(base, attention=name) for name in ("sdpa", "eager")}
    assert {name: each.environment()["attention"] for name, each in made.items()} == {"sdpa": "sdpa", "eager": "eager"}
    losses = {name: _losses(base, each, 3) for name, each in made.items()}
    assert losses["eager"] == pytest.approx(losses["sdpa"], rel=1e-4)
    assert _trainable(base).environment()["attention"] == "sdpa"


def test_what_a_base_or_a_machine_lacks_is_refused_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(Refused, match="does not compute this base with attention: sdpa") as refused:
        _trainable(base_of_family(tmp_path, "mamba"), attention="sdpa", targets=("in_proj",))
    assert refused.value.where == "train.attention"

    def check(**settings: Any) -> None:
        check_weight_settings("phi3", WeightSettings.model_validate(settings), "candidates.a.train")

    with pytest.raises(Refused, match=r"pissa .* bf16 would round") as refused:
        check(start="pissa", precision="bf16")
    assert refused.value.where == "candidates.a.train.precision"
    monkeypatch.setattr(factory, "gpu_present", lambda: False)
    with pytest.raises(Refused, match="on a GPU and in bf16 only") as refused:
        check(attention="flash_attention_2")
    assert refused.value.where == "candidates.a.train.attention"
    monkeypatch.setattr(factory, "gpu_present", lambda: True)
    monkeypatch.setattr(support, "find_spec", lambda name: None)
    with pytest.raises(UsageError, match="flash_attention_2 needs flash_attn"):
        check(attention="flash_attention_2")
    with pytest.raises(UsageError, match="kernels: liger needs liger_kernel"):
        check(kernels="liger")


def test_liger_patches_the_families_that_it_knows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a stand-in for its package, whose kernels need a GPU."""
    patched: list[tuple[str, dict[str, bool]]] = []
    stand_in = ModuleType("liger_kernel.transformers.monkey_patch")
    stand_in.MODEL_TYPE_TO_APPLY_LIGER_FN = {"llama": None}  # type: ignore[attr-defined]
    stand_in._apply_liger_kernel_to_instance = lambda module, **how: patched.append(  # type: ignore[attr-defined]
        (module.config.model_type, how)
    )
    for name in ("liger_kernel", "liger_kernel.transformers"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    monkeypatch.setitem(sys.modules, stand_in.__name__, stand_in)
    settings = model_settings(WeightSettings(kernels="liger"))
    assert HFModel(base_of_family(tmp_path, "llama"), settings).settings.liger
    assert patched == [("llama", {"cross_entropy": False, "fused_linear_cross_entropy": False})]
    with pytest.raises(Refused, match="no kernels for the family 'gpt2'") as refused:
        HFModel(base_of_family(tmp_path, "gpt2"), settings)
    assert refused.value.where == "train.kernels"


# Bases in 4 bits


def test_four_bits_are_refused_where_they_cannot_be_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """bitsandbytes restores rows that are not whole blocks wrongly on a CPU."""
    for family in ("llama", "gpt2"):
        with pytest.raises(Refused, match=r"has 32 inputs, and bitsandbytes .* multiples of 64"):
            _trainable(base_of_family(tmp_path, family), quantize="4bit")
    for other in ({"method": "full"}, {"start": "pissa"}, {"dora": True}):
        with pytest.raises(ValidationError, match=r"quantize: 4bit cannot be combined with .*leave one of the two out"):
            WeightSettings.model_validate({"quantize": "4bit", **other})
    monkeypatch.setattr("tunesmith.engines.hf.support.find_spec", lambda name: None)
    with pytest.raises(UsageError, match="needs bitsandbytes, which is not installed") as error:
        _trainable(base_of_family(tmp_path / "wide", "llama", sizes=WIDE), quantize="4bit")
    assert "tunesmith[qlora]" in str(error.value.fix)


def test_importing_bitsandbytes_downloads_no_code(monkeypatch: pytest.MonkeyPatch) -> None:
    """It asks the package `kernels` for code from a hub, on processors with bf16; PEFT imports it."""
    monkeypatch.setitem(sys.modules, "kernels", ModuleType("kernels"))
    with libraries._without_downloads(), pytest.raises(ImportError):
        import_module("kernels")
    assert import_module("kernels") is sys.modules["kernels"]
    imported: list[str] = []
    monkeypatch.setattr(libraries, "bitsandbytes", lambda: imported.append("bitsandbytes"))
    libraries.peft.__wrapped__()
    assert imported == ["bitsandbytes"], "before PEFT does"
