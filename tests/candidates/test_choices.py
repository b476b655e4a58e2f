"""Shots, searches and settings of candidates."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from tests.candidates.test_baselines import example
from tunesmith.candidates.retrieval import Index
from tunesmith.candidates.search import plan_tries
from tunesmith.candidates.settings import CandidateSettings, Search, Shots
from tunesmith.candidates.shots import choose_shots, draw_shots

LIKE = [example(f"turn on the lamp in room {n}", "on", n, f"g{n}") for n in range(30)]
ODD = [example("play some music please", "music", 90, "h"), example("was soll das", "unklar", 91, "i")]


def test_diverse_shots_hold_what_is_unlike_the_rest() -> None:
    chosen = choose_shots([*LIKE, *ODD], 3, "diverse")
    assert {one.id for one in ODD} < {one.id for one in chosen}
    assert chosen == choose_shots([*reversed(LIKE), *ODD], 3, "diverse"), "whatever the rows' order"
    assert draw_shots(LIKE, 5, 1) == draw_shots(list(reversed(LIKE)), 5, 1) != draw_shots(LIKE, 5, 2)


@given(st.integers(1, 12), st.integers(0, 5), st.sampled_from(["fixed", "diverse"]))
def test_as_many_as_asked_and_none_twice(count: int, rows: int, how: str) -> None:
    chosen = choose_shots(LIKE[:rows], count, how)
    assert len(chosen) == min(count, rows) == len({one.id for one in chosen})


@given(
    st.lists(st.sampled_from("abcd"), min_size=1, max_size=4),
    st.lists(st.integers(0, 8), min_size=1, max_size=4),
    st.integers(2, 40),
)
def test_a_search_keeps_its_budget(prompts: list[str], shots: list[int], tries: int) -> None:
    planned = plan_tries(Search(shots=tuple(shots), tries=tries), prompts)
    assert len(set(planned)) == len(planned) == (tries if any(shots) else min(tries, len(set(prompts))))


def test_fused_ranks_what_both_find_above_what_one_finds() -> None:
    import numpy as np

    texts = ["alpha beta", "alpha gamma", "delta"]
    vectors = {"alpha beta": [0.6, 0.8], "alpha gamma": [1.0, 0.0], "delta": [0.9, 0.44], "alpha": [1.0, 0.0]}

    def embed(some: Any) -> Any:
        return np.array([vectors[text] for text in some], dtype=np.float32)

    # By vectors gamma, delta, beta; by words beta and gamma alike, beta first, delta last.
    assert Index(texts, "dense", embed).nearest("alpha", 3) == [0, 2, 1]
    assert Index(texts, "fused", embed).nearest("alpha", 1) == [1]
    assert Index(texts).nearest("alpha", 2) == [1, 0]
    assert Index(texts).nearest("???", 2) == [1, 0], "no known word: the first ones"
    assert Index(texts).similarity("???") == 0.0
    assert Index(texts).nearest("alpha", 2, frozenset({0})) == [2, 1]


URL = {"url": "http://h/v1", "model": "m"}


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"method": "nearest", "prompt": "p"}, "remove prompt"),
        ({"method": "classifier", "constrain": True}, "remove constrain"),
        ({"prompt": "p", "endpoint": URL, "train": {}}, "remove train"),
        ({"prompt": "p", "weights": "x", "train": {}}, "remove train"),
        ({"prompt": "p", "endpoint": URL, "constrain": {"copy": ["a"]}}, "cannot say"),
        ({"prompt": "p", "search": {}, "shots": 4}, "remove shots"),
        ({"prompt": "p", "shots": 65}, "64"),
        ({"prompt": "p", "shots": {"count": 4, "choose": "test"}}, "diverse"),
        ({"prompt": "p", "search": {"tries": 1}}, "2"),
    ],
)
def test_contradicting_settings_are_refused(settings: dict[str, Any], said: str) -> None:
    with pytest.raises(ValidationError, match=said):
        CandidateSettings.model_validate(settings)
    assert CandidateSettings(prompt="p", shots=8).wanted_shots == Shots(count=8), "a number is of fixed ones"
    assert CandidateSettings(prompt="p").wanted_shots is None
