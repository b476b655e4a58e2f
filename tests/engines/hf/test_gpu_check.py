"""`tunesmith gpu-check` in its reduced form, on a CPU: every check but the vLLM's and those of large bases runs."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from tests.engines.vllm import vllm_server
from tests.forked import forkserver
from tunesmith.cli.main import app
from tunesmith.engines.device import gpu_present, stated_peak
from tunesmith.engines.hf.model import HFModel
from tunesmith.engines.hf.trainable import HFTrainable
from tunesmith.services.runs import gpu_check as services
from tunesmith.training.gpu_check import checks, speed

STAND_IN = f"{sys.executable} {vllm_server.__file__}"


@pytest.fixture(autouse=True)
def _without_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(services, "cache_folder", lambda: tmp_path / "cache")
    if gpu_present():
        pytest.skip("about machines without a GPU")


def _run(monkeypatch: pytest.MonkeyPatch, names: str, *words: object) -> tuple[int, dict[str, Any]]:
    """The exit code and the result of the checks whose names contain one of some words."""
    every = services._checks("no-such-vllm serve")
    chosen = {name: check for name, check in every.items() if any(one in name for one in names.split())}
    monkeypatch.setattr(services, "_checks", lambda _: chosen)
    result = CliRunner().invoke(app, ["gpu-check", *map(str, words), "--json"])
    return result.exit_code, json.loads(result.stdout)


def test_on_a_cpu_it_says_that_no_gpu_was_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    code, found = _run(monkeypatch, "parity QLoRA export vLLM tiny 1B 8B", "--output", tmp_path / "found.json")
    assert (code, found["ok"], found["gpu"]) == (0, True, None)
    outcomes = {each["name"]: each["outcome"] for each in found["checks"]}
    left_out = {name for name, outcome in outcomes.items() if outcome == "left out"}
    assert left_out == {"vLLM", *(name for name in outcomes if "B, " in name)}
    assert len(outcomes) == 12
    assert {outcomes[name] for name in outcomes.keys() - left_out} == {"passed"}
    reasons = " ".join(each["detail"] for each in found["checks"] if each["outcome"] == "left out")
    assert "no GPU is here" in reasons
    assert "no-such-vllm is not there" in reasons
    answers, speed = (each["figures"] for each in found["checks"] if each["name"].startswith("tiny"))
    assert answers["same_answers"] == 1
    assert answers["static_tokens_per_second"] > 0 < answers["dynamic_tokens_per_second"]
    assert speed["tokens_per_second"] > 0 < speed["flops_per_second"]
    assert json.loads((tmp_path / "found.json").read_text()) == found
    assert not [*(tmp_path / "cache").iterdir()], "it leaves nothing"


def test_a_wrong_loss_fails_its_check_and_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    right = HFTrainable._label_losses
    monkeypatch.setattr(HFTrainable, "_label_losses", lambda *given: 1.01 * right(*given))
    code, found = _run(monkeypatch, "fp32 export")
    assert [(each["name"].split()[0], each["outcome"]) for each in found["checks"]] == [
        ("parity", "failed"),
        ("export", "passed"),
    ]
    assert "accepted are 0.001 and 0.001" in found["checks"][0]["detail"]
    assert (code, found["ok"]) == (1, False)


def test_a_loss_that_is_not_its_labels_mean_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    right = HFTrainable.loss
    monkeypatch.setattr(HFTrainable, "loss", lambda *given: 2 * right(*given))
    found = services.perform("parity", lambda work: checks.parity(work, "fp32"), tmp_path)
    assert (found.outcome, "the mean of its labels" in found.detail) == ("failed", True)


def test_an_export_that_loses_the_adapter_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    right = checks.write_merged

    def losing(base: Any, adapter: Path, target: Path, dtype: Any) -> None:
        right(base, adapter, target, dtype)
        for file in base.folder.glob("*.safetensors"):
            (target / file.name).write_bytes(file.read_bytes())

    monkeypatch.setattr(checks, "write_merged", losing)
    assert services.perform("export", checks.export, tmp_path).outcome == "failed"


def test_a_static_cache_that_changes_answers_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    right = HFModel.static_cache

    def wrong(model: HFModel, rows: int, tokens: int) -> Any:
        if (cache := right(model, rows, tokens)) is not None:
            for layer in cache.layers:
                layer.cumulative_length.add_(2)
        return cache

    monkeypatch.setattr(HFModel, "static_cache", wrong)
    found = services.perform("answers", lambda work: checks.answers(work, "tiny"), tmp_path)
    assert (found.outcome, "accepted are 0.001" in found.detail) == ("failed", True)


def test_rows_without_padding_are_compared_with_padded_ones(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    right = speed.Trainer.run
    monkeypatch.setattr(speed.Trainer, "run", lambda self: seen.append(self.model.shares_prefix) or right(self))
    monkeypatch.setattr(speed, "_STEPS", 2)
    found = speed.speed(tmp_path, "tiny", None, mixed=True)
    assert seen == [True, False]
    assert "times the speed of padded rows" in found.detail


def test_what_does_not_fit_is_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(speed.DeviceMemory, "available", lambda _: 1000)
    found = services.perform("speed", lambda work: speed.speed(work, "tiny", None), tmp_path)
    assert (found.outcome, found.detail) == ("left out", "it takes 0.0 GiB, and 0.0 are free")


@pytest.mark.slow
def test_a_killed_training_resumes_and_a_killed_check_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr("multiprocessing.get_context", lambda _: forkserver())  # has imported everything already
        found = services.perform("resume", checks.resume, tmp_path)
    assert (found.outcome, found.detail) == ("passed", "killed after 5 steps of 12: the same bytes")
    gone: Any = sys.exit  # ends the process before it has sent anything
    found = services._apart("gone", gone, tmp_path)
    assert (found.outcome, found.detail) == ("failed", "its process ended with exit code 1")


@pytest.mark.slow
def test_vllm_is_started_and_compared(tmp_path: Path) -> None:
    found = services.perform("vLLM", lambda work: checks.vllm(work, STAND_IN), tmp_path)
    assert found.outcome == "passed", found.detail
    assert found.detail.startswith("8 of 8 answers are those of hf")


def test_mfu_is_given_for_known_cards_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(speed, "computing_device", lambda: torch.device("cuda"))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "NVIDIA H100 80GB HBM3")
    assert speed._share({"flops_per_second": 0.4 * 989e12}, recompute=False) == "40% MFU, "
    again = speed._share({"flops_per_second": 0.4 * 989e12}, recompute=True)
    assert again == "40% of peak with what is computed again, "
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "Card 1")
    assert speed._share({"flops_per_second": 1.0}, recompute=False) == "no MFU (the peak of Card 1 is not known), "


def test_a_card_has_the_peak_that_its_maker_states() -> None:
    assert stated_peak("NVIDIA H100 80GB HBM3") == 989e12
    assert stated_peak("NVIDIA H100 PCIe") == 756e12
    assert stated_peak("NVIDIA A100-SXM4-80GB") == 312e12
    assert stated_peak("NVIDIA GeForce RTX 4090") == 165e12
    for unknown in ("NVIDIA GeForce RTX 4090 Laptop GPU", "NVIDIA H100 80GB HBM3 MIG 1g.10gb", "NVIDIA A10G", "L"):
        assert stated_peak(unknown) is None
