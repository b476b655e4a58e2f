"""How long answers take, and how sure a base is of an answer that is a label."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tests.fabricate import example, put_base, put_dataset
from tests.models.test_rendering_tools import CALL, HERMES, TURNS
from tests.tiny import write_tokenizer
from tunesmith.candidates import answering, asking
from tunesmith.candidates.answering import Answerer
from tunesmith.candidates.asking import _confidence, ask_rows
from tunesmith.candidates.baselines import Baseline, make_baseline
from tunesmith.candidates.candidate import Candidate
from tunesmith.core.errors import UsageError
from tunesmith.core.messages import Message
from tunesmith.data.dataset import Example
from tunesmith.engines.protocol import Completion, Generation
from tunesmith.models.rendering import Renderer
from tunesmith.store.store import Store


def test_building_a_baseline_is_no_time_of_its_answers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Serving builds it once: 20 requests would bear what is then shared by all."""
    store, now = Store(tmp_path / "store"), [0.0]
    rows = [example(f"light {number} on", {"on": True}, f"g{number}") for number in range(6)]
    candidate = Candidate(
        name="nearest", base=put_base(store), max_tokens=8, dataset=put_dataset(store, rows), method="nearest"
    )

    def slow(method: str, examples: Sequence[Example]) -> Baseline:
        now[0] += 1000.0
        return make_baseline(method, examples)

    def tick() -> float:
        now[0] += 1.0
        return now[0]

    monkeypatch.setattr(answering, "make_baseline", slow)
    monkeypatch.setattr(asking, "time", SimpleNamespace(perf_counter=tick))
    found = ask_rows(Answerer(store, None, candidate), rows, tmp_path / "work", "asked")
    assert [line["text"] for line in found.lines] == [row.answer for row in rows]
    assert now[0] > 1000.0
    assert found.seconds == 1.0


def test_calls_are_kept_in_the_form_of_a_row(tmp_path: Path) -> None:
    """Only where one is expected: a row may teach text that looks like a call."""
    write_tokenizer(tmp_path, HERMES)
    store = Store(tmp_path / "store")
    candidate = Candidate(name="zero", base=put_base(store), max_tokens=64)
    rows = [
        Example(id=group, group=group, messages=messages, source="s", licence="CC0-1.0")
        for group, messages in (("a", TURNS[:2]), ("b", (TURNS[0], Message(role="assistant", content=CALL))))
    ]
    engine: Any = SimpleNamespace(
        base=candidate.base, generate=lambda requests, _adapter: [Completion(CALL, "stop", 1, 1)] * len(requests)
    )
    found = ask_rows(Answerer(store, engine, candidate, renderer=Renderer(tmp_path)), rows, tmp_path / "work", "asked")
    assert [line["text"] for line in found.lines] == [row.answer for row in rows]


def test_the_row_that_cannot_be_asked_is_named(tmp_path: Path) -> None:
    """Among many rows, or the policy's requests, nobody would find it."""
    store = Store(tmp_path / "store")
    rows = [example(text, {"on": True}, text) for text in ("light on", "light " * 99, "12")]

    def generate(asked: Sequence[Generation], adapter: str | None) -> list[Completion]:
        if any(len(each.messages[-1].content) > 99 for each in asked):
            raise UsageError("the prompt is too long", where="messages", fix="shorten the request")
        return [Completion("{}", "stop", 1, 1)] * len(asked)

    engine: Any = SimpleNamespace(base=put_base(store), follows_grammars=True, generate=generate)
    schema = {"type": "object", "properties": {"who": {"type": "string", "minLength": 3}}, "required": ["who"]}
    free = Candidate(name="c", base=engine.base, max_tokens=8)
    held = free.model_copy(update={"answer_schema": json.dumps(schema), "copied": ("who",)})
    for candidate, asked, said in ((free, rows, "too long"), (held, rows[::2], "no words of the length")):
        with pytest.raises(UsageError, match=said) as caught:
            ask_rows(Answerer(store, engine, candidate), asked, tmp_path / said, "asked")
        assert caught.value.where == f"request {rows[1 if asked is rows else 2].id}, messages"


def test_a_label_s_confidence_depends_neither_on_case_nor_on_spaces() -> None:
    """As its score does not: Positive is right where the reference is positive."""
    sums = {"positive": math.log(0.5), "Positive": math.log(0.25), "negative": math.log(0.25)}
    given = {"positive": 0.75, "Positive": 0.75, " POSITIVE ": 0.75, "negative": 0.25, "none of them": 0.0}
    assert {text: _confidence(text, sums) for text in given} == pytest.approx(given, abs=1e-6)
