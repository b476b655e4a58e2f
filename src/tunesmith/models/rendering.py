"""Rendering: a conversation to token ids and, for training, which of them are the assistant's.

Training, evaluation and serving all come through here. The chat template is the model's own; where the assistant's
turns lie is found by rendering the conversation up to each of them, so no template needs generation marks.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any, Literal

from tunesmith.core.errors import Refused, UsageError
from tunesmith.core.messages import Message, tools_of
from tunesmith.models.tool_turns import marked_tools, tool_turns

LossOn = Literal["assistant", "last", "all"]


# Gemma's first two generations: their template knows two speakers.
_WITHOUT_SYSTEM = "where it knows no system messages, leave the prompt out, or write it into the user's message"


@dataclass(frozen=True, slots=True)
class Rendered:
    """ids[i] is a token; trained[i] says whether it is learned, as an assistant's turn with its end token is."""

    ids: tuple[int, ...]
    trained: tuple[bool, ...]


@dataclass(frozen=True, slots=True)
class RowCounter:
    """Counts the tokens of training rows; can be sent to another process, which reads the tokenizer for itself.

    Raises what Renderer.conversation raises for a row that cannot be trained on.
    """

    folder: Path
    fingerprint: str  # of the base's rendering: a template that changed meanwhile is read anew

    def __call__(self, messages: Sequence[Message]) -> int:
        """Tokens of a row, its answer included."""
        return _renderer(self.folder, self.fingerprint).count_row(messages)


@lru_cache(maxsize=2)
def _renderer(folder: Path, _fingerprint: str) -> Renderer:
    return Renderer(folder)


class Renderer:
    """A base's tokenizer and chat template."""

    def __init__(self, folder: Path) -> None:
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
        from transformers import AutoTokenizer

        self.tokenizer: Any = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        if not self.tokenizer.chat_template:
            raise Refused(
                "the base has no chat template, so a conversation cannot be rendered",
                where=str(folder),
                fix="use an instruction-tuned model, or add chat_template.jinja to its folder",
            )
        if not self.tokenizer.is_fast:
            raise Refused("the base has no fast tokenizer", where=str(folder), fix="add tokenizer.json to its folder")
        self._folder = folder

    @cached_property
    def stop_ids(self) -> frozenset[int]:
        """Tokens that end a turn: the tokenizer's end token and those of generation_config.json."""
        import json

        found = {self.tokenizer.eos_token_id}
        generation = self._folder / "generation_config.json"
        if generation.is_file():
            listed = json.loads(generation.read_bytes()).get("eos_token_id", [])
            found.update(listed if isinstance(listed, list) else [listed])
        return frozenset(token for token in found if token is not None)

    @cached_property
    def special_tokens(self) -> tuple[str, ...]:
        """The template's control tokens as text; content must not hold them."""
        return tuple(sorted({str(token) for token in self.tokenizer.all_special_tokens} - {""}))

    def prompt(self, messages: Sequence[Message]) -> list[int]:
        """Ids of a request, the assistant's opening included. Raises UsageError where messages cannot be answered."""
        if not messages or messages[-1].role == "assistant":
            raise UsageError("there is nothing to answer: the last message must be the user's", where="messages")
        return list(self._encode(self._text(messages, opening=True)).ids)

    def conversation(self, messages: Sequence[Message], loss_on: LossOn = "assistant") -> Rendered:
        """Ids and training marks of a conversation: its assistant's turns, the last of them, or every token but the
        first, which nothing predicts. A turn of weight 0 is not marked.

        Raises Refused where the template does not let the assistant's turns be told apart, where a turn's end token is
        missing (the model would never learn to stop), or where the text begins with two beginning tokens.
        """
        text = self._text(messages, opening=False)
        encoded = self._encode(text)
        ids: list[int] = encoded.ids
        trained = [loss_on == "all" and place > 0 for place in range(len(ids))]
        for place, learned in _turns(messages, loss_on).items():
            self._mark(encoded, ids, trained, self._span(messages, place, text), learned)
        if not any(trained):
            raise Refused("no token of this conversation would be trained on", where="messages")
        bos = self.tokenizer.bos_token_id
        if bos is not None and ids[:2] == [bos, bos]:
            raise Refused("the conversation begins with two beginning tokens", where="chat_template")
        return Rendered(tuple(ids), tuple(trained))

    def count_prompt(self, messages: Sequence[Message]) -> int:
        """Tokens of a request, the assistant's opening included."""
        return len(self.prompt(messages))

    def count_row(self, messages: Sequence[Message]) -> int:
        """Tokens of a training row, its answer included. Raises what `conversation` raises."""
        return len(self.conversation(messages).ids)

    def answer(self, text: str) -> list[int]:
        """Ids of an answer as it would be decoded, an end token behind it."""
        return [*self.tokenizer.encode(text, add_special_tokens=False), self._end_of_turn]

    @cached_property
    def _end_of_turn(self) -> int:
        """What the template ends an answer with, which is not every tokenizer's end token (Gemma's ends a text)."""
        turns = (Message(role="user", content="a"), Message(role="assistant", content="b"))
        one = self.conversation(turns)
        return one.ids[len(one.ids) - 1 - one.trained[::-1].index(True)]

    def text(self, ids: Sequence[int]) -> str:
        """The text of an answer's ids, control tokens left out."""
        return str(self.tokenizer.decode(list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False))

    def reader(self) -> Callable[[int], str]:
        """Reads one answer's ids as they come: what text each adds. A character is told once its last byte is there."""
        from tokenizers.decoders import DecodeStream

        stream, tokenizer = DecodeStream(skip_special_tokens=True), self.tokenizer.backend_tokenizer
        return lambda token: stream.step(tokenizer, token) or ""

    def _span(self, messages: Sequence[Message], place: int, text: str) -> tuple[int, int]:
        """Where in the conversation's text an assistant's turn begins, after its opening, and ends."""
        before = self._text(messages[:place], opening=True)
        through = self._text(messages[: place + 1], opening=False)
        if not (through.startswith(before) and text.startswith(through)):
            raise Refused(
                "the chat template renders a turn differently once later turns follow, so the assistant's own "
                "tokens cannot be told apart",
                where="chat_template",
                fix="use a template that only appends, or single-turn rows",
            )
        return len(before), len(through)

    def _mark(
        self, encoded: Any, ids: Sequence[int], trained: list[bool], span: tuple[int, int], learned: bool
    ) -> None:
        """Mark the tokens between two places of the text as learned or not, up to and with the first end token."""
        start, end = span
        inside = [place for place, (first, last) in enumerate(encoded.offsets) if start <= first < end and last > first]
        if inside and encoded.offsets[inside[0]][0] != start:
            raise Refused("a token spans the assistant's opening and its answer", where="chat_template")
        for place in inside:
            trained[place] = learned
            if ids[place] in self.stop_ids:
                return
        raise Refused(
            "the assistant's turn has no end token, so the model would never learn to stop",
            where="chat_template",
            fix="use a template whose turns end in the tokenizer's end token",
        )

    def _text(self, messages: Sequence[Message], *, opening: bool) -> str:
        for place, message in enumerate(messages):
            for token in self.special_tokens:
                if any(token in text for text in message.texts()):
                    raise UsageError(
                        f"the text imitates the control token {token}",
                        where=f"messages[{place}]",
                        fix="remove it: it could end a turn or begin another speaker's",
                    )
        if any(message.tools or message.tool_calls or message.role == "tool" for message in messages):
            self._require_tools(messages)
        return self._laid_out(tool_turns(messages), tools_of(messages), opening=opening)

    def _require_tools(self, messages: Sequence[Message]) -> None:
        """Raise Refused where the template leaves out a tool, a call or what a tool said: most drop them silently."""
        turns, tools, marks = marked_tools(tool_turns(messages), tools_of(messages))
        try:
            text = self._laid_out(turns, tools, opening=False)
        except UsageError as error:
            raise Refused(
                f"{error.what} (with tools in it)", where="chat_template", fix="take a base whose template knows tools"
            ) from error
        lost = [what for mark, what in marks.items() if mark not in text]
        if lost:
            raise Refused(
                f"the base's chat template does not render {lost[0]}, so the model would never see it",
                where="chat_template",
                fix="take a base whose template knows tools, or rows without them",
            )

    def _laid_out(self, turns: Sequence[Any], tools: Sequence[Any], *, opening: bool) -> str:
        from jinja2 import TemplateError

        try:
            return str(
                self.tokenizer.apply_chat_template(
                    turns, tools=list(tools) or None, tokenize=False, add_generation_prompt=opening
                )
            )
        except (TemplateError, TypeError) as error:  # a TypeError: a text joined to what a template did not expect
            raise UsageError(
                f"the base's chat template refuses this conversation: {error}",
                where="messages",
                fix=_WITHOUT_SYSTEM if any(turn["role"] == "system" for turn in turns) else None,
            ) from error

    def _encode(self, text: str) -> Any:
        # The template wrote every control token itself; the tokenizer must not add another beginning.
        return self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=False).encodings[0]


def _turns(messages: Sequence[Message], loss_on: LossOn) -> dict[int, bool]:
    """The assistant's turns to be marked: place -> whether it is learned."""
    said = {place: message.weight == 1 for place, message in enumerate(messages) if message.role == "assistant"}
    if loss_on == "all":
        return said
    learned = [place for place, weighs in said.items() if weighs]
    return dict.fromkeys(learned[-1:] if loss_on == "last" else learned, True)
