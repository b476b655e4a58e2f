"""A base in 4 bits under an adapter, compared with PEFT and BitsAndBytesConfig; what it cannot be combined with."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from peft.tuners.lora import Linear4bit
from pydantic import ValidationError
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from tests.hf_models import write_hf_model
from tests.tiny import ROWS, SIZES, WIDE, write_model
from tests.trained import reference_loss
from tunesmith.core.errors import Refused, UsageError
from tunesmith.engines.batch import lay_out
from tunesmith.engines.hf.loaded import LoadedHFModel
from tunesmith.engines.hf.trainable import HFTrainable
from tunesmith.engines.settings import WeightSettings
from tunesmith.models.base import Base, resolve_base
from tunesmith.models.rendering import Renderer
from tunesmith.models.weight_files import read_adapter_file
from tunesmith.store.store import Store
from tunesmith.training.objectives import CrossEntropy

FOUR = WeightSettings(rank=4, quantize="4bit")
# Rows of whole blocks: bitsandbytes restores others wrongly on a CPU.


def _base(tmp_path: Path, family: str, sizes: dict[str, Any] | None = None) -> Base:
    folder = write_model(tmp_path / "model", family, sizes=sizes or WIDE)
    return resolve_base(Store(tmp_path / "store"), str(folder), tmp_path)


def _trainable(base: Base, settings: WeightSettings = FOUR) -> HFTrainable:
    return LoadedHFModel(base).trainable(settings, seed=0, state_bytes=16)


def test_losses_gradients_and_steps_equal_peft(tmp_path: Path) -> None:
    base = _base(tmp_path, "qwen2")
    ours, folder = _trainable(base), tmp_path / "start"
    folder.mkdir()
    ours.save(folder)
    how = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.float32,
    )
    packed = AutoModelForCausalLM.from_pretrained(
        base.folder, dtype=torch.float32, quantization_config=how, device_map={"": "cpu"}
    )
    reference = PeftModel.from_pretrained(packed, str(folder), is_trainable=True).train()
    assert sum(isinstance(module, Linear4bit) for module in reference.modules()) == 21, "PEFT's are in 4 bits too"
    rows = [Renderer(base.folder).conversation(messages) for messages in ROWS]
    batch = lay_out(rows, share=False)
    tensors = [tensor for group in ours.parameter_groups() for tensor in group.tensors]
    others = [parameter for parameter in reference.parameters() if parameter.requires_grad]
    one, two = (torch.optim.AdamW(each, lr=0.02, weight_decay=0.0) for each in (tensors, others))
    seen = []
    for _ in range(4):
        expected = reference_loss(reference, rows)
        expected.backward()
        loss = ours.loss(batch, CrossEntropy(), float(batch.labels.numel()))
        loss.backward()
        ours.collect_gradients()
        seen.append(float(loss.detach()))
        assert seen[-1] == pytest.approx(float(expected.detach()), rel=1e-4)
        norms = [
            torch.linalg.vector_norm(torch.cat([tensor.grad.flatten() for tensor in each]))
            for each in (tensors, others)
        ]
        assert float(norms[0]) == pytest.approx(float(norms[1]), rel=1e-3)
        for optimizer in (one, two):
            optimizer.step()
            optimizer.zero_grad()
    assert seen[-1] < seen[0]
    plain = _trainable(base, WeightSettings(rank=4))
    before = plain.loss(batch, CrossEntropy(), float(batch.labels.numel()))
    assert abs(float(before.detach()) - seen[0]) > 1e-3, "4 bits make a difference"
    ours.save(folder)
    assert read_adapter_file(folder, base=base.digest, fingerprint=base.fingerprint).config.rank == 4
    assert set(ours.environment()) == {"peft", "device", "precision", "attention", "batches", "quantized"}
    assert ours.environment()["quantized"].startswith("nf4, blocks of 64, double quantisation, bitsandbytes ")


def test_layers_that_the_library_computes_wrongly_are_refused(tmp_path: Path) -> None:
    with pytest.raises(Refused, match=r"q_proj has 32 inputs, and bitsandbytes .* multiples of 64"):
        _trainable(_base(tmp_path, "llama", SIZES))
    folder = write_hf_model(tmp_path / "other", "gpt2")
    base = resolve_base(Store(tmp_path / "store"), str(folder), tmp_path)
    with pytest.raises(Refused, match="has 32 inputs"):
        _trainable(base)


def test_methods_that_need_the_weights_are_refused() -> None:
    for other in ({"method": "full"}, {"start": "pissa"}, {"dora": True}):
        with pytest.raises(ValidationError, match=r"quantize: 4bit cannot be combined with .*leave one of the two out"):
            WeightSettings.model_validate({"quantize": "4bit", **other})


def test_a_missing_library_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = importlib.util.find_spec
    monkeypatch.setattr(
        "tunesmith.engines.hf.support.find_spec", lambda name: None if name == "bitsandbytes" else real(name)
    )
    with pytest.raises(UsageError, match="needs bitsandbytes, which is not installed") as error:
        _trainable(_base(tmp_path, "llama"))
    assert "tunesmith[qlora]" in str(error.value.fix)


@pytest.mark.slow
def test_importing_the_libraries_downloads_no_code(tmp_path: Path) -> None:
    """bitsandbytes, which PEFT imports, asks the package `kernels` for code from a hub, on processors with bf16."""
    (tmp_path / "kernels.py").write_text("def get_kernel(*_, **__):\n    print('fetched')\n    raise RuntimeError\n")
    code = (
        "import sys, tunesmith.engines.factory, tunesmith.engines.hf.loaded; "
        "print({'peft', 'bitsandbytes'} & sys.modules.keys()); "
        "from tunesmith.engines.hf import libraries; libraries.peft(); libraries.bitsandbytes(); "
        "import kernels; print(kernels.__name__)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), *sys.path])},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stderr == ""
    assert done.stdout == "set()\nkernels\n", "reading settings and opening an engine import no PEFT"
