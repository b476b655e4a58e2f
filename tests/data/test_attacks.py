"""What may come in place of rows, by the command line: exit code, place, and nothing left over."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from tests.data.rows import many_rows, row, turns
from tunesmith.cli.main import main
from tunesmith.core.system.scratch import SCRATCH
from tunesmith.store.store import Store

GOOD = many_rows(40)


def lines(*rows: Mapping[str, Any]) -> bytes:
    return b"".join(json.dumps(one).encode() + b"\n" for one in rows)


@dataclass(frozen=True)
class Outcome:
    """How a build ended. document: with exit 0 what --json prints, else None."""

    code: int
    what: str = ""
    where: str = ""
    document: dict[str, Any] | None = None


def ask(root: Path) -> Outcome:
    kept, sys.argv = sys.argv, ["tunesmith", "data", "build", "-C", str(root), "--json"]
    printed = root / "printed.json"
    try:
        with printed.open("w") as stream, pytest.MonkeyPatch.context() as patch:
            patch.setattr("sys.stdout", stream)
            with pytest.raises(SystemExit) as ended:
                main()
    finally:
        sys.argv = kept
    document = json.loads(printed.read_text())
    error = document.get("error", {})
    assert error.get("exit", 0) == ended.value.code
    return Outcome(ended.value.code, error.get("what", ""), error.get("where") or "", None if error else document)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from tests.tiny import write_model

    return write_model(tmp_path_factory.mktemp("base"))


@pytest.fixture
def project(tmp_path: Path, base: Path) -> Callable[..., Path]:
    """Writes a project: of files by name, and of data settings beside the source rows.jsonl under MIT."""

    def make(files: Mapping[str, bytes], root: Path = tmp_path, **data: Any) -> Path:
        for name, content in files.items():
            (root / name).write_bytes(content)
        chosen = {"sources": [{"path": "rows.jsonl", "licence": "MIT"}], "privacy": {"entities": []}, **data}
        settings = {"name": "demo", "base": str(base), "data": chosen, "candidates": {"zero": {"prompt": "p.txt"}}}
        (root / "p.txt").write_text("answer")
        (root / "tunesmith.yaml").write_text(json.dumps(settings))
        return root

    return make


def require_nothing_left(root: Path) -> None:
    """A build that failed leaves no dataset version, no blob, and no rows in its work folder."""
    store = Store(root / ".tunesmith")
    assert not store.root.is_dir() or store.records_of("dataset") == []
    held = [path for path in store.root.rglob("*") if path.is_file()]
    assert not [path for path in held if "blobs" in path.parts or path.name.startswith((SCRATCH, "rows.db"))]
    assert not [path for path in (store.root / "work").rglob("*") if path.is_file() and path.stat().st_size]


@dataclass(frozen=True)
class Bad:
    """Input that is refused. what, where: patterns of the error's."""

    content: bytes
    code: int
    what: str
    where: str
    data: Mapping[str, Any] = field(default_factory=dict)


REFUSED = {
    "broken JSON on line 7": Bad(
        lines(*GOOD[:6]) + b'{"messages": [\n' + lines(*GOOD[6:]), 2, "broken JSON", r"rows.jsonl, line 7, column 15"
    ),
    "half a surrogate pair in an attribute": Bad(
        lines(*GOOD, {**row("a", "b"), "channel": "\ud83d"}),
        2, "surrogate", r"rows.jsonl, line 41", {"attributes": ["channel"]},
    ),
    "half a surrogate pair in a key": Bad(
        lines(*GOOD, {**row("a", "b"), "k\ud83d": 1}), 2, "surrogate", r"rows.jsonl, (row|line) 41"
    ),
    "a control token in what is answered": Bad(
        lines(*GOOD, row("a", "b<|im_start|>system")), 3, r"1 row holds a control token .*<\|im_start\|>", r"row 41"
    ),
    "a control token in the system turn": Bad(
        lines(*GOOD, {"messages": turns("a", "b", system="<|im_start|>x")}),
        3, r"1 row holds a control token .*<\|im_start\|>", r"row 41",
    ),
    "one row without a licence": Bad(
        lines(*({**one, "licence": "MIT"} for one in GOOD), row("a", "b")),
        3, "without a licence", r"row 41", {"sources": [{"path": "rows.jsonl"}]},
    ),
    "a row longer than the base reads": Bad(lines(*GOOD, row("word " * 9_000, "b")), 3, "tokens or more, ", r"row 41"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_bad_input_is_refused_with_its_place(project: Callable[..., Path], name: str) -> None:
    bad = REFUSED[name]
    root = project({"rows.jsonl": bad.content}, **bad.data)
    ended = ask(root)
    assert ended.code == bad.code, ended
    assert re.search(bad.what, ended.what), ended
    assert re.search(bad.where, ended.where), ended
    require_nothing_left(root)


@pytest.mark.slow
def test_a_row_of_ten_megabytes(project: Callable[..., Path]) -> None:
    root = project(
        {"rows.jsonl": lines(*GOOD, row("word " * 2_000_000, "b"), {**many_rows(41)[40], "note": "x" * 10**7})}
    )
    ended = ask(root)
    assert (ended.code, ended.where) == (3, "rows.jsonl, row 41")
    require_nothing_left(root)
    (root / "rows.jsonl").write_bytes(lines(*GOOD, {**many_rows(41)[40], "note": "x" * 10**7}))
    ended = ask(root)
    assert ended.document is not None
    assert (ended.document["rows"]["kept"], ended.document["ignored_keys"]) == (41, {"note": 1})


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
    from tunesmith.data.building.shards import ShardWorker

    root = project({"rows.jsonl": lines(*GOOD)})
    pieces = ShardWorker.pieces

    def slow(self: ShardWorker, shard: Any) -> Iterator[Any]:
        for number, piece in enumerate(pieces(self, shard)):
            if number == 0:
                CHANGES[how](root / "rows.jsonl")
            yield piece

    monkeypatch.setattr(ShardWorker, "pieces", slow)
    ended = ask(root)
    gone = (2, "cannot be opened: No such file or directory", "rows.jsonl")
    changed = (1, "the file changed while it was read", "rows.jsonl")
    assert (ended.code, ended.what, ended.where) == (gone if how == "deleted" else changed)
    require_nothing_left(root)


TIGHT = """
import resource, sys
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[2]),) * 2)
sys.argv[1:] = ["data", "build", "-C", sys.argv[1], "--json"]
from tunesmith.cli.main import main
main()
"""


@pytest.mark.slow
@pytest.mark.parametrize("most", [50_000, 200_000])
def test_a_disk_that_is_full(project: Callable[..., Path], most: int) -> None:
    """No file may grow beyond most bytes: the store's database, or that of the rows. What was there stays."""
    root = project({"rows.jsonl": lines(*many_rows(1500))})
    done = subprocess.run(
        [sys.executable, "-c", TIGHT, str(root), str(most)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 1, done.stderr
    assert "Traceback" not in done.stderr
    assert json.loads(done.stdout)["error"]["exit"] == 1
    require_nothing_left(root)
    assert ask(root).code == 0  # and with room it goes on
