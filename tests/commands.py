"""Commands of the command line, called in this process."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from typer.testing import CliRunner

from tunesmith.cli.main import app


def call(folder: Path, *words: str) -> Any:
    """The JSON document of a command in a project's folder. Raises what the command raises."""
    done = CliRunner().invoke(app, [*words, "-C", str(folder), "--json"], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return json.loads(done.stdout)
