"""JSON written as constrained decoding can write it."""

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from llguidance import LLMatcher

from tunesmith.core.reading.answer_grammar import matches
from tunesmith.core.reading.strict_json import as_decoded
from tunesmith.engines.protocol import restricted

ANY = LLMatcher.grammar_from_json_schema(restricted({}))
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(-1e9, 1e9) | st.text(max_size=6),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=8,
)
STYLES: list[dict[str, Any]] = [
    {},
    {"indent": 2},
    {"separators": (",", ":")},
    {"indent": 1, "separators": (" ,", " :")},
]


@given(VALUES, st.sampled_from(STYLES), st.booleans())
def test_every_value_keeps_its_meaning_and_can_be_decoded(value: Any, style: dict[str, Any], escaped: bool) -> None:
    text = json.dumps(value, ensure_ascii=escaped, **style)
    spelled = as_decoded(text)
    assert json.loads(spelled) == value
    assert matches(ANY, spelled)
    assert as_decoded(spelled) == spelled


@pytest.mark.parametrize(
    ("text", "spelled"),
    [
        ('{"n": 1.50, "m":1E+3}', '{"n": 1.50, "m":1E+3}'),
        ('{\n "n" : 1.50\n}\n', '{"n": 1.50}'),
        ('{"a": "\\u00e9 \\n"}', '{"a": "\u00e9 \\n"}'),
        ('["\\ud83d\\ude00", "a , b"]', '["\U0001f600", "a , b"]'),
        ("a text : with , marks", "a text : with , marks"),
        ('{"a": 1,  "a": 2}', '{"a": 1,  "a": 2}'),
    ],
)
def test_only_strings_and_white_space_are_written_anew(text: str, spelled: str) -> None:
    assert as_decoded(text) == spelled
