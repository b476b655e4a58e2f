"""The command that trains on a Ray cluster, while it waits. The cluster itself: tests/pipeline/test_together.py."""

from __future__ import annotations

import json
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest

from tests.said import Said
from tunesmith.core.errors import Refused
from tunesmith.core.progress import Silent
from tunesmith.training.launchers.on_ray import _fit, _Written


def test_it_shows_what_rank_0_says_and_returns_what_it_returns(tmp_path: Path) -> None:
    def fit() -> SimpleNamespace:
        said = _Written(tmp_path / "progress.txt")
        said.say("step 1")
        said.say("step 2")
        return SimpleNamespace(return_value="sha256:1")

    heard = Said()
    assert _fit(SimpleNamespace(fit=fit), tmp_path, heard) == "sha256:1"
    assert heard.lines == ["step 1", "step 2"]


def test_an_error_of_rank_0_ends_the_wait(tmp_path: Path) -> None:
    """The other ranks would wait for rank 0, and Ray for them."""
    never = threading.Event()

    def fit() -> None:
        error = Refused("the loss is not a number", where="step 3", fix="lower the rate")
        (tmp_path / "failed.json").write_text(json.dumps(error.as_json()["error"]))
        never.wait()

    with pytest.raises(Refused, match="not a number") as raised:
        _fit(SimpleNamespace(fit=fit), tmp_path, Silent())
    assert (raised.value.where, raised.value.fix) == ("step 3", "lower the rate")
    never.set()
