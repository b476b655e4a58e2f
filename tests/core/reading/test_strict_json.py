"""JSON that the readers of the world disagree about is refused, quickly, with the place."""

import contextlib
import json
import sys
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tunesmith.core.reading.strict_json import DEEPEST, NotJson, parse_json


@pytest.mark.attack("input", "JSON that readers disagree about, or that hangs one", "refused")
@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('{"a":1,"a":2}', "the key 'a' appears twice"),
        ("NaN", "NaN is not JSON"),
        ("1e999", "too large"),
        ("9" * 200_000, "too large"),
        (r'"\ud800"', "surrogate"),
        (r'{"\udc00":1}', "surrogate"),
        ('"\ud800"', "surrogate"),
        ("[" * 65 + "]" * 65, "64 levels"),
        ('"' + r"\"" * 500_000 + "[" * 100, "Unterminated"),
        ("[" * 70 + '"' + r"\"" * 500_000, "64 levels"),
        ("{" + ",".join(f'"{n}":1' for n in range(100_000)) + ',"99999":1}', "'99999' appears twice"),
        ("", "Expecting value"),
        ("{} {}", "Extra data: line 1, column 4"),
        ("\ufeff1", "value"),
        ('"\t"', "control character"),
        (b"\xff", "not UTF-8 at byte 1"),
        (b'"\xed\xa0\x80"', "not UTF-8"),
    ],
)
def test_refused(text: str | bytes, said: str) -> None:
    with pytest.raises(NotJson) as caught:
        parse_json(text)
    assert said in str(caught.value)
    assert len(str(caught.value)) < 300


def test_brackets_inside_texts_are_not_depth() -> None:
    assert parse_json(json.dumps(["[" * 1000, '"{' * 1000, "\\" * 99])) == ["[" * 1000, '"{' * 1000, "\\" * 99]
    assert parse_json("[" * DEEPEST + "]" * DEEPEST)
    assert parse_json(json.dumps([[{}] * 50] * 50)) == [[{}] * 50] * 50


def test_in_a_deep_stack_a_value_is_whole_or_refused() -> None:
    nested = "[" * 60 + "]" * 60

    def at(depth: int) -> Any:
        return at(depth - 1) if depth else parse_json(nested)

    whole = 0
    for depth in range(0, sys.getrecursionlimit(), 20):
        with contextlib.suppress(NotJson, RecursionError):
            assert json.dumps(at(depth)) == nested
            whole += 1
    assert whole > 10


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(st.characters(exclude_categories=["Cs"])),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(st.characters(exclude_categories=["Cs"])), inner),
    max_leaves=10,
)  # fmt: skip


@given(JSON, st.booleans())
def test_every_json_value_is_read_as_it_was_written(value: Any, plain: bool) -> None:
    assert parse_json(json.dumps(value, ensure_ascii=plain)) == value
    assert parse_json(json.dumps(value, ensure_ascii=plain).encode()) == value


@given(st.text('[]{}",:\\ud8019.eE-+NaInfity tru') | st.binary(max_size=40))
def test_any_text_is_a_value_or_an_error_of_ours(text: str | bytes) -> None:
    with contextlib.suppress(NotJson):
        json.dumps(parse_json(text), ensure_ascii=False, allow_nan=False).encode()
