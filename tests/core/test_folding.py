"""Folded texts: what is equal after folding, and the places that folded characters come from."""

from __future__ import annotations

import unicodedata

from hypothesis import example, given, settings
from hypothesis import strategies as st

from tunesmith.core.folding import fold, fold_with_offsets, visible

_ANY = st.text(st.characters(codec=None, categories=None), max_size=12) | st.text(
    st.sampled_from(
        "aAéßıİ\u0345\u0301\u0338\u0307=≠ 1٣\u200b\u200d\u00ad\ufe0f\u115f가\u1100\u1161\u11a8かガ\u3099\u05d0"
        "\u05b8\u0e01\u0e48\u0928\u093fаΣςᾳꭰ\u2800\u3000\n\x00\x1c\u0600\U000e0041\ud800ﬁ"
    ),
    max_size=8,
)


@settings(max_examples=1000)
@given(_ANY)
@example("\u2019")
def test_folding_twice_changes_nothing(text: str) -> None:
    assert fold(fold(text)) == fold(text)
    assert visible(visible(text)) == visible(text)
    assert fold(visible(text)) == fold(text)


@settings(max_examples=1000)
@given(_ANY)
def test_offsets_point_into_the_text(text: str) -> None:
    folded, offsets = fold_with_offsets(text)
    assert folded == fold(text)
    assert len(offsets) == len(folded) + 1
    assert offsets[-1] == len(text)
    assert list(offsets) == sorted(offsets)


@given(_ANY, _ANY)
def test_canonically_equal_texts_are_folded_alike(left: str, right: str) -> None:
    for form in ("NFC", "NFD", "NFKC", "NFKD"):
        assert fold(unicodedata.normalize(form, left + right)) == fold(left + right)


def test_a_match_maps_back_to_the_hidden_spelling() -> None:
    text = "mail  me:\u00a0a\u00adn\u200bn＠ｅxаmple\u0301.org\u200b now"
    folded, offsets = fold_with_offsets(text)
    start = folded.index("ann@example.org")
    assert text[offsets[start] : offsets[start + 15]] == "a\u00adn\u200bn＠ｅxаmple\u0301.org\u200b"
