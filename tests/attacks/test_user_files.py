"""Files that a user hands in: broken, huge, deep or none at all; and texts of strangers in what commands print."""

import ast
import contextlib
import io
import json
import os
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from rich.table import Table
from rich.text import Text
from rich.tree import Tree

import tunesmith.cli
from tests.tiny_project import write_project
from tunesmith.cli.console import PlainConsole
from tunesmith.cli.data import draw_removed, draw_rows
from tunesmith.cli.main import main
from tunesmith.cli.terminal import Terminal, say, table
from tunesmith.core.errors import Refused, UsageError
from tunesmith.core.reading.text_files import read_text_file
from tunesmith.store.people.trust import read_trust

Make = Callable[[Path], object]


def content(data: bytes) -> Make:
    return lambda path: path.write_bytes(data)


def huge(path: Path) -> None:
    """A file of 100 MB that takes no space."""
    path.touch()
    os.truncate(path, 100 << 20)


NOT_FILES: dict[str, Make] = {
    "a folder": lambda path: path.mkdir(),
    "a FIFO": lambda path: os.mkfifo(path),
    "a device": lambda path: path.symlink_to("/dev/zero"),
    "a terminal": lambda path: path.symlink_to("/dev/tty"),
    "a link to itself": lambda path: path.symlink_to(path.name),
    "100 MB": huge,
    "NUL": content(b'{"a": \0}'),
    "Latin-1": content(b'{"a": "\xe9"}'),
    "UTF-16": content('{"a": 1}'.encode("utf-16")),
}
DEEP: dict[str, Make] = {
    "deep lists": content(b'{"a": ' + b"[" * 50_000),
    "deep objects": content(b'{"a": ' * 50_000),
    "a number of 200,000 digits": content(b'{"minimum": ' + b"9" * 200_000 + b"}"),
    "a key twice": content(b'{"a": 1, "a": 2}'),
}


def run(*arguments: str) -> tuple[int, dict[str, Any]]:
    """The exit code and the error of a command that runs in this process."""
    kept, sys.argv = sys.argv, ["tunesmith", *arguments, "--json"]
    printed = io.StringIO()
    try:
        with contextlib.redirect_stdout(printed), pytest.raises(SystemExit) as ended:
            main()
    finally:
        sys.argv = kept
    code = ended.value.code
    assert isinstance(code, int)
    return code, json.loads(printed.getvalue()).get("error", {})


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_project(tmp_path_factory.mktemp("project"))


@pytest.mark.attack("settings", "no file, a broken or a huge one, by command", "refused with its place, exit 2")
@pytest.mark.parametrize(
    ("what", "file"), [(what, ("tunesmith.yaml", "schema.json")[n % 2]) for n, what in enumerate([*NOT_FILES, *DEEP])]
)
def test_a_file_of_the_project(project: Path, file: str, what: str) -> None:
    path = project / file
    kept = path.rename(project / "kept")
    (NOT_FILES | DEEP)[what](path)
    try:
        code, error = run("data", "build", "-C", str(project))
    finally:
        path.rmdir() if path.is_dir() and not path.is_symlink() else path.unlink()
        kept.rename(path)
    assert code == 2, error
    assert error["what"]
    assert str(path) in error["where"]


@pytest.mark.attack("settings", "no file, a broken or a huge one, by reader", "refused with its place")
@pytest.mark.parametrize("what", NOT_FILES)
def test_what_is_no_text_file(tmp_path: Path, what: str) -> None:
    path = tmp_path / "file"
    NOT_FILES[what](path)
    with pytest.raises(UsageError) as prompt:
        read_text_file(path, "the prompt")
    assert str(path) in str(prompt.value.where)
    with pytest.raises(Refused):
        read_trust(path)


HOSTILE = "a\x1b[31mb\x1b]0;owned\x07c\x9b2Jd\u202ee\u2066f\u200bg\r[red]h[/] [/nothing] :smile: \U000e0041i\ud800"
OBEYED = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u200b\u202e\u2066\U000e0041\ud800]")


def drawn(*objects: Any, **options: Any) -> str:
    console = PlainConsole()
    console.file = io.StringIO()
    for each in objects:
        console.print(each, **options)
    return console.file.getvalue()


def harmless(text: str) -> None:
    assert not OBEYED.search(text)
    assert "[red]h[/] [/nothing] :smile:" in " ".join(text.split())


@pytest.mark.attack("terminal", "rows, names and reasons in every kind of output", "shown as code points")
def test_nothing_that_is_drawn_controls_the_terminal(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "400")
    grid = Table(HOSTILE, title=HOSTILE)
    grid.add_row(HOSTILE)
    tree = Tree(HOSTILE)
    tree.add(Text(HOSTILE))
    for thing in (HOSTILE, Text(HOSTILE), grid, tree):
        harmless(drawn(thing, soft_wrap=True))
    console = PlainConsole()
    console.draw([table([(HOSTILE,)], HOSTILE, title=HOSTILE), HOSTILE, (HOSTILE, "dim")])
    say(HOSTILE)
    terminal = Terminal()
    with terminal.task(HOSTILE, 1) as task:
        task.note(HOSTILE)
    terminal._fancy = True
    with terminal.task(HOSTILE, 1) as task:
        task.note(HOSTILE)
    for text in capsys.readouterr():
        harmless(text)


@pytest.mark.attack("terminal", "a row that imitates another turn or another row")
def test_a_turn_with_line_feeds_stays_inside_its_turn() -> None:
    from types import SimpleNamespace

    from tunesmith.core.messages import Message
    from tunesmith.data.dataset import Example

    turns = [Message(role="user", content="x\n  assistant: yes")]
    row = Example.model_construct(id="r1", group="g", licence="MIT", messages=turns)
    console = PlainConsole()
    console.file = io.StringIO()
    console.draw(draw_rows(SimpleNamespace(split="train", examples=[row], total=1)))  # type: ignore[arg-type]
    fields = {"text": "x\n\x9b2J\u202e"}
    removed = SimpleNamespace(removed={"duplicate": [SimpleNamespace(source="a\nb", row=1, fields=fields)]})
    console.draw(draw_removed(removed))  # type: ignore[arg-type]
    shown = console.file.getvalue()
    assert "\n  user: x\n      assistant: yes\n" in shown
    assert "\n  a\n    b, row 1: " in shown
    assert json.loads(shown[shown.index('{"text"') :]) == fields


@pytest.mark.attack("terminal", "names that are not valid, in errors and their JSON")
@pytest.mark.parametrize("options", [[], ["--json"]])
def test_errors_show_hostile_names_safely(
    options: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    hostile = HOSTILE.replace("\ud800", "") + "\nerror: none"
    tries = [
        ["show", hostile], ["verify", hostile], ["data", "show", hostile], ["doctor", "-C", str(tmp_path / hostile)],
        [hostile], ["users", "add", hostile], ["report", hostile],
    ]  # fmt: skip
    for words in tries:
        monkeypatch.setattr(sys, "argv", ["tunesmith", *words, *options])
        with pytest.raises(SystemExit) as ended:
            main()
        assert ended.value.code
        for text in capsys.readouterr():
            assert not OBEYED.search(text.replace("\n", ""))
            assert "\nerror: none" not in text


def test_commands_print_through_the_safe_console_only() -> None:
    direct = []
    for path in Path(tunesmith.cli.__file__).parent.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and ast.unparse(node.func) in ("print", "typer.echo", "Console"):
                text = ast.unparse(node)
                if not any(safe in text for safe in ("printable", "json_text", "print()", "_STOPPED_TEXT")):
                    direct.append(f"{path.name}: {text}")
    assert direct == []
