"""The tutorial's commands work, on the real base."""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path

import pytest

from tests.docs.test_pages import ROOT, executed_blocks
from tests.own_group import run_whole_group


@pytest.mark.slow
def test_commands_of_the_tutorial_work(tmp_path: Path) -> None:
    """In order, in one shell, as a reader would run them. A block of YAML becomes tunesmith.yaml."""
    blocks = executed_blocks("docs/tutorial.md")
    assert blocks
    command = tmp_path / "bin" / "tunesmith"
    command.parent.mkdir()
    command.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m tunesmith "$@"\n')
    command.chmod(0o755)
    script = ["set -eu"]
    for kind, text in blocks:
        script.append(text if kind == "bash" else f"cat > tunesmith.yaml <<'YAML'\n{text}YAML")
    shutil.copytree(ROOT / "examples" / "tickets", tmp_path / "examples" / "tickets")
    path = os.pathsep.join([str(command.parent), str(Path(sys.executable).parent), os.environ["PATH"]])
    environment = {**os.environ, "PATH": path, "PYTHONPATH": os.pathsep.join(sys.path), "TUNESMITH_THREADS": "1"}
    environment.pop("TUNESMITH_USER", None)
    done = run_whole_group(["bash", "-c", "\n".join(script)], cwd=tmp_path, env=environment, timeout=1000)
    assert done.returncode == 0, f"{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
