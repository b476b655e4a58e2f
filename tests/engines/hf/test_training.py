"""LoRA in transformers' own modules against PEFT, number by number, on tiny random models of other families."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM
from transformers.pytorch_utils import Conv1D

from tests.hf_models import write_hf_model
from tests.tiny import row
from tests.trained import batch_loss, gradients, saved
from tunesmith.core.errors import Refused
from tunesmith.engines.batch import label_count, lay_out
from tunesmith.engines.hf.lora import HFLora
from tunesmith.engines.hf.model import HFModel
from tunesmith.models.base import Base, resolve_base
from tunesmith.models.rendering import LossOn, Rendered, Renderer
from tunesmith.store.store import Store
from tunesmith.training.batch_plan import lay_out_step
from tunesmith.training.settings import TrainSettings

FAMILIES = ("gpt2", "gpt_neox", "opt", "falcon", "phi3", "stablelm", "olmo2", "granite", "cohere")
ROWS = [
    row("turn on the kitchen light", '{"intent":"on"}'),
    row("turn off", '{"intent":"off","slots":{"area":"hall"}}'),
    row("is the door locked?", '{"intent":"state"}'),
]


def _base(tmp_path: Path, family: str) -> Base:
    return resolve_base(Store(tmp_path / "store"), str(write_hf_model(tmp_path / family, family)), tmp_path)


def _rows(base: Base, loss_on: LossOn = "assistant") -> list[Rendered]:
    renderer = Renderer(base.folder)
    return [renderer.conversation(messages, loss_on) for messages in ROWS]


def _reference_loss(model: torch.nn.Module, rows: list[Rendered]) -> torch.Tensor:
    """Summed over rows one at a time, mean over all labels: no padding."""
    total = torch.zeros(())
    for one in rows:
        ids = torch.tensor(one.ids)
        labels = torch.where(torch.tensor(one.trained), ids, -100)
        scores = model(ids[None]).logits[0]
        total = total + torch.nn.functional.cross_entropy(scores[:-1], labels[1:], ignore_index=-100, reduction="sum")
    return total / sum(label_count(one) for one in rows)


def _lora(network: HFModel, base: Base, settings: TrainSettings) -> HFLora:
    return HFLora(network, base, settings, settings.seed)


def _model(base: Base) -> torch.nn.Module:
    model: torch.nn.Module = AutoModelForCausalLM.from_pretrained(base.folder, dtype=torch.float32)
    return model


@pytest.mark.parametrize("family", FAMILIES)
def test_loss_gradients_and_steps_equal_peft(tmp_path: Path, family: str) -> None:
    base = _base(tmp_path, family)
    rows = _rows(base)
    lora = _lora(HFModel(base), base, TrainSettings(rank=4))
    start = saved(lora, tmp_path / "start")
    names = json.loads((start / "adapter_config.json").read_text())["target_modules"]
    plain = _model(base)
    head = plain.get_output_embeddings()  # type: ignore[operator]
    linear = {n for n, m in plain.named_modules() if isinstance(m, torch.nn.Linear | Conv1D) and m is not head}
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
    step = lay_out_step(rows, 60, share=False)
    assert len(step) > 1, "computed in parts"
    one = torch.optim.AdamW(lora.masters, lr=0.01, weight_decay=0.0)
    two = torch.optim.AdamW(list(theirs.values()), lr=0.01, weight_decay=0.0)
    for _ in range(3):
        expected = _reference_loss(reference, rows)
        expected.backward()
        assert gradients(lora, step) == pytest.approx(float(expected.detach()), rel=1e-5)
        ours = _gradients_by_name(lora)
        for name, parameter in theirs.items():
            assert parameter.grad is not None
            torch.testing.assert_close(ours[name], parameter.grad, rtol=1e-3, atol=1e-6, msg=name)
        one.step()
        two.step()
        one.zero_grad()
        two.zero_grad()
    end = load_file(saved(lora, tmp_path / "end") / "adapter_model.safetensors")
    assert set(end) == set(theirs)
    # Adam divides by the gradient's size: where a gradient is all but zero, rounding decides its sign.
    off = sum(int(((end[name] - parameter).abs() > 1e-4).sum()) for name, parameter in theirs.items())
    assert off <= 0.01 * sum(value.numel() for value in end.values())


def _gradients_by_name(lora: HFLora) -> dict[str, torch.Tensor]:
    found = {}
    for half, master in zip("AB", lora.masters, strict=True):
        shapes = {name: getattr(part, half.lower()).shape for name, part in lora.parts.items()}
        assert master.grad is not None
        parts = master.grad.split([shape.numel() for shape in shapes.values()])
        for (name, shape), part in zip(shapes.items(), parts, strict=True):
            found[f"base_model.model.{name}.lora_{half}.weight"] = part.view(shape)
    return found


@pytest.mark.parametrize("family", FAMILIES)
def test_the_adapter_gives_peft_the_same_logits(tmp_path: Path, family: str) -> None:
    base = _base(tmp_path, family)
    network, rows = HFModel(base), _rows(base)
    lora = _lora(network, base, TrainSettings(rank=4, scaling="root"))
    with torch.no_grad():
        lora.masters[1].normal_(std=0.05, generator=torch.Generator().manual_seed(1))
    folder = saved(lora, tmp_path / "adapter")
    model = PeftModel.from_pretrained(_model(base), str(folder)).eval()
    batch = lay_out(rows, share=False)
    with torch.no_grad():
        ours, apart = network.scores(batch), []
        for one in rows:
            scores = model(torch.tensor([one.ids])).logits[0]
            apart.append(scores[[place - 1 for place, marked in enumerate(one.trained) if marked]])
        torch.testing.assert_close(ours, torch.cat(apart), rtol=1e-4, atol=1e-4)
        network.parts = {}
        assert (network.scores(batch) - ours).abs().max() > 0.05, "the adapter changes something"
        network.parts = network.read_adapter(folder, base)
        assert torch.equal(network.scores(batch), ours)


@pytest.mark.parametrize("loss_on", ["assistant", "last", "all"])
def test_the_labels_are_those_of_the_setting(tmp_path: Path, loss_on: LossOn) -> None:
    base = _base(tmp_path, "gpt2")
    rows = _rows(base, loss_on)
    lora = _lora(HFModel(base), base, TrainSettings(rank=2))
    for batch in (lay_out(rows), lay_out(rows, share=False)):
        ours = float(batch_loss(lora, batch, float(batch.labels.numel())).detach())
        with torch.no_grad():
            assert ours == pytest.approx(float(_reference_loss(_model(base).eval(), rows)), rel=1e-5)


def test_named_layers_alone_are_adapted_and_the_seed_decides_the_start(tmp_path: Path) -> None:
    base = _base(tmp_path, "gpt2")
    network = HFModel(base)
    lora = _lora(network, base, TrainSettings(rank=2, targets=("c_attn",), seed=3))
    assert set(lora.parts) == {f"transformer.h.{number}.attn.c_attn" for number in range(2)}
    again = _lora(network, base, TrainSettings(rank=2, targets=("c_attn",), seed=3))
    other = _lora(network, base, TrainSettings(rank=2, targets=("c_attn",), seed=4))
    one, two, three = (
        (saved(each, tmp_path / name) / "adapter_model.safetensors").read_bytes()
        for name, each in (("one", lora), ("two", again), ("three", other))
    )
    assert one == two != three
    with pytest.raises(Refused, match="no linear layer that is called 'q_proj'"):
        _lora(network, base, TrainSettings(targets=("q_proj",)))


@pytest.mark.parametrize("asked", [{"method": "full"}, {"dora": True}, {"start": "pissa"}, {"layers": 1}])
def test_what_is_not_written_for_it_is_refused(tmp_path: Path, asked: dict[str, object]) -> None:
    base = _base(tmp_path, "gpt2")
    network = HFModel(base)
    with pytest.raises(Refused, match=f"{next(iter(asked))}.* is written for the families of our own network"):
        _lora(network, base, TrainSettings.model_validate(asked))


def test_layers_whose_weight_is_taken_past_them_are_refused(tmp_path: Path) -> None:
    base = _base(tmp_path, "mamba")
    with pytest.raises(Refused, match=r"does not run .*dt_proj as a layer"):
        _lora(HFModel(base), base, TrainSettings(rank=2))
    lora = _lora(HFModel(base), base, TrainSettings(rank=2, targets=("in_proj", "x_proj")))
    folder = saved(lora, tmp_path / "adapter")
    assert PeftModel.from_pretrained(_model(base), str(folder))


def test_a_row_as_long_as_the_context_is_trained_on(tmp_path: Path) -> None:
    """The batch's filler reaches beyond the positions that the model has."""
    base = _base(tmp_path, "gpt2")
    ids = tuple(3 + place % 7 for place in range(256))
    long = Rendered(ids, (False, *(True,) * 255))
    batch = lay_out([long, _rows(base)[0]], share=False)
    lora = _lora(HFModel(base), base, TrainSettings(rank=2))
    assert torch.isfinite(batch_loss(lora, batch, 1.0))


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
    _refused(tmp_path, "how long a text")
    change(n_layer=3)
    _refused(tmp_path, "missing keys")
    change(n_layer=1)
    _refused(tmp_path, "unexpected keys")


def test_an_adapter_that_lies_beside_the_base_is_not_applied(tmp_path: Path) -> None:
    base = _base(tmp_path, "gpt2")
    batch = lay_out(_rows(base), share=False)
    network = HFModel(base)
    before = network.scores(batch)
    lora = _lora(network, base, TrainSettings(rank=2))
    with torch.no_grad():
        lora.masters[1].fill_(0.1)
    lora.save(base.folder)
    assert torch.equal(HFModel(base).scores(batch), before)
