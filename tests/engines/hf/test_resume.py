"""Trainings on the hf engine that are stopped and resumed, and the same training on both engines."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.hf_models import write_hf_model
from tests.tiny import WIDE, write_model
from tests.training.test_resume import SETTINGS, run
from tunesmith.core.errors import Refused
from tunesmith.engines.hf import four_bits
from tunesmith.training.checkpoints import Checkpoints

pytestmark = pytest.mark.slow

CHANGES: list[dict[str, Any]] = [{"start": "pissa", "dora": True, "b_rate": 4.0}, {"quantize": "4bit"}]


def _write(folder: Path, changes: dict[str, Any]) -> None:
    if "quantize" in changes:
        write_model(folder / "model", sizes=WIDE)
    else:
        write_hf_model(folder / "model", "gpt2")


def _stopping(step: int, save: Callable[..., None]) -> Callable[..., None]:
    def saving(self: Checkpoints, number: int, *rest: Any) -> None:
        save(self, number, *rest)
        if number >= step:
            raise KeyboardInterrupt

    return saving


@pytest.mark.parametrize("changes", CHANGES, ids=str)
def test_resumed_it_ends_in_the_same_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any]
) -> None:
    settings = SETTINGS.model_copy(update=changes)
    for name in ("whole", "stopped"):
        _write(tmp_path / name, changes)
    whole = run(tmp_path / "whole", settings)
    with monkeypatch.context() as patch:
        patch.setattr(Checkpoints, "save", _stopping(20, Checkpoints.save))
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path / "stopped", settings)
    assert run(tmp_path / "stopped", settings) == whole


def test_it_is_not_resumed_with_other_bits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _write(tmp_path, {"quantize": "4bit"})
    four = SETTINGS.model_copy(update={"quantize": "4bit"})
    run(tmp_path, four)
    with pytest.raises(Refused, match="settings"):
        run(tmp_path, SETTINGS)
    monkeypatch.setattr(four_bits, "version", lambda _: "0.49.1")
    with pytest.raises(Refused, match="quantized"):
        run(tmp_path, four)
