"""Four shapes of rows to one; what is an error, and what is left out with a reason."""

import json
from collections import Counter
from datetime import date
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.data.rows import turns
from tunesmith.core.errors import UsageError
from tunesmith.core.messages import Message, tools_of
from tunesmith.data.formats import openai_rules, row_formats
from tunesmith.data.formats import turns as turn_checks
from tunesmith.data.formats.key_order import in_request_order
from tunesmith.data.formats.openai_rules import InvalidExamples, check_examples
from tunesmith.data.formats.row_readers import SourceRow
from tunesmith.data.settings import Rows


def conversation(
    fields: dict[str, Any], name: str = "auto", ignored: Counter[str] | None = None
) -> tuple[Message, ...]:
    row = SourceRow("a.jsonl", 3, fields)
    found = row_formats.read_turns(row, row_formats.format_of(name, row), Counter() if ignored is None else ignored)
    reason = turn_checks.objection(found)
    assert reason is None, reason
    return turn_checks.conversation(found)


def reason(messages: list[dict[str, Any]], **more: Any) -> str | None:
    row = SourceRow("a.jsonl", 3, {"messages": messages, **more})
    return turn_checks.objection(row_formats.read_turns(row, row_formats.FORMATS["messages"], Counter()))


def error(fields: dict[str, Any], name: str = "auto") -> UsageError:
    with pytest.raises(UsageError) as caught:
        conversation(fields, name)
    assert caught.value.where.startswith("a.jsonl, row 3")
    return caught.value


SAME = (
    Message(role="system", content="be brief"),
    Message(role="user", content="hi"),
    Message(role="assistant", content="yo"),
)


BRIEF = {"role": "system", "content": "be brief"}
IN_PARTS = {"role": "user", "content": [{"type": "text", "text": "h"}, {"type": "text", "text": "i"}]}
SPOKEN = [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "yo"}]


@pytest.mark.parametrize(
    "fields",
    [
        {"messages": turns("hi", "yo", system="be brief")},
        {"messages": [{**BRIEF, "role": "developer"}, *turns("hi", "yo")]},
        {"messages": [BRIEF, IN_PARTS, {"role": "assistant", "content": "yo"}]},
        {"prompt": "hi", "completion": "yo", "system": "be brief"},
        {"instruction": "hi", "output": "yo", "system": "be brief"},
        {"conversations": [{"from": "system", "value": "be brief"}, *SPOKEN]},
        {"conversations": SPOKEN, "system": "be brief"},
    ],
)
def test_every_shape_is_detected_and_says_the_same(fields: dict[str, Any]) -> None:
    assert conversation(fields) == SAME


def test_keys_that_tell_nothing_or_two_things() -> None:
    assert conversation({"instruction": "a", "input": "b", "output": "c"})[0].content == "a\n\nb"
    assert "fits no known format" in error({"text": "hello", "label": "greeting"}).what
    assert "looks like prompt-completion" in error({"prompt": "a", "completion": "b"}, "messages").what
    both = {"messages": turns("a", "b"), "prompt": "x", "completion": "y"}
    assert "several formats" in error(both).what
    with pytest.raises(ValueError, match="Input should be 'auto', 'messages'"):
        Rows(path="a.jsonl", format="alpaka")
    assert Rows.model_json_schema()["properties"]["format"]["enum"] == [row_formats.AUTO, *row_formats.FORMATS]
    assert conversation(both, "messages")[0].content == "a"
    assert row_formats.format_evidence("alpaca", told=False).startswith("every row has instruction and output")
    for name, preferences in (
        ("openai", {"input": {"messages": []}, "preferred_output": [], "non_preferred_output": []}),
        ("messages", {"prompt": "a", "chosen": "b", "rejected": "c"}),
        ("auto", {"prompt": "a", "completion": "b", "label": False}),
    ):
        assert "preferences" in error(preferences, name).what


@pytest.mark.parametrize(
    ("fields", "renames"),
    [
        ({"question": "a", "answer": "b"}, {"question": "prompt", "answer": "completion"}),
        ({"Prompt ": "a", "Completion": "b"}, {"Prompt ": "prompt", "Completion": "completion"}),
        ({"instruction": "a", "input": "b", "response": "c"}, {"response": "output"}),
        ({"id": "a", "chat": [{"role": "user", "content": "hi"}]}, {"chat": "messages"}),
    ],
)
def test_an_unknown_format_names_the_renames_that_would_do(fields: dict[str, Any], renames: dict[str, str]) -> None:
    assert f", here {renames} (" in str(error(fields).fix)


IMAGE = {"type": "image_url", "image_url": {"url": "b"}}


@pytest.mark.parametrize(
    ("fields", "what", "fix"),
    [
        ({"prompt": "a", "meta": "b"}, "the row has prompt and no completion", "null counts as absent"),
        ({"messages": [{"role": "user", "content": [{"type": "text", "text": "a"}, IMAGE]}]},
         "a part is of the type image_url, not text", ""),
        ({"prompt": turns("a"), "completion": turns("b")}, "", "messages"),
        ({"conversations": [{"role": "user", "content": "hi"}]}, "", "rename conversations to messages"),
        ({"prompt": "a", "completion": "b", "instruction": "c", "output": "d"}, "prompt-completion or alpaca",
         "{'instruction': 'unused'"),
        ({"prompt": {"a": 1}, "completion": "b"}, "", "as text"),
        ({"messages": json.dumps(turns("a", "b"))}, "", "as JSONL"),
        ({"text": "Q: a A: b"}, "", "the request under prompt"),
        *(({"prompt": "a", "completion": value}, "not text", "as text")
          for value in (float("nan"), float("inf"), {"a": float("nan")}, {"a": date(2024, 5, 1)})),
    ],
)  # fmt: skip
def test_errors_of_common_shapes_say_what_to_do(fields: dict[str, Any], what: str, fix: str) -> None:
    found = error(fields)
    assert what in found.what
    assert fix in str(found.fix)


@pytest.mark.parametrize(
    "value",
    [2, 0, 1.5, True, False, {"a": None, "b": {"c": [1.5, "\u00e9"]}}, [], ["a"], [{"from": "Bonn", "to": "Ulm"}]],
)
def test_a_label_or_an_object_that_is_no_text_is_an_answer_in_json(value: object) -> None:
    said = ["a", json.dumps(value, ensure_ascii=False)]
    assert [turn.content for turn in conversation({"prompt": "a", "completion": value})] == said
    assert [turn.content for turn in conversation({"instruction": "a", "output": value})] == said


def test_null_stands_for_a_key_that_is_not_there() -> None:
    talk = [{"from": "human", "value": "hi", "weight": None}, {"from": "gpt", "value": "yo", "weight": None}]
    assert [turn.content for turn in conversation({"conversations": talk})] == ["hi", "yo"]
    call = {"id": None, "type": None, "function": {"name": "f", "arguments": None}}
    said = {"role": "assistant", "content": None, "tool_calls": [call], "function_call": None, "weight": None}
    told = {"role": "tool", "content": "x", "tool_call_id": None, "name": None}
    ended = {"role": "assistant", "content": "yo", "tool_calls": None, "refusal": None}
    tools = [{"type": None, "function": {"name": "f", "description": None, "parameters": None}}]
    ignored: Counter[str] = Counter()
    found = conversation({"messages": [*turns("hi"), said, told, ended], "tools": tools}, ignored=ignored)
    assert found[1].tool_calls[0].arguments == "{}"
    assert tools_of(found) == [{"type": "function", "function": {"name": "f"}}]
    assert not ignored
    more = {"tools": None, "functions": None, "parallel_tool_calls": None}
    assert conversation({"messages": [*turns("hi", "yo"), *turns("so", "no")], **more}, "openai")[-1].content == "no"
    conversation({"messages": [{**turns("hi")[0], "name": "bob"}, turns("x", "yo")[1]]}, ignored=ignored)
    assert ignored == {"messages[].name": 1}


@pytest.mark.parametrize(
    ("fields", "place"),
    [
        ({"prompt": 3, "completion": "x"}, "prompt"),
        ({"prompt": "nul\0", "completion": "x"}, "prompt"),
        ({"messages": ["text"]}, "messages[0]"),
        ({"messages": [{"role": "robot", "content": "x"}]}, "messages[0].role"),
        ({"messages": [{"role": "user", "content": 3}]}, "messages[0].content"),
        ({"messages": [{"role": "user", "content": "lone \udc00"}]}, "messages[0].content"),
        ({"messages": [{"role": "assistant", "content": "x", "weight": 0.5}]}, "messages[0].weight"),
        ({"conversations": [{"from": "human"}]}, "conversations[0]"),
    ],
)
def test_wrong_types_name_row_and_key(fields: dict[str, Any], place: str) -> None:
    assert error(fields).where.endswith(place)


@pytest.mark.parametrize(
    ("messages", "expected"),
    [
        ([], turn_checks.NO_ANSWER),
        (turns("hi"), turn_checks.NO_ANSWER),
        (turns("hi", ""), turn_checks.EMPTY_ANSWER),
        ([*turns("hi"), {"role": "assistant", "content": None}], turn_checks.EMPTY_ANSWER),
        (turns("", "yo"), turn_checks.EMPTY_REQUEST),
        (turns(system="a") + turns("hi", "yo", system="b"), turn_checks.SYSTEM_TURNS),
        (turns("hi") + turns(system="late") + turns("x", "yo")[1:], turn_checks.SYSTEM_TURNS),
        (turns("hi", "yo")[::-1] + turns("hi", "yo")[1:], turn_checks.OUT_OF_ORDER),
        (turns("hi") + turns("hi", "yo"), turn_checks.OUT_OF_ORDER),
        ([*turns("hi"), {"role": "tool", "content": "42"}, *turns("x", "yo")[1:]], turn_checks.UNANSWERED),
        ([*turns("hi"), {"role": "assistant", "content": "yo", "weight": 0}], turn_checks.NOT_TO_LEARN),
        ([*turns("hi"), {"role": "assistant", "content": "yo", "weight": 1}], None),
    ],
)
def test_conversations_that_cannot_be_learned_from(messages: list[dict[str, Any]], expected: str | None) -> None:
    assert reason(messages) == expected


# Keys of JSON answers in the order of the request


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
        # Not an object.
        ("a b", '{"x": "b", "x": "a"}', '{"x": "b", "x": "a"}'),
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


# Files of examples that OpenAI refuses are refused in its words


GOOD: dict[str, Any] = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}
READ = row_formats.FORMATS[row_formats.OPENAI].read
EXPECTED = "Expected file to have JSONL format"


def written(folder: Path, *lines: object) -> Path:
    path = folder / "rows.jsonl"
    path.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines))
    return path


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ('{"a": NaN}', f"{EXPECTED}, where every line is a valid JSON dictionary. Line 2: "),
        ([1], f"{EXPECTED}, where every line is a valid JSON dictionary. Line 2 is not a dictionary."),
        ({"prompt": "a", "completion": "b"}, f"{EXPECTED} with messages key. Missing 'messages' key on line 2."),
        ({"messages": []}, "Invalid file format. Line 2, messages: messages must be a list of at least one message."),
        *(
            (
                {"messages": [{"role": "user", "content": content}, {"role": "assistant", "content": "b"}]},
                f"Invalid file format. Line 2, messages[0].content: content is a {kind}, not text or text parts.",
            )
            for content, kind in ((5, "int"), (True, "bool"), (1.5, "float"), ({"a": 1}, "dict"), ([1], "list"))
        ),
    ],
)
def test_the_first_broken_line_is_named(tmp_path: Path, line: object, said: str) -> None:
    with pytest.raises(InvalidExamples) as found:
        check_examples(written(tmp_path, GOOD, line, *[GOOD] * 10), READ)
    assert said in found.value.what
    assert found.value.code == "invalid_file_format"


def test_good_files_and_too_few_examples(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []
    monkeypatch.setattr(openai_rules, "_REPORTED", 5)
    path = written(tmp_path, *[GOOD] * 10, "", {**GOOD, "tools": []})
    assert check_examples(path, READ, on_lines=seen.append) == 11
    assert seen == [5, 5]
    assert check_examples(written(tmp_path, GOOD), READ, training=False) == 1
    for rows, training in ((9, True), (0, False)):
        with pytest.raises(InvalidExamples) as found:
            check_examples(written(tmp_path, *[GOOD] * rows), READ, training=training)
        assert found.value.code == "invalid_n_examples"
        assert ("has 9 example(s)" in found.value.what) is training
