"""Patterns and Lark grammars of whole answers."""

from pathlib import Path

import pytest

from tunesmith.core.errors import UsageError
from tunesmith.core.reading.answer_grammar import check_answer_grammar, load_answer_grammar, matches, pattern_grammar

SELECT = 'start: "SELECT " NAME (", " NAME)* " FROM " NAME\nNAME: /[a-z]+/\n'


@pytest.mark.parametrize(
    ("pattern", "answer", "valid"),
    [
        (r"^[A-Z]{2}-\d+$", "AB-12", True),
        (r"^[A-Z]{2}-\d+$", "xAB-12", False),
        (r"[A-Z]{2}-\d+", "AB-12\n", False),
        (r"[A-Z]{2}-\d+", "AB-", False),
        (r"a/b\/c", "a/b/c", True),
        (r"cost \$", "cost $", True),
        (r"a\\$", "a\\", True),
        ("x|y\nz", "y\nz", True),
        ("x|y\nz", "xz", False),
        ("é+ 北", "éé 北", True),
        ("é+ 北", "e 北", False),
        ("a+", "\ud800", False),
        ("(a+)+b", "a" * 100_000, False),
    ],
)
def test_a_pattern_matches_the_whole_answer(pattern: str, answer: str, valid: bool) -> None:
    assert matches(pattern_grammar(pattern, "task.pattern"), answer) is valid


def test_a_grammar_matches_the_whole_answer(tmp_path: Path) -> None:
    (tmp_path / "sql.lark").write_text(SELECT)
    grammar = load_answer_grammar(tmp_path / "sql.lark")
    assert matches(grammar, "SELECT a, b FROM t")
    with pytest.raises(UsageError, match="does not exist"):
        load_answer_grammar(tmp_path / "none.lark")
    for wrong in ("SELECT a b FROM t", "SELECT a FROM ", "SELECT a FROM t;", ""):
        assert not matches(grammar, wrong)


@pytest.mark.parametrize(
    ("grammar", "said"),
    [
        *((grammar, "not a grammar of answers")
          for grammar in ("", "hello world", "start: foo", 'start: %json {"type": 3}', "start: <|im_end|>")),
        # Decoding would count a model's tokens, and the scorer bytes.
        *((grammar, "model's tokens") for grammar in ("start: name\nname[max_tokens=3]: /[a-z]+/\n",
                                                      'start: "a" <|end|>\n', 'start: "a" <[5]>\n')),
    ],
)  # fmt: skip
def test_grammars_that_cannot_be_used_are_refused(grammar: str, said: str) -> None:
    with pytest.raises(UsageError, match=said):
        check_answer_grammar(grammar, "answers.lark")
    for pattern in ("(", "a(?=b)", r"(a)\1", "a^b"):
        with pytest.raises(UsageError, match="not a grammar of answers") as caught:
            pattern_grammar(pattern, "task.pattern")
        assert caught.value.where == "task.pattern"
    for text in (  # texts and comments may speak of tokens
        'start: "<|end|> max_tokens=3"\n',
        'start: "\\"" /<\\/[|]a> max_tokens=3/ // max_tokens=3, "<|end|>\n',
        'start: %json {"const": "<[5]> max_tokens=1"} # <|end|>\n',
    ):
        check_answer_grammar(text, "answers.lark")
