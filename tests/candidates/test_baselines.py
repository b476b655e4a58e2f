"""Floors: answers without a language model."""

from __future__ import annotations

import pytest

from tunesmith.candidates.baselines import Confident, make_baseline
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
