"""Settings of a training: their checks and messages."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from tunesmith.cli.main import main
from tunesmith.core.errors import UsageError
from tunesmith.engines.settings import TARGETS
from tunesmith.models.families import match_layers
from tunesmith.training.estimates.estimate import too_few_numbers
from tunesmith.training.settings import TrainSettings, changed_training, recorded_settings

PROJECT = """
name: lights
base: model
data: {{sources: [{{path: rows.jsonl, licence: CC0-1.0}}]}}
candidates:
  tuned: {{train: {train}}}
"""


@pytest.mark.parametrize(
    ("train", "said"),
    [
        ("{rank: 0}", "greater than or equal to 1"),
        ("{learning_rate: .nan}", "finite"),
        ("{learning_rate: 3}", "less than 1"),
        ("{clip: .inf}", "finite"),
        ("{rnak: 8}", "did you mean 'rank'?"),
        ("{loss_on: everything}", "'assistant', 'last' or 'all'"),
    ],
)
def test_impossible_setting_is_named_before_any_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], train: str, said: str
) -> None:
    (tmp_path / "tunesmith.yaml").write_text(PROJECT.format(train=train))
    monkeypatch.setattr(sys, "argv", ["tunesmith", "train", "--json", "-C", str(tmp_path)])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 2
    out, err = capsys.readouterr()
    error = json.loads(out)["error"]
    assert said in error["what"]
    assert ("tunesmith.yaml, line 6" if said == "finite" else "candidates.tuned.train") in error["where"]
    assert "Traceback" not in err
    assert not (tmp_path / ".tunesmith").exists()


def test_epochs_replace_a_budget_with_all_that_came_with_it() -> None:
    within, stated = TrainSettings(budget=900, batch=8), TrainSettings(budget=900, schedule="wsd", patience=2)
    assert (within.epochs, within.schedule, within.validations, within.patience) == (20, "wsd", 16, 4)
    assert changed_training(within, {"epochs": 2}, "here") == TrainSettings(epochs=2, batch=8)
    assert changed_training(stated, {"epochs": 2}, "here") == TrainSettings(epochs=2, schedule="wsd", patience=2)
    assert changed_training(within, {"batch": 4}, "here") == TrainSettings(budget=900, batch=4)


def test_a_budget_replaces_epochs() -> None:
    read = TrainSettings(epochs=3, batch=8)
    assert changed_training(read, {"budget": "10m"}, "here") == TrainSettings(budget=600, batch=8)
    with pytest.raises(UsageError, match="set either budget or epochs"):
        changed_training(read, {"budget": "10m", "epochs": 2}, "here")


@given(rank=st.integers(1, 1024), each=st.integers(1, 10_000), labels=st.integers(1, 10**9))
def test_named_rank_is_the_lowest_sufficient(rank: int, each: int, labels: int) -> None:
    said = too_few_numbers(rank, rank * each, labels)
    assert (said is None) == (rank * each >= labels)
    if said is not None:
        enough = int(said.rsplit("rank ", 1)[1].split()[0])
        assert (enough - 1) * each < labels <= enough * each


@pytest.mark.parametrize(
    ("wanted", "found"),
    [
        (("all",), set(TARGETS)),
        (("q_proj", "down_proj"), {"q_proj", "down_proj"}),
        (("[qv]_proj", "*_proj", "gate*"), set(TARGETS)),
        (("[qv]_proj", "gate*"), {"q_proj", "v_proj", "gate_proj"}),
    ],
)
def test_layers_match_patterns(wanted: tuple[str, ...], found: set[str]) -> None:
    assert match_layers(wanted, TARGETS, "here") == found


@pytest.mark.parametrize("wrong", ["*_up", "Q_PROJ", ""])
def test_unknown_layer_is_refused(wrong: str) -> None:
    with pytest.raises(UsageError, match=r"called '.*'; it has .*q_proj, .*, or write all") as refused:
        match_layers(["q_proj", wrong], TARGETS, "here")
    assert repr(wrong) in refused.value.what
    assert refused.value.where == "here"


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"budget": "20x"}, "write a duration such as 20m"),
        ({"budget": "0s"}, "greater than 0"),
        ({"budget": "-5m"}, "write a duration such as 20m"),
        ({"budget": math.nan}, "finite number|greater than 0"),
        ({"budget": True}, "not true or false"),
        ({"budget": "999999h"}, "less than or equal to"),
        ({"budget": "5m", "decay": 0.99999}, "less than or equal to 0.9"),
        ({"budget": "5m", "epochs": 2}, "set either budget or epochs"),
        ({"budget": "5m", "schedule": "cosine"}, "a budget needs schedule: wsd"),
        ({"rehearse": True}, "rehearse"),
        ({"method": "full", "b_rate": 1}, "b_rate applies to adapters only"),
    ],
)
def test_settings_that_do_not_fit_are_named(given: dict[str, Any], said: str) -> None:
    with pytest.raises(ValidationError, match=said) as refused:
        TrainSettings(**given)
    assert refused.value.error_count() == 1


def test_what_is_read_and_what_follows() -> None:
    for text, seconds in (("90s", 90), ("20m", 1200), ("1h30m", 5400), ("1.5h", 5400), (7, 7)):
        settings = TrainSettings(budget=text)  # type: ignore[arg-type]
        assert settings.budget == seconds
        assert TrainSettings(**settings.model_dump()) == settings
    earlier = {"budget": 300, "epochs": 40, "rank": 8}  # a budget's most epochs were 40
    assert recorded_settings(earlier) == TrainSettings(budget=300, rank=8)
    full = TrainSettings(method="full")
    assert TrainSettings().learning_rate == pytest.approx(10 * full.learning_rate)
    assert TrainSettings(method="full", learning_rate=0.5).learning_rate == 0.5
    assert TrainSettings.model_validate(full.model_dump(mode="json")) == full
