"""Folded texts: what is equal after folding, and the places that folded characters come from."""

import unicodedata

import pytest
from confusable_homoglyphs.confusables import confusables_data
from hypothesis import example, given, settings
from hypothesis import strategies as st

from tunesmith.core.text.folding import fold, fold_with_offsets, plain, plain_with_offsets, visible

TAGS = tuple(
    "".join(chr(0xE0000 + ord(letter)) for letter in f"{name}\x7f") for name in ("gbeng", "gbsct", "gbwls", "x")
)
_ANY = (
    st.text(st.characters(codec=None, categories=None), max_size=12)
    | st.text(
        st.sampled_from(
            "aAéßıİ\u0345\u0301\u0338\u0307=≠ 1٣\u200b\u200d\u00ad\ufe0f\u115f가\u1100\u1161\u11a8かガ\u3099\u05d0"
            "\u05b8\u0e01\u0e48\u0928\u093fаΣςᾳꭰ\u2800\u3000\n\x00\x1c\u0600\U000e0041\ud800ﬁ²ª₂½㎠™"
        ),
        max_size=8,
    )
    | st.lists(
        st.sampled_from(("\U0001f3f4", *(f"\U0001f3f4{tags}" for tags in TAGS), *TAGS, "a", "\u200b")), max_size=4
    ).map("".join)
)


@settings(max_examples=200)
@given(_ANY)
@example("\u2019")
def test_folding_twice_changes_nothing_and_offsets_point_into_the_text(text: str) -> None:
    assert fold(fold(text)) == fold(text)
    assert visible(visible(text)) == visible(text)
    assert fold(visible(text)) == fold(text)
    folded, offsets = fold_with_offsets(text)
    assert folded == fold(text)
    assert len(offsets) == len(folded) + 1
    assert offsets[-1] == len(text)
    assert list(offsets) == sorted(offsets)


@settings(max_examples=200)
@given(_ANY, _ANY)
@example("\u0368\u06e0\u05c1", "")  # a mark that stands for a letter, and marks that are put in order
@example("\u1125\u0309\u1de1", "\U000111ca")
def test_canonically_equal_texts_are_folded_alike(left: str, right: str) -> None:
    for form in ("NFC", "NFD", "NFKC", "NFKD"):
        assert fold(unicodedata.normalize(form, left + right)) == fold(left + right)


def test_languages_keep_their_words_and_look_alikes_are_folded() -> None:
    kept = ["เสือ เสื้อ", "कि की", "كَتَبَ كُتُب", "סֵפֶר סַפָּר", "불 뿔", "かき がき", "ー 一"]
    for left, right in map(str.split, kept):
        assert fold(left) != fold(right)
        assert fold(unicodedata.normalize("NFD", left)) == fold(left) == visible(left)
    alike = ["má mà", "sınır sinir", "İstanbul istanbul", "Straße STRASSE", "đường duong", "łódź Lodz", "pêché peche"]
    for left, right in map(str.split, alike):
        assert fold(left) == fold(right)
    text = "mail  me:\u00a0a\u00adn\u200bn＠ｅxаmple\u0301.org\u200b now"
    folded, offsets = fold_with_offsets(text)
    start = folded.index("ann@example.org")
    assert text[offsets[start] : offsets[start + 15]] == "a\u00adn\u200bn＠ｅxаmple\u0301.org\u200b"
    pairs = passed = 0  # of all look-alikes of Latin letters that Unicode lists
    for name, others in confusables_data.items():
        letter, *found = (one.replace("\u200e", "") for one in (name, *(other["c"] for other in others)))
        latin = [one for one in found if len(one) == 1 and one.isascii() and one.isalpha()]
        if len(letter) == 1 and not letter.isascii() and latin:
            pairs += 1
            passed += fold(letter) != fold(latin[0])
    assert (pairs, passed) == (1260, 230)


@pytest.mark.parametrize(
    ("left", "right"),
    [
        ("What is 2⁵?", "What is 25?"),
        ("5 m²", "5 m2"),
        ("5 ㎠", "5 cm2"),
        ("H₂O", "H2O"),
        ("1½ cups", "11⁄2 cups"),
        ("10⁻³", "10−3"),
        (f"\U0001f3f4{TAGS[0]}", f"\U0001f3f4{TAGS[1]}"),
        (f"\U0001f3f4{TAGS[2]}", "\U0001f3f4"),
    ],
)
def test_what_a_reader_tells_apart_stays_apart(left: str, right: str) -> None:
    assert visible(left) != visible(right)
    assert fold(left) == fold(right)
    assert visible(f"\U0001f3f4{TAGS[3]} a{TAGS[0]}") == "\U0001f3f4 a", "tags that choose no flag"


@pytest.mark.parametrize(
    ("text", "spelled"),
    [
        ("j\u0430ne\u200b ПРИВЕТ мир", "jane ПРИВЕТ мир"),  # a Cyrillic а; words in another script stay
        ("А1 ᴀb ｗｉｄｅ 𝐛𝐨𝐥𝐝 ﬁ…", "A1 ab wide bold fi..."),
        ("Müller, straße 5 m² ½ cafe\u0301", "Müller, straße 5 m² ½ cafe"),
        ("٣ ৪ a\u00a0b\tc\u2028d 1914–18", "3 4 a b\tc d 1914-18"),
        ("数据集 is 3。❤️", "数据集 is 3。❤"),
    ],
)
def test_plain_texts_keep_case_and_words(text: str, spelled: str) -> None:
    assert plain(text) == spelled


@given(_ANY)
def test_places_of_plain_characters(text: str) -> None:
    spelled, places = plain_with_offsets(text)
    assert spelled == plain(text)
    assert len(places) == len(spelled)
    assert list(places) == sorted(places)
    assert all(0 <= place < len(text) for place in places)
    assert all(text[place] == letter for place, letter in zip(places, spelled, strict=True) if text.isascii())
