"""What may come in place of rows: exit code, place, nothing left over, and no cost before a huge row is refused."""

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

from tests.attack_table import Happened
from tests.data.rows import build, many_rows, row, settings, turns, write_jsonl
from tests.tiny import write_model
from tunesmith.cli.main import main
from tunesmith.core.errors import Refused, UsageError
from tunesmith.core.system.scratch import SCRATCH
from tunesmith.data.building.shards import ShardWorker
from tunesmith.data.documents import cut
from tunesmith.models.rendering import RowCounter
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


BIG = 50_000_000
# each a row that is too long to be learned from
ROWS: dict[str, Any] = {
    "one long word": lambda: row("x" * BIG, "y"),
    "a long answer": lambda: row("x", "y " * (BIG // 2)),
    "many turns": lambda: {"messages": turns(*["a", "b"] * 15_000)},
}


@pytest.mark.slow
@pytest.mark.attack("input", "rows of 50 MB and of 30,000 turns")
@pytest.mark.parametrize(("tried", "overlong"), zip(ROWS, ("drop", "refuse", "truncate"), strict=True))
def test_huge_rows_are_removed_before_they_are_tokenised(
    tmp_path: Path, tried: str, overlong: Any, happened: Happened
) -> None:
    write_jsonl(tmp_path / "rows.jsonl", [*many_rows(60), ROWS[tried]()])
    limits = {"count_tokens": RowCounter(write_model(tmp_path / "base"), ""), "max_tokens": 600}
    if overlong == "refuse":
        with pytest.raises(Refused, match="the limit is 600") as caught:
            build(tmp_path, **limits)
        assert "row 61" in caught.value.where
        happened("refused, with its place")
    else:
        built = build(tmp_path, settings(overlong=overlong), **limits)
        kept = overlong == "truncate"
        assert built.record.body["rows"]["removed"].get("overlong", 0) == (not kept)
        happened("cut to its last turns, counted" if kept else "removed as overlong, counted")


@pytest.mark.attack("input", "a number, a nesting or keys of megabytes in a row")
@pytest.mark.parametrize(
    "value",
    ["9" * 5_000_000, "[" * 5_000_000, '{"a":' * 1_000_000, "{" + '"a":1,' * 200_000 + '"a":1}'],
    ids=["number", "lists", "objects", "keys"],
)
def test_huge_values_are_refused_with_their_place(tmp_path: Path, value: str, happened: Happened) -> None:
    lines = [json.dumps(one) for one in many_rows(3)]
    (tmp_path / "rows.jsonl").write_text("\n".join([*lines, f'{{"messages": [], "x": {value}}}']) + "\n")
    with pytest.raises(UsageError) as caught:
        build(tmp_path)
    assert "line 4" in caught.value.where
    assert len(str(caught.value)) < 1000
    happened("refused, with its place")


@pytest.mark.attack("input", "a document that is one paragraph, or one word, of 20 MB")
@pytest.mark.parametrize("text", ["word " * 4_000_000, "x" * 20_000_000], ids=["paragraph", "word"])
def test_huge_paragraphs_are_cut_in_linear_time(text: str, happened: Happened) -> None:
    passages = list(cut([("Title", text)], 160, 24))
    assert max(len(passage) for _, passage in passages) <= 160 * 1001
    happened("cut into passages")
