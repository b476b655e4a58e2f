"""Errors and results say what to do next in words; only the command line words it as a command, which exists."""

import ast
import copy
import functools
import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import typer

import tunesmith
from tunesmith.cli import main
from tunesmith.cli.terminal import command_line
from tunesmith.core.errors import NextStep, Refused
from tunesmith.server.console import rendering

SOURCE = Path(tunesmith.__file__).parent
PAGE = rendering._environment().from_string("{{ step }}")


@functools.cache
def below() -> dict[Path, list[ast.AST]]:
    """The nodes of each module but the command line's."""
    files = [path for path in SOURCE.rglob("*.py") if path.parent.name != "cli"]
    return {path: list(ast.walk(ast.parse(path.read_text()))) for path in files}


def commands(group: typer.main.TyperGroup, path: str = "") -> Iterator[tuple[str, typer.core.TyperCommand]]:
    for name, command in group.commands.items():
        if isinstance(command, typer.core.TyperGroup):
            yield from commands(command, f"{path}{name} ")
        else:
            yield path + name, command


COMMANDS = dict(commands(typer.main.get_command(main.app)))
OPTIONS = {word for command in COMMANDS.values() for one in command.params for word in one.opts if word[:2] == "--"}


def is_of_an_error(node: ast.AST) -> bool:
    match node:
        case ast.Raise() | ast.Call(func=ast.Name(id="Permission" | "NextStep")):
            return True
        case ast.Assign(targets=[ast.Name(id="fix" | "what")]):
            return True
        case ast.Call(keywords=keywords):
            return any(one.arg == "fix" for one in keywords)
        case ast.Dict(keys=keys):
            return any(isinstance(key, ast.Constant) and key.value == "fix" for key in keys)
    return False


def test_no_error_below_the_command_line_names_a_command_or_an_option() -> None:
    verbs, options = "|".join(COMMANDS), "|".join(OPTIONS)
    named = re.compile(rf"tunesmith (?:{verbs})\b|`(?:{verbs})(?: [^`]*)?`|(?:{options})(?![\w-])")
    for path, nodes in below().items():
        steps = [node for node in nodes if isinstance(node, ast.Call) and ast.unparse(node.func) == "NextStep"]
        allowed = {id(verb) for step in steps for verb in step.args[1:]}
        for error in filter(is_of_an_error, nodes):
            for text in ast.walk(error):
                if isinstance(text, ast.Constant) and isinstance(text.value, str) and id(text) not in allowed:
                    assert not named.search(re.sub("`ray [^`]*`", "", text.value)), f"{path}:{text.lineno}"


def test_every_next_step_names_a_command_and_its_parameters() -> None:
    count = 0
    for path, nodes in below().items():
        for node in nodes:
            match node:
                case ast.Call(func=ast.Name(id="NextStep"), args=[_, ast.Constant(value=verb)], keywords=keywords):
                    names = {one.arg for one in keywords if one.arg}
                    names |= {"tenant", "region"} if any(one.arg is None for one in keywords) else set()
                case ast.Call(func=ast.Name(id="NextStep"), args=[_, *_] as given, keywords=more) if given[1:] or more:
                    pytest.fail(f"{path}:{node.lineno} has no constant verb")
                case _:
                    continue
            count += 1
            if verb != "recall":  # its ** is a kind of cause, as the command's options are
                assert names <= {one.name for one in COMMANDS[verb].params}, f"{path}:{node.lineno}"
    assert count > 50


@pytest.mark.parametrize(
    ("step", "line"),
    [
        (NextStep("", "run", queue=True), "run --queue"),
        (NextStep("", "rollout start", version="a b@v1", tenant="x", region=""), "rollout start 'a b@v1' --tenant x"),
        (NextStep("", "approve", version="a@v1", actor=...), "approve a@v1 --as USER"),
        (NextStep("", "init", rename=("a=b", "c=d")), "init --data ROWS --licence LICENCE --rename a=b --rename c=d"),
    ],
)
def test_the_command_line_words_a_step_as_its_command(step: NextStep, line: str) -> None:
    assert command_line(step) == f"tunesmith {line}"
    assert PAGE.render(step=NextStep(f"\u202e{line}")).startswith("\u27e8U+202E\u27e9"), "as other texts of a page"


def test_an_error_has_words_and_on_the_command_line_also_the_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    error = copy.copy(Refused("no", fix=copy.copy(NextStep("judge it", "gate", name="tuned"))))
    assert str(error) == "no\n  fix: judge it"
    assert isinstance(error.fix, NextStep)
    assert command_line(error.fix) == "tunesmith gate tuned"
    monkeypatch.setattr(sys, "argv", ["tunesmith", "run", "--json", "-C", str(tmp_path)])
    with pytest.raises(SystemExit):
        main.main()
    out, said = capsys.readouterr()
    line = "create one, or name another folder: `tunesmith init --data ROWS --licence LICENCE`"
    assert json.loads(out)["error"]["fix"] == line
    assert f"  fix: {line}\n" in said
