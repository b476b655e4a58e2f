"""OpenMP threads that wait for work sleep early, in every process that the command line starts."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest

SHOWN = "import os, sys, tunesmith; assert 'torch' not in sys.modules; print(*map(os.environ.get, sys.argv[1:]))"


@pytest.mark.skipif(platform.system() != "Linux", reason="only libgomp reads GOMP_SPINCOUNT")
def test_it_is_set_before_torch_is_loaded_unless_the_user_did(tmp_path: Path) -> None:
    mine = ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")
    environment = {key: value for key, value in os.environ.items() if key not in mine}
    environment["PYTHONPATH"] = os.pathsep.join(sys.path)
    for given, expected in (({mine[0]: "7"}, "7 None"), ({mine[1]: "active"}, "None active")):
        command, told = [sys.executable, "-c", SHOWN, *mine], environment | given
        done = subprocess.run(command, env=told, capture_output=True, text=True, check=True)
        assert done.stdout.strip() == expected
    # libgomp itself says what it has read, when it is loaded.
    command = [sys.executable, "-m", "tunesmith", "doctor", "-C", str(tmp_path)]
    told = environment | {"OMP_DISPLAY_ENV": "verbose"}
    done = subprocess.run(command, env=told, capture_output=True, text=True, check=False)
    found = [line.strip() for line in done.stderr.splitlines() if "GOMP_SPINCOUNT" in line]
    assert found
    assert all(line.endswith("GOMP_SPINCOUNT = '1000'") for line in found)
