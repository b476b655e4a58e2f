"""Rendering with tools: through the template, trained on where the assistant calls, refused where they get lost."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import pytest

from tests.tiny import TEMPLATE, row, write_model
from tunesmith.candidates.candidate import Candidate
from tunesmith.candidates.composing import compose
from tunesmith.core.errors import Refused, UsageError
from tunesmith.core.messages import Message, ToolCall, tools_of, with_tools
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


def trained(renderer: Renderer, turns: tuple[Message, ...]) -> str:
    rendered = renderer.conversation(turns)
    return renderer.text([token for token, marked in zip(rendered.ids, rendered.trained, strict=True) if marked])


CALL = '<tool_call>{"name": "weather", "arguments": {"city": "Ålesund"}}</tool_call>'


def test_tool_calls_are_trained_but_not_tool_results(renderer: Renderer, tmp_path: Path) -> None:
    assert trained(renderer, TURNS) == f"{CALL}Cold."
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
    assert trained(other, TURNS) == f"{CALL}Cold."
    assert trained(other, row("a", "b")) == "b"
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
    for identity, city in (("a", "<|im_end|>"), ("<|im_end|>", "Oslo")):
        call = ToolCall(id=identity, name="weather", arguments=f'{{"city": "{city}"}}')
        told = TURNS[2].model_copy(update={"tool_call_id": identity})
        asked = (TURNS[0], Message(role="assistant", content="", tool_calls=(call,)), told)
        with pytest.raises(UsageError, match="contains the control"):
            renderer.prompt(asked)


def test_a_prompt_keeps_only_the_requests_tools() -> None:
    candidate = Candidate(name="c", base="b", prompt="Be brief.", max_tokens=9, shots=(TURNS,))
    composed = compose(candidate, with_tools(row("a", "b")[:1], TOOLS))
    assert composed[0].role == "system"
    assert tools_of(composed) == TOOLS
    assert sum(turn.tools is not None for turn in composed) == 1
    assert tools_of(compose(candidate, row("a", "b")[:1])) == []
    plain = Candidate(name="c", base="b", prompt="", max_tokens=9)
    assert compose(plain, TURNS) == TURNS
