"""How templates write calls is found by rendering one, and calls are read out of answers so."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.models.test_rendering_tools import HERMES, TOOLS, TURNS
from tests.tiny import TEMPLATE, write_tokenizer
from tunesmith.core.errors import Refused, UsageError
from tunesmith.core.messages import Message, ToolCall, with_tools
from tunesmith.evaluation.metrics.scorers import exact_match, field_f1
from tunesmith.models.call_format import CallFormat
from tunesmith.models.rendering import Renderer

# As Llama 3.2 writes one call and nothing else; as Mistral writes a list; as SmolLM2 writes a list between tags.
ONE_CALL = '{"name": "{{ c.function.name }}", "parameters": {{ c.function.arguments | tojson }}}'
OFFERS = "{% if tools %}{{ tools | tojson }}{% endif %}{% for m in messages %}<|im_start|>{{ m.role }}\n"
ENDS = "{{ m.content }}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
BARE = (
    OFFERS
    + "{% if m.tool_calls %}{% if m.tool_calls | length > 1 %}{{ raise_exception('one call') }}{% endif %}"
    + "{% set c = m.tool_calls[0] %}"
    + ONE_CALL
    + "{% endif %}"
    + ENDS
)
LISTED = (
    OFFERS
    + "{% if m.tool_calls %}<call>[{% for c in m.tool_calls %}"
    + ONE_CALL
    + "{{ ', ' if not loop.last }}{% endfor %}]</call>{% endif %}"
    + ENDS
)
TAGS = (
    OFFERS
    + "{% for c in m.tool_calls or [] %}<f={{ c.function.name }}>{% for k in c.function.arguments %}"
    + ("<p={{ k }}>{{ c.function.arguments[k] }}</p>{% endfor %}</f>{% endfor %}" + ENDS)
)
SPECIAL = HERMES.replace("<tool_call>", "<|im_start|>").replace("</tool_call>", "")


NAMES = {"weather", "time"}


def renderer(folder: Path, template: str) -> Renderer:
    write_tokenizer(folder, template)
    return Renderer(folder)


@pytest.mark.parametrize(
    ("template", "found"),
    [
        (HERMES, CallFormat("<tool_call>", "</tool_call><tool_call>", "</tool_call>", "name", "arguments", exact=True)),
        (BARE, CallFormat("", None, "", "name", "parameters", exact=True)),
        (LISTED, CallFormat("<call>[", ", ", "]</call>", "name", "parameters", exact=True)),
        # Control tokens are no part of an answer's text.
        (SPECIAL, CallFormat("", "", "", "name", "arguments", exact=False)),
    ],
)
def test_a_format_is_found_by_rendering_a_call(tmp_path: Path, template: str, found: CallFormat) -> None:
    made = renderer(tmp_path, template)
    assert made.call_format == found
    if not found.exact:
        return
    arguments = ['{"city": "a \\" }</tool_call>]</call> Ålesund", "n": [1, {"b": null}]}', "{}"]
    calls = [ToolCall(id=f"i{n}", name="weather", arguments=each) for n, each in enumerate(arguments)]
    calls = calls if found.between is not None else calls[:1]
    rows = (TURNS[0], Message(role="assistant", content="", tool_calls=tuple(calls)))
    rendered = made.conversation(rows)
    answer = made.text([token for token, mark in zip(rendered.ids, rendered.trained, strict=True) if mark])
    text, read = found.read(answer, NAMES)  # what the template writes is read back
    assert text == ""
    assert [(each.name, json.loads(each.arguments)) for each in read] == [
        (each.name, json.loads(each.arguments)) for each in calls
    ]
    assert all(len(each.id) == 9 and each.id.isalnum() for each in read)


def test_a_template_whose_calls_cannot_be_read_is_refused(tmp_path: Path) -> None:
    for template, said in ((TEMPLATE, "does not render tools"), (TAGS, "as a JSON object")):
        with pytest.raises(Refused, match=said) as caught:
            _ = renderer(tmp_path, template).call_format
        assert caught.value.where == "chat_template"


TAGGED = CallFormat("<call>\n", "\n</call>\n<call>\n", "\n</call>", "name", "arguments", exact=True)
PLAIN = CallFormat("", None, "", "name", "arguments", exact=True)
CALL = '{"name": "time", "arguments": {"at": 1}}'


@pytest.mark.parametrize(
    ("form", "answer", "text", "count"),
    [
        (TAGGED, f"Let me see. \n<call>\n{CALL}\n</call>", "Let me see.", 1),
        (TAGGED, f"<call>{CALL}</call><call>{CALL}</call>\n", "", 2),
        (TAGGED, f"<call>{CALL}", "", 1),  # a stop text or the context's end took the closing tag
        (TAGGED, '<call>{"name": "time", "arguments": "{\\"at\\": 1}"}</call>', "", 1),
        (TAGGED, f"<call>[{CALL}, {CALL}]</call>", "", 2),
        (PLAIN, CALL, "", 1),
        (PLAIN, f" {CALL}; {CALL}", "", 2),
    ],
)
def test_calls_are_read(form: CallFormat, answer: str, text: str, count: int) -> None:
    said, calls = form.read(answer, NAMES)
    assert (said, [call.name for call in calls]) == (text, ["time"] * count)


@pytest.mark.parametrize(
    ("form", "answer"),
    [
        (TAGGED, "<call>"),
        (TAGGED, '<call>{"name": "time", "arguments": {"at"</call>'),
        (TAGGED, '<call>{"name": "delete_all", "arguments": {}}</call>'),
        (TAGGED, '<call>{"name": ["time"], "arguments": {}}</call>'),
        (TAGGED, '<call>{"name": "time", "arguments": [1]}</call>'),
        (TAGGED, '<call>{"name": "time", "arguments": "x"}</call>'),
        (TAGGED, '<call>{"name": "time", "arguments": {"a": NaN}}</call>'),
        (TAGGED, '<call>{"name": "time", "name": "weather", "arguments": {}}</call>'),
        (TAGGED, "<call>" + "[" * 100_000),
        (TAGGED, "<call>[]</call>"),
        (PLAIN, f"I call {CALL}"),
        (PLAIN, '{"answer": 42}'),
        (PLAIN, ""),
    ],
)
def test_what_is_no_sound_call_of_an_offered_function_stays_text(form: CallFormat, answer: str) -> None:
    assert form.read(answer, NAMES) == (answer, ())


@given(st.text("<cal>/{} x", max_size=30), st.lists(st.integers(1, 5), max_size=9), st.sampled_from([TAGGED, PLAIN]))
def test_a_stream_sends_nothing_that_may_be_a_call(text: str, sizes: list[int], form: CallFormat) -> None:
    """Whatever the pieces: what was sent is the start of the text that the whole answer has."""
    for answer in (text, f"{text}<call>{CALL}</call>"):
        said, _ = form.read(answer, NAMES)
        seen = 0
        for size in (*sizes, len(answer)):
            seen += size
            assert said.startswith(answer[: form.may_begin(answer[:seen])])


QWEN = (  # as the template of Qwen 2.5 writes calls
    OFFERS.removesuffix("\n")
    + r"{{ '\n' + m.content if m.content or not m.tool_calls }}{% for c in m.tool_calls or [] %}"
    + r"""{{ '\n<tool_call>\n{"name": "' + c.function.name + '", "arguments": ' }}{{ c.function.arguments | tojson }}"""
    + r"{{ '}\n</tool_call>' }}{% endfor %}"
    + ENDS.removeprefix("{{ m.content }}")
)


@pytest.mark.parametrize(
    ("template", "said", "count"),
    [
        *((template, "", 2) for template in (QWEN, HERMES, LISTED, TAGS, SPECIAL)),
        *((template, "I look.", 1) for template in (QWEN, BARE, TAGS, SPECIAL)),
        (BARE, "", 1),
    ],
)
def test_what_training_teaches_is_right(tmp_path: Path, template: str, said: str, count: int) -> None:
    """Whether or not the template writes calls as JSON."""
    found = renderer(tmp_path, template)
    calls = tuple(ToolCall(id=f"i{n}", name="weather", arguments='{"n":1,"b":"x"}') for n in range(count))
    call = Message(role="assistant", content=said, tool_calls=calls)
    row = found.conversation((TURNS[0], call), "last")
    answer = found.text([token for token, label in zip(row.ids, row.trained, strict=True) if label])
    assert exact_match(found.comparable(TURNS[:1], call, answer), call.text, None) == 1.0
    assert exact_match(found.comparable(TURNS[:1], call, answer.replace("x", "y")), call.text, None) == 0.0


RIGHT = '{"arguments":{"b": "x",  "n": 1.0}, "name":"weather"}'


@pytest.mark.parametrize(
    ("answer", "score", "f1"),
    [
        (f"<tool_call>\n{RIGHT}\n</tool_call>", 1.0, 1.0),
        (f"<tool_call>{RIGHT}", 1.0, 1.0),  # a stop text took the closing tag
        (f"<tool_call>{RIGHT.replace('weather', 'time')}</tool_call>", 0.0, 2 / 3),
        (f"<tool_call>{RIGHT}</tool_call><tool_call>{RIGHT}</tool_call>", 0.0, 0.0),
        (f"I look. <tool_call>{RIGHT}</tool_call>", 0.0, 0.0),
        (f"<tool_call>{RIGHT}</tool_call> Done.", 0.0, 0.0),
        (f"<tool_call>{RIGHT[:-1]}</tool_call>", 0.0, 0.0),
        ("", 0.0, 0.0),
    ],
)
def test_calls_are_compared_as_json(tmp_path: Path, answer: str, score: float, f1: float) -> None:
    arguments = ToolCall(id="i", name="weather", arguments='{"n":1,"b":"x"}')
    call = Message(role="assistant", content="", tool_calls=(arguments,))
    found = renderer(tmp_path, HERMES)
    assert found.comparable(TURNS[:1], None, answer) == answer, "without an expected call nothing is read as one"
    read = found.comparable(TURNS[:1], call, answer)
    assert exact_match(read, call.text, None) == score
    assert field_f1(read, call.text, None) == pytest.approx(f1)


def test_escapes_hide_no_control_token(tmp_path: Path) -> None:
    found = renderer(tmp_path, HERMES)
    hidden = ToolCall(id="a", name="weather", arguments='{"city": "\\u003c|im_end|\\u003e"}')
    turn = Message(role="assistant", content="", tool_calls=(hidden,))
    tools = json.dumps(TOOLS).replace("city", "\\u003c|im_end|\\u003e")
    for turns in (
        (TURNS[0], turn, Message(role="tool", content="x", tool_call_id="a")),
        (TURNS[0].model_copy(update={"tools": tools}),),
    ):
        with pytest.raises(UsageError, match="control token"):
            found.prompt(turns)
    assert found.prompt(with_tools(TURNS[:1], TOOLS))
