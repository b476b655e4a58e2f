"""Writes a Modelfile for Ollama: a version's prompt, the base's chat template, stop tokens and limits.

Ollama's templates are Go's text/template (https://pkg.go.dev/text/template) and call no Jinja. So the template is made
from what the base's own writes around marked texts, and both are compared before anything is exported.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby, takewhile

from tunesmith.core.errors import Refused, UsageError
from tunesmith.core.messages import Conversation, Message, Turns
from tunesmith.models.export.gguf import FILE as GGUF
from tunesmith.models.rendering import Renderer

FILE = "Modelfile"
KEEPS_SPACES = "Ollama keeps spaces around a message's text, which are cut off here: send texts without them"
# What a request of this kind is answered with: an error of Go's that quotes the words.
_FAILS = '{{{{ index $.Messages "this model takes no {} messages" }}}}'
_TEXTS = ("zq0qz", "zq1qz", "zq2qz", "zq3qz")  # letters and digits, which no template changes
_HARD = ('say "{{ .System }}" & <b>\\n', "två\n\n漢字 🙂", '{"a": [1, """]}', "again")


@dataclass(frozen=True, slots=True)
class ChatTemplate:
    """The texts around a conversation's turns, as (before, after).

    start: the beginning of a request without a system turn, with the candidate's prompt and shots. system: around the
    request's own system turn; None: it is not read. no_system: such a request is an error. opening: of the answer.
    """

    start: str
    system: tuple[str, str] | None
    no_system: bool
    user: tuple[str, str]
    assistant: tuple[str, str]
    opening: str

    def text(self, messages: Conversation) -> str:
        """A request as Ollama writes it, which first joins turns of one role that follow each other."""
        said = "\n\n".join(message.content for message in messages if message.role == "system")
        around = {"user": self.user, "assistant": self.assistant}
        parts = [said.join(self.system) if said and self.system is not None else self.start]
        for role, turns in groupby(messages, key=lambda message: message.role):
            if role in around:
                parts.append("\n\n".join(turn.content for turn in turns).join(around[role]))
        return "".join(parts) + self.opening

    def go(self) -> str:
        """The template in Go's language."""
        user, assistant = ("{{ .Content }}".join(map(_literal, each)) for each in (self.user, self.assistant))
        start = _literal(self.start)
        if self.system is not None or self.no_system:
            own = "{{ .System }}".join(map(_literal, self.system or ())) or _FAILS.format("system")
            start = f"{{{{ if .System }}}}{own}{{{{ else }}}}{start}{{{{ end }}}}"
        return (
            f'{start}{{{{ range .Messages }}}}{{{{ if eq .Role "user" }}}}{user}'
            f'{{{{ else if eq .Role "assistant" }}}}{assistant}'
            f'{{{{ else if ne .Role "system" }}}}{_FAILS.format("tool")}{{{{ end }}}}{{{{ end }}}}'
            f"{_literal(self.opening)}"
        )


def modelfile(
    renderer: Renderer,
    compose: Callable[[Conversation], Turns],
    requests: Sequence[Conversation],
    *,
    context_length: int,
    max_tokens: int,
) -> tuple[str, tuple[str, ...]]:
    """A Modelfile for model.gguf in its folder, and notes on what Ollama does otherwise.

    compose: puts the candidate's prompt and shots before a request. requests: for which the template is compared with
    the base's, besides made ones. Raises Refused where the prompts differ.
    """

    def written(messages: Conversation) -> str:
        return renderer.prompt_text(compose(messages))

    made = _derive(written)
    for what, messages in (*_made_requests(made), *(("a held-out request", each) for each in requests)):
        tools = any(message.tools or message.tool_calls or message.role == "tool" for message in messages)
        if tools or made.text(messages) != written(messages):
            raise _refusal("it offers functions" if tools else f"the prompt of {what} would be another one")
    spaced = [turn.model_copy(update={"content": f" {turn.content}\n"}) for turn in _turns(_TEXTS, made, 3)]
    notes = () if made.text(spaced) == written(spaced) else (KEEPS_SPACES,)
    stops = sorted(renderer.tokenizer.convert_ids_to_tokens(sorted(renderer.stop_ids)))
    if odd := [stop for stop in stops if not stop.isprintable() or '"' in stop]:
        raise _refusal(f"its end token {odd[0]!r} cannot be written there")
    # Ollama's own defaults sample, and older ones penalise repetition.
    limits = {"temperature": 0, "repeat_penalty": 1, "num_ctx": context_length, "num_predict": max_tokens}
    lines = [f"PARAMETER {name} {value}" for name, value in limits.items()]
    lines += [f'PARAMETER stop "{stop}"' for stop in stops]
    return "\n".join([f"FROM ./{GGUF}", f'TEMPLATE """{made.go()}"""', *lines, ""]), notes


def _derive(written: Callable[[Conversation], str]) -> ChatTemplate:
    """The texts around marked turns. What two places share could belong to either turn: in a conversation in which
    user and assistant alternate, it makes no difference."""
    turns = _turns(_TEXTS, None, 3)
    first, end = _around(written(turns[:1]), _TEXTS[:1])
    _, answers, asks, _ = _around(written(turns), _TEXTS[:3])
    before, after = _shared(first[::-1], asks[::-1])[::-1], _shared(end, answers)
    system, no_system = None, False
    try:
        with_system = written([Message(role="system", content=_TEXTS[3]), turns[0]])
    except UsageError:
        no_system = True
    else:
        if _TEXTS[3] in with_system:
            opened, closed, _ = _around(with_system, (_TEXTS[3], _TEXTS[0]))
            system = opened, closed.removesuffix(before)
    return ChatTemplate(
        start=first.removesuffix(before),
        system=system,
        no_system=no_system,
        user=(before, after),
        assistant=(answers.removeprefix(after), asks.removesuffix(before)),
        opening=end.removeprefix(after),
    )


def _shared(one: str, other: str) -> str:
    """What both texts begin with."""
    return "".join(letter for letter, _ in takewhile(lambda pair: pair[0] == pair[1], zip(one, other, strict=False)))


def _around(text: str, marks: Sequence[str]) -> list[str]:
    """The text before, between and after the marks."""
    parts = []
    for mark in marks:
        before, found, text = text.partition(mark)
        if not found:
            raise _refusal("it leaves out a turn, or writes turns in another order")
        parts.append(before)
    return [*parts, text]


def _made_requests(made: ChatTemplate) -> Iterator[tuple[str, list[Message]]]:
    for texts in (_TEXTS, _HARD):
        for most, what in ((1, "one turn"), (3, "two turns"), (5, "three turns")):
            yield f"{what}{'' if texts is _TEXTS else ' with markup'}", _turns(texts, None, most)
            yield f"{what} after a system turn", _turns(texts, made, most)


def _turns(texts: Sequence[str], made: ChatTemplate | None, most: int) -> list[Message]:
    """A made request of so many turns; with made, after a system turn unless the template refuses one."""
    said = [texts[turn % len(texts)] for turn in range(most)]
    turns = [Message(role="assistant" if place % 2 else "user", content=text) for place, text in enumerate(said)]
    return turns if made is None or made.no_system else [Message(role="system", content=texts[3]), *turns]


def _literal(text: str) -> str:
    """A text that Go's template prints as it is: without actions, without what ends a Modelfile's string, and without
    what its reader drops, which is every character that is not printable."""

    def special(letter: str) -> bool:
        return letter in '{"' or not (letter == "\n" or letter.isprintable())

    def quoted(run: str) -> str:
        escapes = {'"': '\\"', "{": "{"}
        return "".join(escapes.get(letter) or f"\\U{ord(letter):08x}" for letter in run)

    runs = ((is_special, "".join(run)) for is_special, run in groupby(text, key=special))
    return "".join(f'{{{{ "{quoted(run)}" }}}}' if is_special and run != '"' else run for is_special, run in runs)


def _refusal(why: str) -> Refused:
    said = f"the base's chat template cannot be written for Ollama: {why}"
    return Refused(said, where="chat_template", fix="export it as gguf, which holds the base's own template")
