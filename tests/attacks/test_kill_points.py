"""Every write of a change is killed once. The store is then as before the change or as after it, and goes on."""

from __future__ import annotations

import json
import os
import sys
from collections import Counter
from pathlib import Path

import pytest

from tests.attack_table import Happened
from tests.attacks.killed_changes import LEAST
from tests.fabricate import OWNER
from tests.own_group import run_whole_group

pytestmark = pytest.mark.slow


@pytest.mark.attack("crash", "kill -9 at every write of a change")
def test_a_change_killed_at_any_write_leaves_a_whole_state(happened: Happened) -> None:
    environment = {**os.environ, "TUNESMITH_USER": OWNER, "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-m", "tests.attacks.killed_changes"]
    root = Path(__file__).parents[2]
    done = run_whole_group(command, cwd=root, env=environment, timeout=900)
    assert done.returncode == 0, done.stderr[-3000:]
    found = {name: Counter(counts) for name, counts in json.loads(done.stdout).items()}
    assert found.keys() == LEAST.keys()
    for name, counts in found.items():
        assert counts["writes"] >= LEAST[name], name
    total = sum(found.values(), Counter[str]())
    assert total["before"] + total["half"] + total["after"] >= 220
    happened("whole, and the next command ran", total["before"] + total["half"] + total["after"])
