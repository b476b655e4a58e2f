"""Keys of JSON answers in the order of the request."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tunesmith.core.messages import Message
from tunesmith.data.formats.key_order import in_request_order


def _ordered(request: str, answer: str) -> str:
    turns = (Message(role="user", content=request), Message(role="assistant", content=answer))
    return in_request_order(turns)[-1].content


@pytest.mark.parametrize(
    ("request_text", "answer", "ordered"),
    [
        ("at 7pm in Rome", '{"city": "Rome", "time": "7pm"}', '{"time": "7pm", "city": "Rome"}'),
        # What the request does not mention keeps its place.
        (
            "at 7pm in Rome",
            '{"intent": "book", "city": "Rome", "new": true, "time": "7pm"}',
            '{"intent": "book", "time": "7pm", "new": true, "city": "Rome"}',
        ),
        # Objects in lists and objects; the first of several values; numbers; letter case.
        ("for 4 at the Heron", '{"a": {"name": "The heron", "n": 4}}', '{"a": {"n": 4, "name": "The heron"}}'),
        ("b then a", '{"l": [{"x": "a", "y": "b"}]}', '{"l": [{"y": "b", "x": "a"}]}'),
        ("one two", '{"x": ["two"], "y": ["three", "one"]}', '{"y": ["three", "one"], "x": ["two"]}'),
        # Whole words only: "art" is not mentioned by "start".
        ("start with jazz, then art", '{"a": "jazz", "b": "art"}', '{"a": "jazz", "b": "art"}'),
        # Written as the rows write it.
        ("ä b", '{"x":"b","y":"ä"}', '{"y":"ä","x":"b"}'),
        ("a b", '{\n  "x": "b",\n  "y": "a"\n}', '{\n  "y": "a",\n  "x": "b"\n}'),
        ("a b", '{ "x" :"b", "y": "a"}', '{ "x" :"b", "y": "a"}'),
        # Not an object.
        ("a b", '{"x": "b", "x": "a"}', '{"x": "b", "x": "a"}'),
        ("a b", "", ""),
    ],
)
def test_keys_come_in_the_order_of_the_request(request_text: str, answer: str, ordered: str) -> None:
    assert _ordered(request_text, answer) == ordered


def test_an_answer_follows_the_user_turns_before_it() -> None:
    answer = '{"x": "b", "y": "a"}'
    turns = [("system", "b"), ("user", "a"), ("assistant", answer), ("user", "b a"), ("assistant", answer)]
    found = in_request_order([Message.model_validate({"role": role, "content": text}) for role, text in turns])
    assert [one.content for one in found if one.role == "assistant"] == ['{"x": "b", "y": "a"}', '{"y": "a", "x": "b"}']


_JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-99, 99) | st.sampled_from(["a", "b", "c d", ""]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from("uvwxyz"), inner, max_size=5),
    max_leaves=12,
)


@given(st.permutations(["a", "b", "c d", "1"]), st.dictionaries(st.sampled_from("uvwxyz"), _JSON, max_size=5))
def test_the_value_stays_the_same_and_a_second_time_changes_nothing(words: list[str], value: dict[str, Any]) -> None:
    request = " ".join(words)
    once = _ordered(request, json.dumps(value))
    assert json.loads(once) == value
    assert _ordered(request, once) == once
