"""What may come in place of rows: exit code, place, nothing left over, and no cost before a huge row is refused."""

import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.attack_table import Happened
from tests.commands import call
from tests.data.rows import build, jsonl, many_rows, row, settings, turns, write_jsonl
from tests.tiny import write_model
from tests.tiny_project import write_project
from tunesmith.core.errors import Refused, TunesmithError, UsageError
from tunesmith.core.system.scratch import SCRATCH
from tunesmith.data.building import shards
from tunesmith.data.documents import cut
from tunesmith.models.rendering import RowCounter
from tunesmith.store.store import Store

GOOD = many_rows(40)


def refused(root: Path) -> TunesmithError:
    """Why `tunesmith data build` fails there."""
    with pytest.raises(TunesmithError) as caught:
        call(root, "data", "build")
    return caught.value


def project(folder: Path, rows: bytes, **data: Any) -> Path:
    """Writes a project: of rows, and of data settings beside the source rows.jsonl under MIT."""
    chosen = {"sources": [{"path": "rows.jsonl", "licence": "MIT"}], "privacy": {"entities": []}, **data}
    write_project(folder, data=chosen, task={"scorers": ["exact_match"]}, gates={})
    (folder / "rows.jsonl").write_bytes(rows)
    return folder


def require_nothing_left(root: Path) -> None:
    """A build that failed leaves no dataset version, no blob, and no rows in its work folder."""
    store = Store(root / ".tunesmith")
    assert not store.root.is_dir() or store.records_of("dataset") == []
    held = [path for path in store.root.rglob("*") if path.is_file()]
    assert not [path for path in held if "blobs" in path.parts or path.name.startswith((SCRATCH, "rows.db"))]
    assert not [path for path in (store.root / "work").rglob("*") if path.is_file() and path.stat().st_size]


# What is refused: a row, the exit code, patterns of what the error says and where it is, and settings.
REFUSED: dict[str, tuple[dict[str, Any], int, str, str, dict[str, Any]]] = {
    "half a surrogate pair in an attribute": (
        {**row("a", "b"), "channel": "\ud83d"}, 2, "surrogate", "rows.jsonl, line 41", {"attributes": ["channel"]}
    ),
    "half a surrogate in a key": ({**row("a", "b"), "k\ud83d": 1}, 2, "surrogate", "rows.jsonl, (row|line) 41", {}),
    "a control token in the system turn": (
        {"messages": turns("a", "b", system="<|im_start|>x")}, 3, r"1 row holds .*<\|im_start\|>", "row 41", {}
    ),
    "a row longer than the base reads": (row("word " * 9_000, "b"), 3, "tokens or more, ", "row 41", {}),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_bad_input_is_refused_with_its_place(tmp_path: Path, name: str) -> None:
    odd, expected, said, place, data = REFUSED[name]
    error = refused(project(tmp_path, jsonl([*GOOD, odd]), **data))
    assert error.exit_code == expected
    assert re.search(said, error.what), error.what
    assert re.search(place, str(error.where)), error.where
    require_nothing_left(tmp_path)


CHANGES: dict[str, Callable[[Path], object]] = {
    "as long as before": lambda path: path.write_bytes(path.read_bytes().replace(b"a", b"b")),
    "deleted": lambda path: path.unlink(),
}


@pytest.mark.parametrize("how", CHANGES)
def test_a_file_that_changes_while_it_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: str) -> None:
    root, examined_shard = project(tmp_path, jsonl(GOOD)), shards.examined_shard

    def slow(examiner: Any, shard: Any) -> Iterator[Any]:
        for number, piece in enumerate(examined_shard(examiner, shard)):
            if number == 0:
                CHANGES[how](root / "rows.jsonl")
            yield piece

    monkeypatch.setattr(shards, "examined_shard", slow)
    error = refused(root)
    gone, changed = (2, "cannot be opened: No such file or directory"), (1, "the file changed while it was read")
    assert (error.exit_code, error.what) == (gone if how == "deleted" else changed)
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


@pytest.mark.attack("input", "a number, a nesting or keys of megabytes in a row", "refused, with its place")
@pytest.mark.parametrize(
    "value",
    ["9" * 5_000_000, "[" * 5_000_000, '{"a":' * 1_000_000, "{" + '"a":1,' * 200_000 + '"a":1}'],
    ids=["number", "lists", "objects", "keys"],
)
def test_huge_values_are_refused_with_their_place(tmp_path: Path, value: str) -> None:
    lines = [json.dumps(one) for one in many_rows(3)]
    (tmp_path / "rows.jsonl").write_text("\n".join([*lines, f'{{"messages": [], "x": {value}}}']) + "\n")
    with pytest.raises(UsageError) as caught:
        build(tmp_path)
    assert "line 4" in caught.value.where
    assert len(str(caught.value)) < 1000


@pytest.mark.attack("input", "a document that is one paragraph, or one word, of 20 MB", "cut into passages")
@pytest.mark.parametrize("text", ["word " * 4_000_000, "x" * 20_000_000], ids=["paragraph", "word"])
def test_huge_paragraphs_are_cut_in_linear_time(text: str) -> None:
    passages = list(cut([("Title", text)], 160, 24))
    assert max(len(passage) for _, passage in passages) <= 160 * 1001
