"""Toxic texts: what is found, how often that is wrong, and which bytes say so."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from tests.data.rows import build, many_rows, row, write_jsonl
from tunesmith.core.errors import Refused, UsageError
from tunesmith.data import pinned_packages
from tunesmith.data.quality import toxicity
from tunesmith.data.quality.flags import FLAGS, TOXIC, examine_quality
from tunesmith.store.store import Store

pytest.importorskip("profanity_check", reason="alt-profanity-check is not installed (extra: toxicity)")


def test_one_score_a_text_and_the_worst_sentence_decides() -> None:
    insult, clean = "You are an idiot.", "Turn on the kitchen lights."
    found = toxicity.scores([insult, clean, " ".join([clean] * 50 + [insult] + [clean] * 50), "", " \n"])
    assert found[0] >= toxicity.AT_LEAST > found[1] > found[3] == found[4] == 0
    assert found[2] == found[0]
    assert toxicity.scores([]) == []


def test_the_order_and_number_of_texts_change_no_score() -> None:
    texts = [row["text"] for row in toxicity.reference()]
    together = toxicity.scores(texts)
    assert toxicity.scores(texts[::-1])[::-1] == together
    assert [toxicity.scores([text])[0] for text in texts[:10]] == together[:10]


def test_the_error_is_measured_on_sentences_of_both_kinds() -> None:
    rows, told = toxicity.reference(), toxicity.measured()
    assert len(rows) == 120
    assert len({row["text"] for row in rows}) == 120
    assert sum(row["toxic"] for row in rows) == told["toxic"] == 60
    assert sum(kind["sentences"] for kind in told["kinds"].values()) == told["sentences"] == 120
    flags = [score >= toxicity.AT_LEAST for score in toxicity.scores([row["text"] for row in rows])]
    found = sum(flag and row["toxic"] for flag, row in zip(flags, rows, strict=True))
    assert (told["recall"], told["precision"]) == (found / 60, found / sum(flags))
    assert told["false_rate"] == (sum(flags) - found) / 60
    # These are the figures that decision 30 states: a model that is another is noticed here.
    assert (found, sum(flags)) == (21, 42)


def test_other_files_are_refused_before_they_are_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    copy = tmp_path / "profanity_check"
    shutil.copytree(pinned_packages.package_folders("profanity_check")[0], copy)
    monkeypatch.setattr(toxicity, "package_folders", lambda _: [copy])
    assert toxicity._rate.__wrapped__()  # the same bytes elsewhere
    with (copy / "data" / "model.joblib").open("ab") as file:
        file.write(b"\0")
    with pytest.raises(Refused, match="not the pinned ones"):
        toxicity._rate.__wrapped__()


def test_a_package_that_is_missing_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(toxicity, "_FOLDER", "no_such_package_here")
    with pytest.raises(UsageError, match="alt-profanity-check") as caught:
        toxicity._rate.__wrapped__()
    assert "tunesmith[toxicity]" in str(caught.value.fix)


def test_toxic_rows_are_flagged_by_role(tmp_path: Path) -> None:
    odd = [
        row("you are a pathetic moron", "Please stay polite."),
        row("where is my parcel", "It is on its way. Only an idiot would ask."),
        row("what is the anatomy of the ear", "It has three parts."),
    ]
    write_jsonl(tmp_path / "rows.jsonl", [*many_rows(80), *odd])
    dataset = build(tmp_path)
    store = Store(tmp_path / "store")
    plain = store.record(examine_quality(store, dataset))
    assert "toxicity" not in plain.body
    assert TOXIC not in plain.body["looked_for"]
    record = store.record(examine_quality(store, dataset, toxic=True))
    assert record.body["toxicity"] == {**toxicity.detector(), "rows": {"assistant": 1, "user": 1}}
    assert record.body["flags"] == {TOXIC: 2}
    flags = [json.loads(line) for line in store.read_blob(record.blobs[FLAGS]).splitlines()]
    said = sorted(flag["detail"].split(": ", 1)[1] for flag in flags)
    assert said == ["Only an idiot would ask.", "you are a pathetic moron"]
