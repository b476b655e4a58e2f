"""Tools through a template: rendered, trained on where the assistant calls, refused where they get lost, read again."""

import json
import pickle
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.tiny import TEMPLATE, learned, row, write_model, write_tokenizer
from tunesmith.candidates.candidate import Candidate
from tunesmith.candidates.composing import compose
from tunesmith.core.errors import Refused, UsageError
from tunesmith.core.messages import Message, ToolCall, tools_of, with_tools
from tunesmith.evaluation.metrics.scorers import exact_match, field_f1
from tunesmith.models.call_format import CallFormat
from tunesmith.models.rendering import Renderer, RowCounter

TOOLS = [
    {
        "type": "function",
        "function": {"name": "weather", "parameters": {"type": "object", "properties": {"city": {"type": "string"}}}},
    }
]
CALLS = (ToolCall(id="a", name="weather", arguments='{"city": "Ålesund"}'),)
TURNS = with_tools(
    (
        Message(role="user", content="weather?"),
        Message(role="assistant", content="", tool_calls=CALLS),
        Message(role="tool", content="4 degrees", tool_call_id="a"),
        Message(role="assistant", content="Cold."),
    ),
    TOOLS,
)

# As the Hermes and Qwen families write tools: signatures first, calls and responses between tags.
HERMES = (
    "{% if tools %}<|im_start|>system\n{% for tool in tools %}{{ tool | tojson }}\n{% endfor %}<|im_end|>\n{% endif %}"
    "{% for m in messages %}{% if m.role == 'tool' %}<|im_start|>user\n<tool_response>{{ m.content }}</tool_response>"
    "<|im_end|>\n{% else %}<|im_start|>{{ m.role }}\n{{ m.content }}{% for call in m.tool_calls or [] %}<tool_call>"
    '{"name": "{{ call.function.name }}", "arguments": {{ call.function.arguments | tojson }}}</tool_call>'
    "{% endfor %}<|im_end|>\n{% endif %}{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# The same with short marks and keys, for answers of few tokens: a tiny tokenizer writes letters.
SHORT_CALLS = (
    HERMES.replace("<tool_call>", "!")
    .replace("</tool_call>", "!")
    .replace('"name"', '"n"')
    .replace('"arguments"', '"a"')
)


@pytest.fixture(scope="module")
def renderer(tmp_path_factory: pytest.TempPathFactory) -> Renderer:
    return Renderer(write_model(tmp_path_factory.mktemp("m"), template=HERMES))


CALL = '<tool_call>{"name": "weather", "arguments": {"city": "Ålesund"}}</tool_call>'


def test_tool_calls_are_trained_but_not_tool_results(renderer: Renderer, tmp_path: Path) -> None:
    assert learned(renderer, TURNS) == f"{CALL}Cold."
    rendered = renderer.conversation(TURNS)
    ends = [marked for token, marked in zip(rendered.ids, rendered.trained, strict=True) if token in renderer.stop_ids]
    assert sum(ends) == 2
    for answer in (1, 3):
        prompt = renderer.prompt(TURNS[:answer])
        assert list(rendered.ids[: len(prompt)]) == prompt
        assert rendered.trained[len(prompt)]
    turns: list[dict[str, Any]] = [{"role": turn.role, "content": turn.content} for turn in TURNS]
    turns[1]["tool_calls"] = [{"function": {"name": "weather", "arguments": {"city": "Ålesund"}}}]
    own = renderer.tokenizer.apply_chat_template(turns, tools=TOOLS, return_dict=True)
    assert list(rendered.ids) == own["input_ids"], "as the tokenizer's own template"
    counter = RowCounter(write_model(tmp_path / "m"), "")
    (tmp_path / "m" / "additional_chat_templates").mkdir()
    (tmp_path / "m" / "additional_chat_templates" / "tool_use.jinja").write_text(HERMES)
    other = Renderer(tmp_path / "m")  # with a template of its own for tools
    assert learned(other, TURNS) == f"{CALL}Cold."
    assert learned(other, row("a", "b")) == "b"
    again = pickle.loads(pickle.dumps(counter))  # noqa: S301
    assert again(TURNS) == counter(TURNS) == len(rendered.ids)


@pytest.mark.parametrize(
    ("template", "lost"),
    [
        (TEMPLATE, "the tool weather"),
        (HERMES.replace("{{ tool | tojson }}", ""), "the tool weather"),
        (HERMES.replace("{{ call.function.name }}", "f"), "the call of weather"),
        (HERMES.replace("{{ call.function.arguments | tojson }}", "{}"), "the arguments of weather"),
        (HERMES.replace("<tool_response>{{ m.content }}", ""), "the result of the tool weather"),
        (HERMES.replace("or []", "and []"), "the call of weather"),
        ("{% for m in messages %}{{ m.role + m.nothing }}{% endfor %}", "refuses this conversation"),
        ("{% if tools %}{{ raise_exception('no tools here') }}{% endif %}" + TEMPLATE, "no tools here"),
    ],
)
def test_a_template_that_loses_tools_is_refused(tmp_path: Path, template: str, lost: str) -> None:
    with pytest.raises(Refused, match=lost):
        Renderer(write_model(tmp_path, template=template)).conversation(TURNS)
    if "m.nothing" not in template:
        assert Renderer(tmp_path).conversation(row("a", "b"))  # rows without tools are none of its business


def test_control_tokens_in_tools_are_refused(renderer: Renderer) -> None:
    for identity, city in (("a", "<|im_end|>"), ("<|im_end|>", "Oslo"), ("a", "\\u003c|im_end|\\u003e")):
        call = ToolCall(id=identity, name="weather", arguments=f'{{"city": "{city}"}}')
        told = TURNS[2].model_copy(update={"tool_call_id": identity})
        asked = (TURNS[0], Message(role="assistant", content="", tool_calls=(call,)), told)
        with pytest.raises(UsageError, match="control token"):
            renderer.prompt(asked)
    offered = TURNS[0].model_copy(update={"tools": json.dumps(TOOLS).replace("city", "\\u003c|im_end|\\u003e")})
    with pytest.raises(UsageError, match="control token"):
        renderer.prompt((offered,))


def test_a_prompt_keeps_only_the_requests_tools() -> None:
    candidate = Candidate(name="c", base="b", prompt="Be brief.", max_tokens=9, shots=(TURNS,))
    composed = compose(candidate, with_tools(row("a", "b")[:1], TOOLS))
    assert composed[0].role == "system"
    assert tools_of(composed) == TOOLS
    assert sum(turn.tools is not None for turn in composed) == 1
    assert tools_of(compose(candidate, row("a", "b")[:1])) == []
    plain = Candidate(name="c", base="b", prompt="", max_tokens=9)
    assert compose(plain, TURNS) == TURNS


# How templates write calls is found by rendering one, and calls are read out of answers so


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


def _renderer(folder: Path, template: str) -> Renderer:
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
    made = _renderer(tmp_path, template)
    assert made.call_format == found
    if not found.exact:
        return
    arguments = ['{"city": "a \\" }</tool_call>]</call> Ålesund", "n": [1, {"b": null}]}', "{}"]
    calls = [ToolCall(id=f"i{n}", name="weather", arguments=each) for n, each in enumerate(arguments)]
    calls = calls if found.between is not None else calls[:1]
    rows = (TURNS[0], Message(role="assistant", content="", tool_calls=tuple(calls)))
    text, read = found.read(learned(made, rows), NAMES)  # what the template writes is read back
    assert text == ""
    assert [(each.name, json.loads(each.arguments)) for each in read] == [
        (each.name, json.loads(each.arguments)) for each in calls
    ]
    assert all(len(each.id) == 9 and each.id.isalnum() for each in read)


def test_a_template_whose_calls_cannot_be_read_is_refused(tmp_path: Path) -> None:
    for template, said in ((TEMPLATE, "does not render tools"), (TAGS, "as a JSON object")):
        with pytest.raises(Refused, match=said) as caught:
            _ = _renderer(tmp_path, template).call_format
        assert caught.value.where == "chat_template"


TAGGED = CallFormat("<call>\n", "\n</call>\n<call>\n", "\n</call>", "name", "arguments", exact=True)
PLAIN = CallFormat("", None, "", "name", "arguments", exact=True)
TIME = '{"name": "time", "arguments": {"at": 1}}'


@pytest.mark.parametrize(
    ("form", "answer", "text", "count"),
    [
        (TAGGED, f"Let me see. \n<call>\n{TIME}\n</call>", "Let me see.", 1),
        (TAGGED, f"<call>{TIME}</call><call>{TIME}</call>\n", "", 2),
        (TAGGED, f"<call>{TIME}", "", 1),  # a stop text or the context's end took the closing tag
        (TAGGED, '<call>{"name": "time", "arguments": "{\\"at\\": 1}"}</call>', "", 1),
        (TAGGED, f"<call>[{TIME}, {TIME}]</call>", "", 2),
        (PLAIN, TIME, "", 1),
        (PLAIN, f" {TIME}; {TIME}", "", 2),
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
        (PLAIN, f"I call {TIME}"),
        (PLAIN, '{"answer": 42}'),
        (PLAIN, ""),
    ],
)
def test_what_is_no_sound_call_of_an_offered_function_stays_text(form: CallFormat, answer: str) -> None:
    assert form.read(answer, NAMES) == (answer, ())


@given(st.text("<cal>/{} x", max_size=30), st.lists(st.integers(1, 5), max_size=9), st.sampled_from([TAGGED, PLAIN]))
def test_a_stream_sends_nothing_that_may_be_a_call(text: str, sizes: list[int], form: CallFormat) -> None:
    """Whatever the pieces: what was sent is the start of the text that the whole answer has."""
    for answer in (text, f"{text}<call>{TIME}</call>"):
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
    found = _renderer(tmp_path, template)
    calls = tuple(ToolCall(id=f"i{n}", name="weather", arguments='{"n":1,"b":"x"}') for n in range(count))
    call = Message(role="assistant", content=said, tool_calls=calls)
    answer = learned(found, (TURNS[0], call), "last")
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
    found = _renderer(tmp_path, HERMES)
    assert found.comparable(TURNS[:1], None, answer) == answer, "without an expected call nothing is read as one"
    read = found.comparable(TURNS[:1], call, answer)
    assert exact_match(read, call.text, None) == score
    assert field_f1(read, call.text, None) == pytest.approx(f1)
