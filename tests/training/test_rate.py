"""The range test: what its curve means, that it ends and says the same twice, and that it leaves no trace."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.commands import call, printed
from tests.tiny import row, write_model
from tests.tiny_project import write_project
from tests.trained import full_model, lora_model
from tunesmith.core.errors import TunesmithError, UsageError
from tunesmith.core.progress import SILENT
from tunesmith.engines.native.network.weights import load_network
from tunesmith.models.rendering import Renderer
from tunesmith.training.batches.batch_plan import lay_out_step
from tunesmith.training.objectives import CrossEntropy
from tunesmith.training.search import range_test as rate
from tunesmith.training.settings import TrainSettings

TRAIN = {"rank": 2, "batch": 8}


def _candidates(train: dict[str, Any]) -> dict[str, Any]:
    return {"tuned": {"prompt": "prompt.txt", "train": train, "max_tokens": 8}}


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = write_project(tmp_path_factory.mktemp("rate") / "p", candidates=_candidates(TRAIN))
    printed(folder, "data", "build")
    return folder


def _files(folder: Path) -> dict[str, bytes]:
    found = (path for path in folder.rglob("*") if path.is_file() and path.name != "tunesmith.db-wal")
    return {str(path.relative_to(folder)): path.read_bytes() for path in found}


def test_range_test_is_repeatable_and_keeps_nothing(project: Path) -> None:
    before = _files(project / ".tunesmith" / "records") | _files(project / ".tunesmith" / "blobs")
    one, other = (printed(project, "train", "tuned", "--find-rate", "--json") for _ in range(2))
    assert one == other
    assert before == _files(project / ".tunesmith" / "records") | _files(project / ".tunesmith" / "blobs")
    assert not list((project / ".tunesmith" / "work").glob("train-*"))
    found = json.loads(one)
    rates, losses, smoothed = found["rates"], found["losses"], found["smoothed"]
    assert len(rates) == len(losses) == len(smoothed) <= rate.STEPS
    assert rates == sorted(rates)
    assert rates[0] <= found["suggestion"] <= rates[-1] < 1.0
    assert smoothed[0] - min(smoothed) > 0.1, "some rate made the loss fall"
    # Where the suggestion was passed, the loss was still falling to its lowest, a decade later.
    passed = next(step for step, each in enumerate(rates) if each >= found["suggestion"])
    assert min(smoothed[passed:]) == min(smoothed)
    assert rates[smoothed.index(min(smoothed))] == pytest.approx(10 * found["suggestion"])


def test_suggested_rate_learns_more_than_the_extremes(project: Path) -> None:
    found = call(project, "train", "--find-rate")
    losses = {}
    for each in (found["rates"][0], found["suggestion"], found["rates"][-1]):
        write_project(project, candidates=_candidates({**TRAIN, "epochs": 3, "learning_rate": each, "keep": "last"}))
        losses[each] = call(project, "train")["final_loss"]
    write_project(project, candidates=_candidates(TRAIN))
    assert min(losses, key=lambda each: losses[each]) == found["suggestion"]


def test_output_has_a_curve_and_the_setting_to_write(project: Path) -> None:
    shown = printed(project, "train", "--find-rate")
    assert "train.b_rate: 4   (as it was tried: write down both)" in shown
    assert "smoothed loss by learning rate" in shown
    assert sum(line.count("*") for line in shown.splitlines() if "|" in line) <= rate.STEPS
    assert "train.learning_rate: " in shown
    assert rate.RULE in shown


def test_range_test_needs_a_training_and_no_restart(tmp_path: Path, project: Path) -> None:
    with pytest.raises(UsageError, match="nothing that could be restarted"):
        printed(project, "train", "--find-rate", "--restart")
    with pytest.raises(UsageError, match="candidate 'plain' has no training"):
        printed(write_project(tmp_path / "p"), "train", "plain", "--find-rate")


@pytest.mark.parametrize("method", ["lora", "full"])
def test_range_test_ends_where_the_loss_diverges(tmp_path: Path, method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write_model(tmp_path / "model")
    renderer, network = Renderer(folder), load_network(folder)
    settings = TrainSettings(method=method)
    model = full_model(network, settings, folder) if method == "full" else lora_model(network, settings)
    step = lay_out_step([renderer.conversation(row(f"turn on light {n}", f'{{"light":{n}}}')) for n in range(4)], 4096)
    monkeypatch.setattr(rate, "_LOWEST", 1e-3)
    monkeypatch.setattr(rate, "_HIGHEST", 1e3)
    monkeypatch.setattr(rate, "_DIVERGED", 1.05)  # a random model's loss has little room to fall
    found = rate.range_test(model, CrossEntropy(), [step] * 100, settings, SILENT)
    assert len(found.losses) < rate.STEPS
    assert found.smoothed[-1] > 1.05 * min(found.smoothed)
    assert all(each <= 1.05 * min(found.smoothed[: n + 1]) for n, each in enumerate(found.smoothed[:-1]))
    given = iter([3.0, 2.0, math.nan])
    monkeypatch.setattr(rate, "gradients", lambda *_: next(given))
    monkeypatch.setattr(rate, "update", lambda *_: 1.0)
    assert rate.range_test(model, CrossEntropy(), [step] * 100, settings, SILENT).losses == [3.0, 2.0]
    monkeypatch.setattr(rate, "gradients", lambda *_: math.inf)
    with pytest.raises(TunesmithError, match="not finite before the first update"):
        rate.range_test(model, CrossEntropy(), [step] * 100, settings, SILENT)


@given(st.lists(st.floats(0.1, 10), min_size=1, max_size=rate.STEPS))
def test_smoothed_losses_and_suggestion_stay_in_range(losses: list[float]) -> None:
    smoothed = rate.smooth(losses)
    assert smoothed[0] == pytest.approx(losses[0])
    for count, each in enumerate(smoothed, 1):
        assert min(losses[:count]) * 0.999999 <= each <= max(losses[:count]) * 1.000001
    tried = rate.rates()[: len(losses)]
    suggestion = rate.suggest(tried, smoothed)
    assert suggestion is None or tried[0] <= suggestion < tried[-1]
    assert (suggestion is None) == (tried[smoothed.index(min(smoothed))] < 10 * tried[0])
