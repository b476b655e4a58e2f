"""`tunesmith doctor --gpu`: the step that it compares, what it says, and that it is refused without a GPU."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from tunesmith.cli.main import app
from tunesmith.core.errors import Refused
from tunesmith.engines import device
from tunesmith.engines.device import gpu_present
from tunesmith.services.doctor import examine_gpu
from tunesmith.training import gpu_step
from tunesmith.training.gpu_step import Figure, compare_step


@pytest.mark.skipif(gpu_present(), reason="about machines without a GPU")
def test_without_a_gpu_it_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device, "_DRIVERS", ())
    with pytest.raises(Refused, match="torch sees no GPU") as refused:
        examine_gpu()
    assert "on a machine with a GPU" in str(refused.value.fix)
    (tmp_path / "version").write_text("NVRM version: 550\n")
    monkeypatch.setattr(device, "_DRIVERS", (tmp_path / "version",))
    with pytest.raises(Refused, match="a driver is here") as refused:
        examine_gpu()
    assert "build of PyTorch" in str(refused.value.fix)


def test_a_step_is_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    """The CPU stands for the GPU: in fp32 its figures are the same, in bf16 they are rounded."""
    monkeypatch.setattr(gpu_step, "computing_device", lambda: torch.device("cpu"))
    found = compare_step()
    assert [each.name for each in found["fp32"]] == ["loss", "gradient", "loss after it"]
    assert max(each.difference for each in found["fp32"]) == 0
    assert 0 < max(each.difference for each in found["bf16"]) <= gpu_step.ACCEPTED["bf16"]
    loss, gradient, after = (each.gpu for each in found["fp32"])
    assert gradient > 0
    assert after < loss, "the step learns"


@pytest.mark.parametrize(
    ("wrong", "code", "fix"), [(1.0009, 0, None), (1.002, 1, "another driver"), (math.nan, 1, "x")]
)
def test_it_says_what_differs_and_by_how_much(
    monkeypatch: pytest.MonkeyPatch, wrong: float, code: int, fix: str | None
) -> None:
    monkeypatch.setattr("tunesmith.engines.device.gpu_present", lambda: True)
    monkeypatch.setattr("tunesmith.engines.device.describe_gpus", lambda: ("a card", None))
    monkeypatch.setattr("tunesmith.engines.device.device_name", lambda _: "Card 1")
    monkeypatch.setattr("tunesmith.engines.device.computing_device", lambda: None)
    figures = {"fp32": [Figure("loss", 2.0 * wrong, 2.0), Figure("gradient", 1.0, 1.0)], "bf16": [Figure("loss", 2, 2)]}
    monkeypatch.setattr(gpu_step, "compare_step", lambda: figures)
    result = CliRunner().invoke(app, ["doctor", "--gpu", "--json"])
    found: dict[str, Any] = json.loads(result.stdout)
    assert (result.exit_code, found["ok"]) == (code, code == 0)
    gpu, fp32, bf16 = found["checks"]
    assert (gpu["detail"], fp32["ok"], bf16["ok"]) == ("Card 1", code == 0, True)
    assert fp32["detail"].startswith(f"loss {2.0 * wrong:.6g}, on the CPU 2; gradient 1, on the CPU 1: ")
    assert "(accepted: 0.001)" in fp32["detail"]
    assert (fp32["fix"] is None) == (fix is None)
