"""Rows and documents that are much larger than what can be learned from: removed, or cut, before they cost anything."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.attack_table import Happened
from tests.data.rows import build, many_rows, row, settings, turns, write_jsonl
from tests.tiny import write_model
from tunesmith.core.errors import Refused, UsageError
from tunesmith.data.documents import cut
from tunesmith.models.rendering import RowCounter

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
