"""What may come in place of rows, by the command line: exit code, place, and nothing left over."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import textwrap
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from tests.data.rows import many_rows, row
from tunesmith.cli.main import main
from tunesmith.core.system.scratch import SCRATCH
from tunesmith.data.dataset import load_dataset
from tunesmith.store.store import Store

GOOD = many_rows(40)
SECOND = [{"path": "train.jsonl", "licence": "MIT"}, {"path": "held.jsonl", "licence": "MIT", "split": "test"}]


def lines(*rows: Mapping[str, Any]) -> bytes:
    return b"".join(json.dumps(one).encode() + b"\n" for one in rows)


def turned(*turns: tuple[str, str]) -> dict[str, Any]:
    return {"messages": [{"role": role, "content": text} for role, text in turns]}


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
    "an escaped NUL": Bad(lines(*GOOD, row("a\0b", "c")), 2, "NUL character", r"row 41, messages\[0\].content"),
    "half a surrogate pair in an attribute": Bad(
        lines(*GOOD, {**row("a", "b"), "channel": "\ud83d"}),
        2, "surrogate", r"rows.jsonl, line 41", {"attributes": ["channel"]},
    ),
    "half a surrogate pair in a key": Bad(
        lines(*GOOD, {**row("a", "b"), "k\ud83d": 1}), 2, "surrogate", r"rows.jsonl, (row|line) 41"
    ),
    "an unknown role": Bad(lines(*GOOD, turned(("user", "a"), ("robot", "b"))), 2, "no role 'robot'", r"row 41"),
    "a control token in what is answered": Bad(
        lines(*GOOD, row("a", "b<|im_start|>system")), 3, r"1 row holds a control token .*<\|im_start\|>", r"row 41"
    ),
    "a control token in the system turn": Bad(
        lines(*GOOD, turned(("system", "<|im_start|>x"), ("user", "a"), ("assistant", "b"))),
        3, r"1 row holds a control token .*<\|im_start\|>", r"row 41",
    ),
    "one row without a licence": Bad(
        lines(*({**one, "licence": "MIT"} for one in GOOD), row("a", "b")),
        3, "without a licence", r"row 41", {"sources": [{"path": "rows.jsonl"}]},
    ),
    "one non-commercial row": Bad(
        lines(*GOOD[1:], {**GOOD[0], "licence": "CC-BY-NC-4.0"}), 3, "CC-BY-NC-4.0", r"rows.jsonl, row 40"
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


def said(root: Path, *splits: str) -> set[str]:
    store = Store(root / ".tunesmith")
    dataset = load_dataset(store, store.records_of("dataset")[-1])
    return {one.request[-1].text for name in splits or dataset.splits for one in dataset.examples(name)}


def _slots(track: str, room: str) -> dict[str, Any]:
    answer = json.dumps({"track": track, "room": room})
    return row(f"play {track} loudly in the {room} for all our guests of tonight", answer)


HELD = [_slots("yesterday", "kitchen"), row("is the heating on in the cellar today", "yes")]
PASTED = {
    "reworded": (row("please, is the heating on in the cellar today", "yes"), "near a held-out row"),
    # What has the template of a held-out row is held out with it.
    "with another answer": (row("is the heating on in the cellar today", "no"), None),
    "with other values": (_slots("bohemian rhapsody", "winter garden"), None),
}


@pytest.mark.parametrize("how", PASTED)
def test_a_test_set_pasted_into_the_training_rows(project: Callable[..., Path], how: str) -> None:
    pasted, reason = PASTED[how]
    files = {"train.jsonl": lines(*GOOD, pasted), "held.jsonl": lines(*HELD)}
    root = project(files, sources=SECOND, split={"test": 0, "validation": 0})
    ended = ask(root)
    assert ended.document is not None, ended
    if reason is not None:
        assert ended.document["rows"]["removed"] == {reason: 1}
    assert said(root, "train") == {one["messages"][0]["content"] for one in GOOD}
    assert said(root, "test") >= {one["messages"][0]["content"] for one in HELD}


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


@pytest.fixture
def unprivileged(project: Callable[..., Path]) -> Iterator[Callable[..., Path]]:
    """A project of a user who is not root, as whom the test goes on."""
    root = Path(tempfile.mkdtemp())
    was = os.geteuid()

    def make(files: Mapping[str, bytes], change: Callable[[Path], None]) -> Path:
        project(files, root)
        change(root)
        if was == 0:
            for path in (root, *root.rglob("*")):
                os.chown(path, 65534, 65534)
            os.seteuid(65534)
        return root

    yield make
    os.seteuid(was)
    for path in root.rglob("*"):
        path.chmod(0o700)
    shutil.rmtree(root)


def test_a_folder_that_may_not_be_looked_into(unprivileged: Callable[..., Path]) -> None:
    def hide(root: Path) -> None:
        (root / "closed").mkdir()
        (root / "rows.jsonl").rename(root / "closed" / "rows.jsonl")
        settings = json.loads((root / "tunesmith.yaml").read_text())
        settings["data"]["sources"][0]["path"] = "closed/rows.jsonl"
        (root / "tunesmith.yaml").write_text(json.dumps(settings))
        (root / "closed").chmod(0)

    ended = ask(unprivileged({"rows.jsonl": lines(*GOOD)}, hide))
    assert (ended.code, ended.where) == (2, "closed/rows.jsonl"), ended
    assert "Permission denied" in ended.what


LIMIT = "import resource, sys\nresource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[2]),) * 2)\n"
TIGHT = {
    "by command": """
        sys.argv[1:] = ["data", "build", "-C", sys.argv[1], "--json"]
        from tunesmith.cli.main import main
        main()
    """,
    "from Python": """
        import json, tunesmith
        from tunesmith.services.datasets.data import build
        from tunesmith.core.errors import TunesmithError
        try:
            build(tunesmith.Project.load(sys.argv[1] + "/tunesmith.yaml"))
        except (TunesmithError, OSError) as error:  # the command line tells of either
            print(json.dumps({"error": {"exit": getattr(error, "exit_code", 1)}}))
            sys.exit(getattr(error, "exit_code", 1))
    """,
}


@pytest.mark.slow
@pytest.mark.parametrize(("how", "most"), [("by command", 50_000), ("from Python", 200_000)])
def test_a_disk_that_is_full(project: Callable[..., Path], most: int, how: str) -> None:
    """No file may grow beyond most bytes: the store's database, or that of the rows. What was there stays."""
    root = project({"rows.jsonl": lines(*many_rows(1500))})
    done = subprocess.run(
        [sys.executable, "-c", LIMIT + textwrap.dedent(TIGHT[how]), str(root), str(most)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1, done.stderr
    assert "Traceback" not in done.stderr
    assert json.loads(done.stdout)["error"]["exit"] == 1
    require_nothing_left(root)
    assert ask(root).code == 0  # and with room it goes on
