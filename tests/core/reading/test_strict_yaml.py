"""YAML that explodes, deceives or crashes a reader is refused with its line."""

import contextlib
import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tunesmith.core.errors import UsageError
from tunesmith.core.reading.strict_yaml import read_yaml

LAUGHS = "\n".join(
    ["a: &a [x,x,x,x,x,x,x,x,x,x]"]
    + [f"{chr(98 + n)}: &{chr(98 + n)} [{','.join(['*' + chr(97 + n)] * 10)}]" for n in range(9)]
)


@pytest.mark.attack("settings", "YAML that explodes, deceives or crashes a reader", "refused with its line, exit 2")
@pytest.mark.parametrize(
    ("text", "said", "line"),
    [
        ("a: 1\nb: " + "[" * 50_000, "64 levels", 2),
        ("- " * 5_000 + "x", "64 levels", 1),
        ("\n".join(f"{' ' * n}a:" for n in range(1_000)), "64 levels", 64),
        ("a: 1\nb: " + "9" * 200_000, "too many digits", 2),
        ("a: .nan", "not finite", 1),
        ("a: 1.0e+999", "not finite", 1),
        (LAUGHS, "100,000 values", 5),
        ("a: &a [*a]", "inside its own value", 1),
        ("a: *b", "undefined alias", 1),
        ("b: 1\na: 1\na: 2", "'a' occurs twice", 3),
        ("b: &b {x: 1}\na:\n  <<: *b", "merge keys", 3),
        ("? [a]\n: b", "not text", 1),
        ("a: !!python/object/apply:os.system ['true']", "the tag", 1),
        ("a: 1\nb: \0", "U+0000", 2),
        ('a: "\\0"', "NUL", 1),
        ('a: "\\ud800"', "surrogate", 1),
        ("a: 1\n---\nb: 2", "another document", 2),
        ("a: [1\n", "expected", 2),
        ("%YAML 9.9\n---\na: 1", "incompatible", 1),
        ("&a" * 10_000, "expected", 1),
    ],
)
def test_refused(text: str, said: str, line: int) -> None:
    with pytest.raises(UsageError) as caught:
        read_yaml(text, "tunesmith.yaml")
    assert said in caught.value.what
    assert len(caught.value.what) < 400
    assert caught.value.where == f"tunesmith.yaml, line {line}"


@pytest.mark.parametrize(
    ("text", "value"),
    [
        (
            "a: 2024-01-01\nb: 2024-99-99\nc: 12:30\nd: =",
            {"a": "2024-01-01", "b": "2024-99-99", "c": "12:30", "d": "="},
        ),
        ("a: &x {b: 1}\nc: [*x, *x]", {"a": {"b": 1}, "c": [{"b": 1}, {"b": 1}]}),
        ("a: [1, -2, 0x10, 1.5, true, ~, text]", {"a": [1, -2, 16, 1.5, True, None, "text"]}),
        ("\ufeffa: 1", {"a": 1}),
        ("", None),
    ],
)
def test_read(text: str, value: Any) -> None:
    assert read_yaml(text, "f") == value


@given(st.text("&*[]{}:?-!<>|\"'#%@,. \n\tab019~"))
def test_any_text_is_a_value_or_an_error_of_ours(text: str) -> None:
    with contextlib.suppress(UsageError):
        json.dumps(read_yaml(text, "f"), allow_nan=False)
