"""Files that a user hands in: broken, huge, deep, or no files at all. Exit 2 with the place, never a traceback."""

from __future__ import annotations

import contextlib
import io
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.tiny_project import write_project
from tunesmith.cli.main import main
from tunesmith.core.errors import Refused, UsageError
from tunesmith.core.reading.text_files import read_text_file
from tunesmith.services.accounts import users
from tunesmith.store.people.trust import read_trust
from tunesmith.store.store import Store

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
    with pytest.raises(UsageError):
        users.enrol_key(Store(tmp_path / "store"), "eve", path, actor="owner")
    with pytest.raises(Refused):
        read_trust(path)
