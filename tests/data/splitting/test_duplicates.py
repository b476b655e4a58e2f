"""Near pairs against brute force, and what counts as the same."""

from __future__ import annotations

import itertools
import random

import pytest
from hypothesis import given
from hypothesis import settings as examples
from hypothesis import strategies as st

from tests.data.trigrams import jaccard, shingles
from tunesmith.core.errors import Refused
from tunesmith.core.messages import Message
from tunesmith.data.splitting import similarity_join as join
from tunesmith.data.splitting.duplicates import answer_key, near_pairs, normalise, request_key, request_text


def pairs(texts: list[str], threshold: float) -> list[tuple[int, int]]:
    return [(left, right) for left, right in near_pairs(texts, threshold).tolist()]


def brute_force(texts: list[str], threshold: float) -> list[tuple[int, int]]:
    sets = [shingles(text) for text in texts]
    return [(i, j) for i, j in itertools.combinations(range(len(texts)), 2) if jaccard(sets[i], sets[j]) >= threshold]


def test_what_is_the_same() -> None:
    assert normalise("  Turn ON\tthe Lights!! ") == normalise("turn on the lights")
    assert normalise("ｆｕｌｌ ｗｉｄｔｈ") == "full width"
    assert normalise("?!") == "?!"
    assert normalise("c++") != normalise("c")
    assert answer_key('{"b": 1, "a": "x"}') == answer_key('{"a":"x","b":1.0}')
    answer = Message(role="assistant", content="ok")
    for left, right in (("a flat of 5 m²", "a flat of 5 m2"), ("what is 2⁵", "what is 25"), ("1½ cups", "1 1/2 cups")):
        keys = {request_key([Message(role="user", content=text), answer]) for text in (left, right)}
        assert len(keys) == 2
    assert answer_key("Yes ") == answer_key("Yes") != answer_key("yes")
    assert answer_key('{"a": NaN}') == '{"a": NaN}'
    long = "You are a helpful assistant that answers every question at great length. " * 5
    one, other = (
        request_text([Message(role="system", content=long), Message(role="user", content=text), answer])
        for text in ("go", "stop")
    )
    assert not pairs([one, other], 0.8), "the system turn makes no two requests alike"


word = st.sampled_from("turn switch on off the a light lamp lights in kitchen bedroom please now".split())  # noqa: SIM905


thresholds = st.sampled_from([0.5, 0.6, 0.75, 0.8, 0.9, 1.0])


@given(st.lists(st.lists(word, min_size=1, max_size=7).map(" ".join) | st.text(max_size=12), unique=True), thresholds)
@examples(max_examples=60)
def test_near_pairs_are_those_of_brute_force(texts: list[str], threshold: float) -> None:
    assert pairs(texts, threshold) == brute_force(texts, threshold)


def test_a_short_text_is_not_what_it_would_be_padded_with() -> None:
    texts = ["", "\0", "\0\0", "\0\0\0", " ", "a", "a\0", "a ", "ab", "ab\0", "ab "]
    assert pairs(texts, 0.5) == brute_force(texts, 0.5) == pairs([], 0.8) == []


@pytest.mark.parametrize(("words", "threshold"), [(6, 0.5), (6, 0.95), (40, 0.8), (300, 0.5), (300, 0.95)])
def test_short_and_long_rows_of_many_sizes(words: int, threshold: float) -> None:
    """Long rows are compared all with all, short ones by parts; sizes vary so that several classes meet."""
    rng = random.Random(words)
    texts = []
    for _ in range(100):
        text = ["".join(rng.choices("abcdefghiklmnopqrst", k=4)) for _ in range(rng.randint(2, words))]
        changed = rng.randrange(len(text))
        texts += [" ".join(text), " ".join([*text[:changed], "changed", *text[changed + 1 :]])]
    texts = list(dict.fromkeys(texts))
    assert pairs(texts, threshold) == brute_force(texts, threshold)


@pytest.mark.parametrize("limit", ["_CELLS", "_PAIRS"])
def test_what_is_worked_on_at_once_changes_nothing(monkeypatch: pytest.MonkeyPatch, limit: str) -> None:
    rng = random.Random(0)
    texts = list({" ".join(rng.choice(["lamp", "light", "on", "off", "hall"]) for _ in range(6)) for _ in range(200)})
    whole = pairs(texts, 0.7)
    monkeypatch.setattr(join, limit, 256)
    assert pairs(texts, 0.7) == whole == brute_force(texts, 0.7)


def test_too_many_near_pairs_are_refused() -> None:
    shared = "classify the sentiment of the following review as positive or negative and explain briefly: " * 3
    with pytest.raises(Refused, match="too similar") as caught:
        pairs([f"{shared}{n}" for n in range(260)], 0.8)
    assert "system turn" in str(caught.value.fix)
