"""What may come in place of rows, by the command line: exit code, place, and nothing left over."""

from __future__ import annotations

import io
import json
import re
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from tests.data.rows import many_rows, row, turns
from tests.tiny import write_model
from tunesmith.cli.main import main
from tunesmith.core.system.scratch import SCRATCH
from tunesmith.data.building.shards import ShardWorker
from tunesmith.store.store import Store

GOOD = many_rows(40)


def lines(*rows: Mapping[str, Any]) -> bytes:
    return b"".join(json.dumps(one).encode() + b"\n" for one in rows)


def ask(root: Path) -> tuple[int, str, str]:
    """How a build ended: its exit code, and what and where its error was."""
    printed = io.StringIO()
    argv = ["tunesmith", "data", "build", "-C", str(root), "--json"]
    with mock.patch.object(sys, "argv", argv), redirect_stdout(printed), pytest.raises(SystemExit) as ended:
        main()
    error = json.loads(printed.getvalue())["error"]
    assert error["exit"] == ended.value.code
    return error["exit"], error["what"], error["where"] or ""


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("base"))


@pytest.fixture
def project(tmp_path: Path, base: Path) -> Callable[..., Path]:
    """Writes a project: of rows, and of data settings beside the source rows.jsonl under MIT."""

    def make(rows: bytes, **data: Any) -> Path:
        (tmp_path / "rows.jsonl").write_bytes(rows)
        chosen = {"sources": [{"path": "rows.jsonl", "licence": "MIT"}], "privacy": {"entities": []}, **data}
        settings = {"name": "demo", "base": str(base), "data": chosen, "candidates": {"zero": {"prompt": "p.txt"}}}
        (tmp_path / "p.txt").write_text("answer")
        (tmp_path / "tunesmith.yaml").write_text(json.dumps(settings))
        return tmp_path

    return make


def require_nothing_left(root: Path) -> None:
    """A build that failed leaves no dataset version, no blob, and no rows in its work folder."""
    store = Store(root / ".tunesmith")
    assert not store.root.is_dir() or store.records_of("dataset") == []
    held = [path for path in store.root.rglob("*") if path.is_file()]
    assert not [path for path in held if "blobs" in path.parts or path.name.startswith((SCRATCH, "rows.db"))]
    assert not [path for path in (store.root / "work").rglob("*") if path.is_file() and path.stat().st_size]


# What is refused: the rows, the exit code, patterns of what the error says and where it is, and settings.
REFUSED: dict[str, tuple[bytes, int, str, str, dict[str, Any]]] = {
    "broken JSON on line 7": (
        lines(*GOOD[:6]) + b'{"messages": [\n' + lines(*GOOD), 2, "broken JSON", r"rows.jsonl, line 7, column 15", {}
    ),
    "half a surrogate pair in an attribute": (
        lines(*GOOD, {**row("a", "b"), "channel": "\ud83d"}),
        2, "surrogate", r"rows.jsonl, line 41", {"attributes": ["channel"]},
    ),
    "half a surrogate pair in a key": (
        lines(*GOOD, {**row("a", "b"), "k\ud83d": 1}), 2, "surrogate", r"rows.jsonl, (row|line) 41", {}
    ),
    "a control token in the system turn": (
        lines(*GOOD, {"messages": turns("a", "b", system="<|im_start|>x")}),
        3, r"1 row holds a control token .*<\|im_start\|>", r"row 41", {},
    ),
    "a row longer than the base reads": (
        lines(*GOOD, row("word " * 9_000, "b")), 3, "tokens or more, ", r"row 41", {}
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_bad_input_is_refused_with_its_place(project: Callable[..., Path], name: str) -> None:
    content, expected, said, place, data = REFUSED[name]
    root = project(content, **data)
    code, what, where = ask(root)
    assert code == expected
    assert re.search(said, what), what
    assert re.search(place, where), where
    require_nothing_left(root)


def _replaced(path: Path) -> None:
    (path.parent / "other").write_bytes(lines(*many_rows(30)))
    (path.parent / "other").rename(path)


CHANGES: dict[str, Callable[[Path], object]] = {
    "as long as before": lambda path: path.write_bytes(path.read_bytes().replace(b"a", b"b")),
    "replaced": _replaced,
    "deleted": lambda path: path.unlink(),
}


@pytest.mark.parametrize("how", CHANGES)
def test_a_file_that_changes_while_it_is_read(
    project: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    root, pieces = project(lines(*GOOD)), ShardWorker.pieces

    def slow(self: ShardWorker, shard: Any) -> Iterator[Any]:
        for number, piece in enumerate(pieces(self, shard)):
            if number == 0:
                CHANGES[how](root / "rows.jsonl")
            yield piece

    monkeypatch.setattr(ShardWorker, "pieces", slow)
    gone = (2, "cannot be opened: No such file or directory", "rows.jsonl")
    changed = (1, "the file changed while it was read", "rows.jsonl")
    assert ask(root) == (gone if how == "deleted" else changed)
    require_nothing_left(root)
