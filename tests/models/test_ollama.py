"""Modelfiles for Ollama: their prompts are ours for every kind of request, and what cannot be so is refused by name."""

from functools import partial
from pathlib import Path

import pytest
from jinja2 import UndefinedError

from tests.ollama_reader import read_modelfile, render
from tests.tiny import HYBRID, TEMPLATE, write_tokenizer
from tunesmith.candidates.candidate import Candidate
from tunesmith.candidates.composing import compose
from tunesmith.core.errors import Refused, UsageError
from tunesmith.core.messages import Message, Turns
from tunesmith.models.export.ollama import KEEPS_SPACES, modelfile
from tunesmith.models.rendering import Renderer

NO_SYSTEM = (
    "{% for m in messages if m.role == 'system' %}{{ raise_exception('no system turn') }}{% endfor %}" + TEMPLATE
)
DEFAULT = "{% if messages[0].role != 'system' %}<|im_start|>system\nYou {are\"<|im_end|>\n{% endif %}" + TEMPLATE
CONTENT = "message['content']"
# What would end a Modelfile's text or an action of Go's, start another line, or be dropped as not printable.
BREAKS_OUT = 'Say """\nPARAMETER stop "a"\n{{ .Content }} {"""{{-\u200d\t\r\n\u00a0 -}} `\\" {'


def said(role: str, text: str) -> Message:
    return Message.model_validate({"role": role, "content": text})


SHOTS = ((said("user", "{"), said("assistant", BREAKS_OUT)),)


def requests() -> list[Turns]:
    turns = (
        said("user", 'a "b" {{ .System }}'),
        said("assistant", "c\n"),
        said("user", "dé"),
        said("assistant", '"""'),
    )
    alone = [turns[:1], turns[:3], (*turns, said("user", "e"))]
    return [*alone, *((said("system", "f {{\ng"), *each) for each in alone)]


def made(
    folder: Path, template: str, held_out: list[Turns], **candidate: object
) -> tuple[str, tuple[str, ...], object]:
    """The Modelfile, its notes, and a function that gives the prompt of a request as we write it."""
    write_tokenizer(folder, template)
    renderer, ours = Renderer(folder), Candidate.model_validate(dict(name="c", base="b", max_tokens=8, **candidate))
    text, notes = modelfile(renderer, partial(compose, ours), held_out, context_length=1024, max_tokens=8)
    return text, notes, lambda request: renderer.prompt_text(compose(ours, request))


@pytest.mark.parametrize(
    ("template", "candidate"),
    [(template, {"prompt": prompt, "shots": shots})
     for template in (TEMPLATE, HYBRID, DEFAULT, TEMPLATE.replace(CONTENT, f"{CONTENT} | trim"), NO_SYSTEM)
     for prompt, shots in (("", ()), (BREAKS_OUT, SHOTS), ("", SHOTS)) if template != NO_SYSTEM or not prompt],
)  # fmt: skip
def test_prompts_are_ours(template: str, candidate: dict[str, object], tmp_path: Path) -> None:
    asked = requests()
    if "trim" in template:  # the note is about these spaces
        asked = [tuple(said(turn.role, turn.content.strip()) for turn in request) for request in asked]
    text, notes, ours = made(tmp_path, template, asked if template != NO_SYSTEM else asked[:3], **candidate)
    lines = read_modelfile(text)
    limits = [("temperature", "0"), ("repeat_penalty", "1"), ("num_ctx", "1024"), ("num_predict", "8")]
    assert [*lines[:1], *lines[2:]] == [("FROM", "./model.gguf"), *limits, ("stop", "<|im_end|>")]
    assert lines[1][0] == "TEMPLATE"
    for request in asked:
        if template == NO_SYSTEM and request[0].role == "system":
            with pytest.raises(UsageError, match="refuses this conversation"):
                ours(request)
            with pytest.raises(UndefinedError):
                render(lines[1][1], request)
        else:
            assert render(lines[1][1], request) == ours(request)
    assert (KEEPS_SPACES in notes) == ("trim" in template or (not candidate["prompt"] and template != NO_SYSTEM))
    with pytest.raises(UndefinedError):
        render(lines[1][1], (*asked[0], said("tool", "1")))


@pytest.mark.parametrize(
    ("template", "held_out", "match"),
    [
        (TEMPLATE.replace("<|im_start|>", "{{ '!' if loop.last }}<|im_start|>", 1), [], "prompt of two turns"),
        (TEMPLATE.replace(CONTENT, f"{CONTENT} | tojson"), [], "one turn with markup"),
        (TEMPLATE.replace(CONTENT, f"({CONTENT} if loop.last)"), [], "leaves out a turn"),
        (TEMPLATE, [(said("user", "a"), said("user", "b"))], "a held-out request would be another one"),
        (TEMPLATE, [(said("user", "a").model_copy(update={"tools": "[]"}),)], "it offers functions"),
    ],
)
def test_what_ollama_would_write_otherwise_is_refused(
    template: str, held_out: list[Turns], match: str, tmp_path: Path
) -> None:
    with pytest.raises(Refused, match=match):
        made(tmp_path, template, held_out)
