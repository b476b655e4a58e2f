"""What the README and the documentation show works: links, project files, commands."""

from __future__ import annotations

import os
import re
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.own_group import run_whole_group
from tests.tiny_project import settings
from tunesmith.project import parse_settings

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
PAGES = [page for page in PAGES if "generated" not in page.parts and "_build" not in page.parts]
# `<!-- tested -->` before a block: its commands are executed, or its text becomes tunesmith.yaml.
TESTED = re.compile(r"<!-- tested -->\n```(bash|yaml)\n(.*?)```", flags=re.DOTALL)


def yaml_blocks() -> list[Any]:
    return [
        pytest.param(block, id=f"{page.relative_to(ROOT)}-{number}")
        for page in PAGES
        for number, block in enumerate(re.findall(r"```yaml\n(.*?)```", page.read_text(), flags=re.DOTALL))
    ]


@pytest.mark.parametrize("block", yaml_blocks())
def test_settings_shown_are_valid(block: str) -> None:
    shown: dict[str, Any] = yaml.safe_load(block)
    known: dict[str, Any] = {**settings(), "gates": {}, "policy": {"known": {"requests": ["x"], "lacks": "y"}}}
    known["task"]["scorers"].append({"name": "intent", "label": "intent"})
    others = ("zero-shot", "few-shot", "nearest", "rag")  # rivals that gates on the pages name
    known["candidates"] = {**known["candidates"], **{name: {"prompt": "prompt.txt"} for name in others}}
    if "train" in shown:  # a candidate's training
        known["candidates"]["shown"] = {"prompt": "prompt.txt", "train": shown.pop("train")}
    if "data" in shown:  # a part of `data:`
        shown["data"] = {**known["data"], **shown["data"]}
    assert parse_settings(yaml.safe_dump({**known, **shown}), "page").candidates


def test_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text().splitlines()) <= 150


@pytest.mark.parametrize("page", [ROOT / "README.md", ROOT / "CONTRIBUTING.md"], ids=lambda page: page.name)
def test_links_to_files_exist(page: Path) -> None:
    links = [link for link in re.findall(r"\]\(([^)#\s]+)[^)]*\)", page.read_text()) if "://" not in link]
    assert links
    assert [link for link in links if not (page.parent / link).exists()] == []


@pytest.mark.slow
def test_commands_of_the_readme_work(tmp_path: Path) -> None:
    check_commands("README.md", tmp_path)


def check_commands(page: str, tmp_path: Path) -> None:
    """Run a page's tested blocks in order in one shell, on the real base, as a reader would."""
    blocks = TESTED.findall((ROOT / page).read_text())
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
