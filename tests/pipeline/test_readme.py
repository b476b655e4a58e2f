"""The project files that the README shows are project files."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml

from tests.pipeline.scene import settings
from tunesmith.project import parse_settings

README = Path(__file__).parents[2] / "README.md"


def test_the_settings_that_the_readme_shows_are_read() -> None:
    blocks = re.findall(r"```yaml\n(.*?)```", README.read_text(), flags=re.DOTALL)
    assert len(blocks) >= 2
    for block in blocks:
        shown: dict[str, Any] = yaml.safe_load(block)
        known: dict[str, Any] = {**settings(), "gates": {}}
        known["task"]["scorers"].append({"name": "intent", "label": "intent"})  # which the gates name
        known["candidates"] = {**known["candidates"], "zero-shot": {"prompt": "prompt.txt"}}  # which the gates name
        if "data" in shown:  # a part of it, to be added to one's own
            shown["data"] = {**known["data"], **shown["data"]}
        text = yaml.safe_dump({**known, **shown})
        assert parse_settings(text.encode(), "README.md").candidates
