"""Stop texts: found where a plain search finds them, at a cost that does not grow with their length."""

from __future__ import annotations

from queue import SimpleQueue
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.attack_table import Happened
from tunesmith.engines.decoding.answers import Answer
from tunesmith.engines.protocol import Generation, Streamed


class Spelled:
    """A renderer whose tokens are texts."""

    def reader(self) -> Any:
        return str

    def text(self, ids: list[Any]) -> str:
        return "".join(ids)


def answered(pieces: list[str], stops: tuple[str, ...]) -> tuple[str, str, list[str]]:
    """(text, finish, what was streamed before the end) of an answer that decodes to these pieces."""
    events: SimpleQueue[Streamed | None] = SimpleQueue()
    answer = Answer(Spelled(), Generation((), stop=stops), lambda *_: None, events, streams=True)  # type: ignore[arg-type]
    for piece in pieces:
        if answer.take(piece, None):  # type: ignore[arg-type]
            break
        seen = events.qsize()
    streamed = [events.get() for _ in range(seen)] if pieces else []
    answer.end(stopped=False)
    completion = answer.completion()
    return completion.text, completion.finish, streamed  # type: ignore[return-value]


AB = st.text("ab", max_size=4)


@given(st.lists(AB, min_size=1, max_size=14), st.lists(st.text("ab", min_size=1, max_size=6), max_size=3))
def test_stop_texts_cut_where_a_plain_search_does(pieces: list[str], stops: list[str]) -> None:
    text, finish, streamed = answered(["", *pieces], tuple(stops))
    whole, ended = "", False
    for piece in pieces:
        whole += piece
        ended = any(stop in whole for stop in stops)
        if ended:
            break
    cut = min((whole.index(stop) for stop in stops if stop in whole), default=len(whole))
    assert (text, finish) == (whole[:cut], "stop" if ended else "length")
    assert whole.startswith("".join(streamed))
    assert len("".join(streamed)) <= cut


@pytest.mark.attack("serving", "stop texts of 240,000 characters, in the engine")
@pytest.mark.parametrize("stop", ["a" * 240_000, "a" * 239_999 + "b", "ab" * 120_000, "b" + "a" * 239_999])
def test_long_stop_texts_do_not_slow_decoding(stop: str, happened: Happened) -> None:
    """A check of every beginning of the stop text would take hours."""
    text, finish, _ = answered(["aaaa", "abab"] * 2000, (stop,) * 4)
    assert (len(text), finish) == (16_000, "length")
    happened("answered at the usual cost")
