"""What the README and the documentation show works: links, project files, commands."""

import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer import BadParameter, Context
from typer.exceptions import TyperException
from typer.main import get_command

from tests.tiny_project import settings
from tunesmith.cli.main import app
from tunesmith.project import parse_settings

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
PAGES = [page for page in PAGES if "generated" not in page.parts and "_build" not in page.parts]


def yaml_blocks() -> list[Any]:
    return [
        pytest.param(block, id=f"{page.relative_to(ROOT)}-{number}")
        for page in PAGES
        for number, block in enumerate(re.findall(r"```yaml\n(.*?)```", page.read_text(), flags=re.DOTALL))
    ]


@pytest.mark.parametrize("block", yaml_blocks())
def test_settings_shown_are_valid(block: str) -> None:
    shown: dict[str, Any] = yaml.safe_load(block)
    known: dict[str, Any] = {**settings(), "gates": {}}
    known["policy"] = {name: {"requests": ["x"], "lacks": "y"} for name in ("known", "no-promises")}
    known["task"]["scorers"].append({"name": "intent", "label": "intent"})
    others = ("zero-shot", "few-shot", "nearest", "rag")  # rivals that gates on the pages name
    known["candidates"] = {**known["candidates"], **{name: {"prompt": "prompt.txt"} for name in others}}
    if "train" in shown:  # a candidate's training
        known["candidates"]["shown"] = {"prompt": "prompt.txt", "train": shown.pop("train")}
    if "data" in shown:  # a part of `data:`
        shown["data"] = {**known["data"], **shown["data"]}
    assert parse_settings(yaml.safe_dump({**known, **shown}), "page").candidates


def test_commands_shown_exist() -> None:
    """With their options, and with no more arguments than they take."""
    every, wrong = get_command(app), []
    for page in PAGES:
        for words in commands_shown(page.read_text()):
            try:
                parse(every, words)
            except (KeyError, TyperException) as error:
                wrong.append(f"{page.relative_to(ROOT)}: {shlex.join(words)}: {error}")
    assert wrong == []


def parse(command: Any, words: list[str]) -> None:
    """Parse a command's arguments without running it. Raises KeyError for an unknown command, TyperException for an
    unknown option and for an argument too many.

    command: the one that has all others.
    """
    words = words[2:] if words[:1] == ["-C"] else words
    while hasattr(command, "commands") and words:
        command, words = command.commands[words[0]], words[1:]
    context = Context(command, info_name=command.name)
    _, rest, _ = command.make_parser(context).parse_args(words)
    if rest:
        raise BadParameter(f"{rest} are too many arguments")


def commands_shown(text: str) -> list[list[str]]:
    """The words after `tunesmith` of each command in a page's blocks, and of each in backquotes."""
    blocks = re.findall(r"```(\w*)\n(.*?)```", text, flags=re.DOTALL)
    lines = [line for kind, block in blocks if kind in ("", "bash") for line in block.replace("\\\n", " ").splitlines()]
    lines = [line for line in lines if re.match(r"(\S+=\S+ |\$ |\w+=\$\(|torchrun .* -m )?tunesmith ", line)]
    prose = re.sub(r"```.*?```", "", text, flags=re.DOTALL)
    lines += re.findall(r"`(?:torchrun [^`]*-m )?(tunesmith\s[^`]*)`", prose)
    found = (re.split(r"[|&;)]", line.partition("tunesmith")[2])[0] for line in lines)
    return [words for line in found if (words := shlex.split(line, comments=True)) and words[0] != "--help"]


@pytest.mark.parametrize("page", ["docs/architecture.md", "docs/how-to/extend.md"])
def test_modules_named_exist(page: str) -> None:
    named = set(re.findall(r"`([\w/]+/(?:[\w.]+\.py)?)`", (ROOT / page).read_text()))
    assert len(named) > 20
    roots = (ROOT, ROOT / "src" / "tunesmith")
    assert sorted(path for path in named if not any((root / path).exists() for root in roots)) == []


@pytest.mark.parametrize("page", [ROOT / "README.md", ROOT / "CONTRIBUTING.md"], ids=lambda page: page.name)
def test_links_to_files_exist(page: Path) -> None:
    links = [link for link in re.findall(r"\]\(([^)#\s]+)[^)]*\)", page.read_text()) if "://" not in link]
    assert links
    assert [link for link in links if not (page.parent / link).exists()] == []


def test_the_tutorial_runs_the_commands_of_the_readme() -> None:
    """On the same project file, and in the same order; slow/test_real_model.py executes them."""
    tutorial = iter(commands("docs/tutorial.md"))
    readme = commands("README.md")
    assert readme
    assert [command for command in readme if command not in tutorial] == []


def commands(page: str) -> list[Any]:
    """The words of each command in a page's tested blocks, and the settings of each project file among them."""
    found: list[Any] = []
    for kind, text in executed_blocks(page):
        if kind == "bash":
            lines = text.replace("\\\n", " ").splitlines()
            found += filter(None, (shlex.split(line, comments=True) for line in lines))
        else:
            found.append(yaml.safe_load(text))
    return found


def executed_blocks(page: str) -> list[tuple[str, str]]:
    """The blocks after `<!-- tested -->`: bash or yaml, and the text."""
    return re.findall(r"<!-- tested -->\n```(bash|yaml)\n(.*?)```", (ROOT / page).read_text(), flags=re.DOTALL)
