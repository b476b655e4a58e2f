"""A change is killed at each of its writes that others can see. The store is then as before it or as after it, and goes
on."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.attack_table import Happened
from tests.attacks.killed_changes import kill_all
from tests.fabricate import OWNER
from tests.forked import run_elsewhere

pytestmark = pytest.mark.slow


@pytest.mark.attack("crash", "kill -9 at every write of a change")
def test_a_change_killed_at_any_write_leaves_a_whole_state(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, happened: Happened
) -> None:
    monkeypatch.setenv("TUNESMITH_USER", OWNER)
    assert run_elsewhere(kill_all, tmp_path, seconds=900) == 0
    found = json.loads((tmp_path / "killed.json").read_text())
    assert len(found) == 31
    assert sum(found.values()) >= 100, found
    happened("whole, and the next command ran", sum(found.values()))
