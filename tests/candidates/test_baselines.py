"""Baselines, which answer without a language model; shots, searches and settings of candidates."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from tunesmith.candidates.baselines import Confident, make_baseline
from tunesmith.candidates.retrieval import Index
from tunesmith.candidates.search import plan_tries
from tunesmith.candidates.settings import CandidateSettings, Search, Shots
from tunesmith.candidates.shots import choose_shots, draw_shots
from tunesmith.core.errors import UsageError
from tunesmith.core.messages import Message
from tunesmith.data.dataset import Example
from tunesmith.engines.protocol import Completion, Generation


def example(request: str, answer: str, number: int = 0, group: str = "g") -> Example:
    turns = (Message(role="user", content=request), Message(role="assistant", content=answer))
    return Example(id=f"{number:04d}", messages=turns, source="s", licence="MIT", group=group)


ROWS = [
    example(text, label, number)
    for number, (text, label) in enumerate(
        [
            ("what is my balance", "balance"),
            ("show the balance of my account", "balance"),
            ("how much money is in the account", "balance"),
            ("block my card", "card"),
            ("my card was stolen please block it", "card"),
            ("i lost the card", "card"),
        ]
    )
]


def _ask(method: str, text: str) -> Completion:
    return make_baseline(method, ROWS).generate([Generation(messages=(Message(role="user", content=text),))])[0]


@pytest.mark.parametrize("method", ["nearest", "classifier"])
def test_it_answers_as_the_rows_like_the_request(method: str) -> None:
    assert _ask(method, "please block the stolen card").text == "card"
    assert _ask(method, "the balance of the account").text == "balance"
    assert _ask(method, "x").prompt_tokens == 0
    assert _ask(method, "balance card") == _ask(method, "balance card")


def test_the_classifier_is_as_sure_as_scikit_learn_says() -> None:
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import LogisticRegression

    given = _ask("classifier", "block the card of my account")
    texts, labels = [row.request[0].content for row in ROWS], [row.answer for row in ROWS]
    vectors = TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True, token_pattern=r"(?u)\b\w+\b")
    model = LogisticRegression(C=10.0, max_iter=1000).fit(vectors.fit_transform(texts), labels)
    expected = model.predict_proba(vectors.transform(["block the card of my account"]))[0].max()
    assert isinstance(given, Confident)
    assert given.confidence == pytest.approx(expected, abs=1e-6)


def test_rows_that_are_nothing_to_classify() -> None:
    for rows, said in (
        ([example("\U0001f600" * (n + 1), "ab"[n % 2], n) for n in range(6)], "have no words"),
        ([example(f"q {n}", f"a {n}", n) for n in range(6)], "not a classification task"),
        ([example(f"q {n}", "a", n) for n in range(6)], "not a classification task"),
    ):
        with pytest.raises(UsageError, match=said):
            make_baseline("classifier", rows)


def test_streaming_ends_with_the_completion_and_a_request_needs_a_user() -> None:
    floor = make_baseline("nearest", ROWS)
    events = list(floor.stream(Generation(messages=(Message(role="user", content="block my card"),))))
    assert events[0] == "card"
    assert isinstance(events[-1], Completion)
    with pytest.raises(UsageError, match="no user message"):
        floor.generate([Generation(messages=(Message(role="system", content="s"),))])


# Shots, searches and settings of candidates


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
