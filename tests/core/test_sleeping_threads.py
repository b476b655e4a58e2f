"""OpenMP threads that wait for work sleep early, in every process that the command line starts."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest

MINE = ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")


def run(*words: str, **more: str) -> subprocess.CompletedProcess[str]:
    """A process whose environment names none of MINE, but more."""
    environment = {key: value for key, value in os.environ.items() if key not in MINE}
    environment |= {"PYTHONPATH": os.pathsep.join(sys.path), **more}
    return subprocess.run([sys.executable, *words], env=environment, capture_output=True, text=True, check=False)


@pytest.mark.skipif(platform.system() != "Linux", reason="only libgomp reads GOMP_SPINCOUNT")
def test_a_command_has_set_it_before_torch_is_loaded(tmp_path: Path) -> None:
    """libgomp itself says what it has read, when it is loaded."""
    told = run("-m", "tunesmith", "doctor", "-C", str(tmp_path), OMP_DISPLAY_ENV="verbose").stderr
    found = [line.strip() for line in told.splitlines() if "GOMP_SPINCOUNT" in line]
    assert found
    assert all(line.endswith("GOMP_SPINCOUNT = '1000'") for line in found)


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({}, "1000 None"),
        ({"GOMP_SPINCOUNT": "7"}, "7 None"),
        ({"OMP_WAIT_POLICY": "active"}, "None active"),
    ],
)
def test_what_the_user_has_set_stays(given: dict[str, str], expected: str) -> None:
    shown = "import os, sys, tunesmith; assert 'torch' not in sys.modules; print(*map(os.environ.get, sys.argv[1:]))"
    assert run("-c", shown, *MINE, **given).stdout.strip() == expected
