"""Renders conversations to token ids and, for training, marks the assistant's tokens.

Training, evaluation and serving all use this module, with the model's own chat template. The assistant's turns are
located by rendering the conversation up to each of them, so the template needs no generation marks.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import date
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any, Literal

from tunesmith.core.errors import Refused, TunesmithError, UsageError
from tunesmith.core.messages import Conversation, Message, ToolCall, Turns, tools_of, with_tools
from tunesmith.core.reading.strict_json import Fields, JsonObject, parse_json
from tunesmith.models.call_format import CallFormat, find_call_format

LossOn = Literal["assistant", "last", "all"]

# The day that templates write as today's, so that a conversation has the same tokens every day. Llama 3's templates
# assume this one where they are given none.
_TODAY = date(2024, 7, 26)
_NOW = re.compile(r"""strftime_now\(\s*(["'])(.*?)\1\s*\)""")
# What a template may read besides the conversation -> what it gets here. Without thoughts the opening of a template for
# hybrid models holds the empty thought, which would otherwise be learned and served as part of the answer.
FIXED: Mapping[str, Any] = {"enable_thinking": False, "strftime_now": _TODAY.isoformat()}

# Gemma 1 and 2 have templates without a system role.
_WITHOUT_SYSTEM = "if the template has no system role, leave the prompt out or write it into the user's message"
_WITH_TOOLS = "use a base whose template supports tools, such as Qwen 2.5, Qwen 3 or Llama 3.1"


@dataclass(frozen=True, slots=True)
class Rendered:
    """ids: the token ids. trained[i]: whether ids[i] is a label, as the tokens of assistant turns and their end are."""

    ids: tuple[int, ...]
    trained: tuple[bool, ...]


@dataclass(frozen=True, slots=True)
class RowCounter:
    """Counts the tokens of training rows. Can be sent to another process, which loads the tokenizer itself.

    Raises what Renderer.conversation raises for a row that cannot be trained on.
    """

    folder: Path
    fingerprint: str  # of the base's tokenizer and template: a changed template is loaded again
    loss_on: LossOn = "assistant"  # the turns that must be found in a row

    def __call__(self, messages: Conversation, most: int | None = None) -> int:
        """Tokens of a row, its answer included. most: as `Renderer.count_row` has it."""
        return _renderer(self.folder, self.fingerprint).count_row(messages, most, self.loss_on)


@dataclass(frozen=True, slots=True)
class CountForAll:
    """Counts the tokens of training rows for several bases. counters: by the base's spec."""

    counters: Mapping[str, RowCounter]

    def __call__(self, messages: Conversation, most: int | None = None) -> int:
        """Tokens for the first base, so that a further one changes no dataset; for another where that has too many.

        Of several bases, an error names the one.
        """
        first = None
        for spec, count in self.counters.items():
            try:
                length = count(messages, most)
            except TunesmithError as error:
                error.what += f" (base {spec})" if len(self.counters) > 1 else ""
                raise
            first = length if first is None else first
            if most is not None and length > most:
                return length
        return first or 0


@lru_cache(maxsize=8)
def _renderer(folder: Path, _fingerprint: str) -> Renderer:
    return Renderer(folder)


class Renderer:
    """A base model's tokenizer and chat template. Raises Refused where the folder lacks a chat template or a fast
    tokenizer. Needs no weights.
    """

    def __init__(self, folder: Path) -> None:
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
        from transformers import AutoTokenizer

        self.tokenizer: Any = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        if not self.tokenizer.chat_template:
            raise Refused(
                "the base has no chat template, so a conversation cannot be rendered",
                where=str(folder),
                fix="use an instruction-tuned model; or copy the folder, add chat_template.jinja, and name the copy",
            )
        if not self.tokenizer.is_fast:
            raise Refused("the base has no fast tokenizer", where=str(folder), fix="add tokenizer.json to its folder")
        self._folder = folder

    @cached_property
    def stop_ids(self) -> frozenset[int]:
        """Ids that end a turn: the tokenizer's end token and those of generation_config.json."""
        ids = {self.tokenizer.eos_token_id}
        generation = self._folder / "generation_config.json"
        if generation.is_file():
            listed = json.loads(generation.read_bytes()).get("eos_token_id", [])
            ids.update(listed if isinstance(listed, list) else [listed])
        return frozenset(token for token in ids if token is not None)

    @cached_property
    def control_tokens(self) -> tuple[str, ...]:
        """The special tokens that the chat template writes, as text. No row and no request may contain them."""
        template, named = self.tokenizer.chat_template, self.tokenizer.special_tokens_map
        source = "".join(template.values()) if isinstance(template, dict) else template
        written = [source, *(str(token) for name, token in named.items() if name in source)]
        for messages in _every_kind_of_turn():
            for opening in (False, True):
                with suppress(TunesmithError):  # many templates know no system turn, and no tools
                    written.append(self._written(messages, opening))
        return tuple(sorted(token for token in self._special_tokens if any(token in text for text in written)))

    @cached_property
    def _special_tokens(self) -> frozenset[str]:
        """Not only the ones with a name, such as eos: many templates mark turns with others."""
        added = self.tokenizer.added_tokens_decoder.items()
        unnamed = {token.content for number, token in added if token.special or number in self.stop_ids}
        return frozenset({*map(str, self.tokenizer.all_special_tokens), *unnamed} - {""})

    @cached_property
    def _ordinary_texts(self) -> frozenset[str]:
        """Special tokens that the template never writes. In a conversation they are ordinary text."""
        return self._special_tokens.difference(self.control_tokens)

    @cached_property
    def call_format(self) -> CallFormat:
        """How answers call functions. Raises Refused where the template does not render tools, or not calls as JSON."""
        return find_call_format(self._written, lambda text: self.text(self._encode(text).ids))

    def comparable(self, request: Conversation, call: Message | None, answer: str) -> str:
        """A model's answer as scorers compare it with the expected call: its calls are written as in `Message.text`.

        call: the expected turn, where it calls functions; where that is None, nothing is read as a call. A template
        that does not write calls as JSON is not read either: there only the expected call, word for word, is a call.
        """
        if call is None:
            return answer
        with suppress(TunesmithError):  # not every request can be rendered with an answer
            row = self.conversation((*request, call), "last")
            learned = zip(row.ids, row.trained, strict=True)
            written = self.text([token for token, label in learned if label and token not in self.stop_ids])
            if answer.split() == written.split():
                return call.text
        with suppress(Refused):
            text, calls = self.call_format.read(answer)
            return Message(role="assistant", content=text, tool_calls=calls).text
        return answer

    @cached_property
    def _longest_token(self) -> int:
        """The most characters of text that one token stands for."""
        return max(map(len, self.tokenizer.get_vocab()), default=1)

    def least_tokens(self, messages: Conversation) -> int:
        """A number of tokens that the messages have at least, without tokenising them, which takes seconds a megabyte.

        Every turn has a token, and no token stands for more characters than the vocabulary's longest.
        """
        letters = sum(len(text) for message in messages for text in message.texts())
        return max(len(messages), -(-letters // self._longest_token))

    def prompt(self, messages: Conversation) -> list[int]:
        """Ids of a request, with the assistant's opening. Raises UsageError for messages that cannot be answered."""
        return list(self._encode(self.prompt_text(messages)).ids)

    def prompt_text(self, messages: Conversation) -> str:
        """A request as the template writes it, with the assistant's opening. Raises as `prompt`."""
        if not messages or messages[-1].role == "assistant":
            raise UsageError("there is nothing to answer: the last message must be the user's", where="messages")
        return self._text(messages, opening=True)

    def conversation(self, messages: Conversation, loss_on: LossOn = "assistant") -> Rendered:
        """Ids of a conversation and which of them are labels.

        loss_on: "assistant" marks the assistant's turns, "last" the last of these, "all" every token except the first,
        which no token predicts. Turns of weight 0 are never marked. Raises Refused where the assistant's turns cannot
        be located, where a turn has no end token (the model would never learn to stop), and for two beginning-of-text
        tokens.
        """
        text = self._text(messages, opening=False)
        return self._labelled(messages, text, self._encode(text), loss_on)

    def _labelled(self, messages: Conversation, text: str, encoded: Any, loss_on: LossOn) -> Rendered:
        """A conversation that was laid out as text and encoded, as `conversation` returns it."""
        ids: list[int] = encoded.ids
        trained = [loss_on == "all" and place > 0 for place in range(len(ids))]
        for turn, learned in _turns(messages, loss_on).items():
            span = self._span(messages, turn, text)
            places = self._places(encoded, span)
            if encoded.offsets[places[0]][0] != span[0]:
                raise Refused("a token spans the assistant's opening and its answer", where="chat_template")
            if learned and messages[turn].content not in text[span[0] : encoded.offsets[places[-1]][0]]:
                raise Refused(
                    "the chat template changes this answer, so the model would learn another one",
                    where=f"messages[{turn}]",
                    fix="remove spaces and line breaks from its ends, and what the template reads, such as thoughts",
                )
            for place in places:
                trained[place] = learned
        if not any(trained):
            raise Refused("no token of this conversation would be trained on", where="messages")
        bos = self.tokenizer.bos_token_id
        if bos is not None and ids[:2] == [bos, bos]:
            raise Refused("the conversation begins with two beginning-of-text tokens", where="chat_template")
        return Rendered(tuple(ids), tuple(trained))

    def count_prompt(self, messages: Conversation, most: int | None = None) -> int:
        """Tokens of a request, with the assistant's opening.

        most: where there are more, a number above it may be returned that there are at least. Text that cannot have so
        few tokens is then not tokenised.
        """
        least = self.least_tokens(messages)
        return least if most is not None and least > most else len(self.prompt(messages))

    def count_row(self, messages: Conversation, most: int | None = None, loss_on: LossOn = "assistant") -> int:
        """Tokens of a training row, with its answer. most: as in `count_prompt`.

        Raises what `conversation` raises with this loss_on for a row of at most so many tokens.
        """
        least = self.least_tokens(messages)
        if most is not None and least > most:
            return least
        text = self._text(messages, opening=False)
        encoded = self._encode(text)
        if most is None or len(encoded.ids) <= most:  # a row of many turns is laid out once for each of them
            self._labelled(messages, text, encoded, loss_on)
        return len(encoded.ids)

    def answered(self, messages: Conversation, answer: str) -> Rendered:
        """A request and an answer to it as a training row has them, up to the end token. The answer's tokens and its
        end are labels.

        Encoded alone an answer can have other tokens: many tokenizers put a space before a text's first word.
        """
        turns = (*messages, Message(role="assistant", content=answer))
        text = self._text(turns, opening=False)
        return self._up_to_end(self._encode(text), self._span(turns, len(messages), text))

    def answered_each(self, messages: Conversation, answers: Sequence[str]) -> list[Rendered]:
        """As `answered`, for each of several answers to one request, whose beginning is encoded once.

        What follows a control token is encoded without what comes before it, so only that has to be encoded again.
        """
        before = self._text(messages, opening=True)
        request = self._encode(before)
        control = {number for number, token in self.tokenizer.added_tokens_decoder.items() if token.special}
        last = max((place for place, token in enumerate(request.ids) if token in control), default=0)
        cut, shared = request.offsets[last][0] if last else 0, tuple(request.ids[:last])

        def render(answer: str) -> Rendered:
            text = self._text((*messages, Message(role="assistant", content=answer)), opening=False)
            if not text.startswith(before):
                return self.answered(messages, answer)
            end = self._up_to_end(self._encode(text[cut:]), (len(before) - cut, len(text) - cut))
            return Rendered(shared + end.ids, (False,) * last + end.trained)

        if answers and render(answers[0]) != self.answered(messages, answers[0]):
            return [self.answered(messages, answer) for answer in answers]
        return [render(answer) for answer in answers]

    def _up_to_end(self, encoded: Any, span: tuple[int, int]) -> Rendered:
        """The tokens up to the end of an assistant's turn, whose own tokens are labels."""
        places = self._places(encoded, span)
        ids: list[int] = encoded.ids[: places[-1] + 1]
        return Rendered(tuple(ids), tuple(place >= places[0] for place in range(len(ids))))

    def text(self, ids: Sequence[int]) -> str:
        """The text of an answer's ids, without control tokens."""
        return str(self.tokenizer.decode(list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False))

    def reader(self) -> Callable[[int], str]:
        """A function from each next id of an answer to the text that it adds; a character appears with its last
        byte."""
        from tokenizers.decoders import DecodeStream

        stream, tokenizer = DecodeStream(skip_special_tokens=True), self.tokenizer.backend_tokenizer
        return lambda token: stream.step(tokenizer, token) or ""

    def _span(self, messages: Conversation, place: int, text: str) -> tuple[int, int]:
        """(start, end) of an assistant turn in the conversation's text, without its opening."""
        before = self._text(messages[:place], opening=True)
        through = self._text(messages[: place + 1], opening=False)
        if not through.startswith(before):
            raise Refused(
                "the chat template renders a request differently once its answer follows (a system turn moves, or the "
                "opening holds another thought than the answer), so the assistant's tokens cannot be located",
                where="chat_template",
                fix="leave the system prompt out or write it into the user's turn, leave thoughts out of the answers, "
                "or use another template",
            )
        if not text.startswith(through):
            raise Refused(
                "the chat template renders a turn differently once later turns follow, so the assistant's tokens "
                "cannot be located",
                where="chat_template",
                fix="set train.loss_on: last, or use single-turn rows, or a template that only appends turns",
            )
        return len(before), len(through)

    def _places(self, encoded: Any, span: tuple[int, int]) -> list[int]:
        """Where the tokens of an assistant's turn are, up to and including the first end token."""
        start, end = span
        places: list[int] = []
        for place, (first, last) in enumerate(encoded.offsets):
            if first < end and last > max(start, first):
                places.append(place)
                if encoded.ids[place] in self.stop_ids:
                    return places
        raise Refused(
            "the assistant's turn has no end token, so the model would never learn to stop",
            where="chat_template",
            fix="use a template whose turns end in the tokenizer's end token",
        )

    def _text(self, messages: Conversation, *, opening: bool) -> str:
        for place, message in enumerate(messages):
            if (token := message.control_token(self.control_tokens)) is not None:
                raise UsageError(
                    f"the text contains the control token {token}",
                    where=f"messages[{place}]",
                    fix="remove it: it could end a turn or start another speaker's",
                )
        if any(message.tools or message.tool_calls or message.role == "tool" for message in messages):
            self._require_tools(messages)
        return self._written(messages, opening)

    def _written(self, messages: Conversation, opening: bool) -> str:
        """The conversation as the template writes it, whatever that leaves out."""
        return self._laid_out(tool_turns(messages), tools_of(messages), opening=opening)

    def _require_tools(self, messages: Conversation) -> None:
        """Raise Refused where the template leaves out a tool, a call or a tool's result, as most templates do
        silently."""
        turns, tools, marks = marked_tools(tool_turns(messages), tools_of(messages))
        try:
            text = self._laid_out(turns, tools, opening=False)
        except UsageError as error:
            raise Refused(
                f"{error.what} (with tools in it)",
                where="chat_template",
                fix=_WITH_TOOLS,
            ) from error
        lost = [what for mark, what in marks.items() if mark not in text]
        if lost:
            raise Refused(
                f"the base's chat template does not render {lost[0]}, so the model would never see it",
                where="chat_template",
                fix=f"{_WITH_TOOLS}, or rows without them",
            )

    def _laid_out(self, turns: Sequence[Any], tools: Sequence[Any], *, opening: bool) -> str:
        from jinja2 import TemplateError

        offered = list(tools) or None
        try:
            return str(
                self.tokenizer.apply_chat_template(
                    turns,
                    tools=offered,
                    chat_template=_dated(self.tokenizer.get_chat_template(tools=offered)),
                    tokenize=False,
                    add_generation_prompt=opening,
                    enable_thinking=FIXED["enable_thinking"],
                )
            )
        except (TemplateError, TypeError) as error:  # TypeError: the template joins text and an unexpected value
            raise UsageError(
                f"the base's chat template refuses this conversation: {error}",
                where="messages",
                fix=_WITHOUT_SYSTEM if any(turn["role"] == "system" for turn in turns) else None,
            ) from error

    def _encode(self, text: str) -> Any:
        # The template has written all control tokens; the tokenizer must not add another beginning.
        if not any(token in text for token in self._ordinary_texts):
            return self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=False).encodings[0]
        encoded = self._text_tokenizer.encode(text, add_special_tokens=False)
        for token in self._ordinary_texts:  # a vocabulary may hold one of them as a piece of text, too
            if self.tokenizer.convert_tokens_to_ids(token) in encoded.ids:
                raise UsageError(
                    f"the base's tokenizer cannot write {token} as ordinary text", where="messages", fix="remove it"
                )
        return encoded

    @cached_property
    def _text_tokenizer(self) -> Any:
        """The tokenizer, reading special tokens that the template never writes as ordinary text.

        A copy: `encode_special_tokens` of a tokenizer that other threads use must not change. It concerns the tokens
        that are marked as special, so the template's are not marked here.
        """
        from tokenizers import Tokenizer

        stated = json.loads(self.tokenizer.backend_tokenizer.to_str())
        for token in stated["added_tokens"]:
            token["special"] = token["content"] in self._ordinary_texts
        made = Tokenizer.from_str(json.dumps(stated))
        made.no_truncation()
        made.no_padding()
        made.encode_special_tokens = True
        return made


def _every_kind_of_turn() -> Iterator[Turns]:
    """Conversations that hold every kind of turn, for templates with and without system turns and tools."""
    system, asked = Message(role="system", content="a"), Message(role="user", content="b")
    answer, call = Message(role="assistant", content="c"), ToolCall(id="call00000", name="d", arguments="{}")
    called = Message(role="assistant", content="", tool_calls=(call,))
    result = Message(role="tool", content="e", tool_call_id=call.id)
    tool = {"type": "function", "function": {"name": call.name, "description": "", "parameters": {"type": "object"}}}
    for turns in ((asked, answer, asked), with_tools((asked, called, result, answer, asked), [tool])):
        yield turns
        yield (
            system.model_copy(update={"tools": turns[0].tools}),
            turns[0].model_copy(update={"tools": None}),
            *turns[1:],
        )


@lru_cache(maxsize=8)
def _dated(template: str) -> str:
    """A chat template with a fixed date in place of today's.

    transformers' own function cannot be replaced by an argument: it passes templates plain data only.
    """
    dated = _NOW.sub(lambda call: f"{call[1]}{_TODAY.strftime(call[2])}{call[1]}", template)
    if "strftime_now(" in dated:
        raise Refused(
            "the chat template computes how it writes today's date, so a prompt would have other tokens every day",
            where="chat_template",
            fix="write a date into the template in place of strftime_now(...)",
        )
    return dated


def _turns(messages: Conversation, loss_on: LossOn) -> dict[int, bool]:
    """The assistant turns to mark: index -> whether its tokens are labels."""
    said = {place: message.weight == 1 for place, message in enumerate(messages) if message.role == "assistant"}
    if loss_on == "all":
        return said
    learned = [place for place, weighs in said.items() if weighs]
    return dict.fromkeys(learned[-1:] if loss_on == "last" else learned, True)


def tool_turns(messages: Conversation) -> list[JsonObject]:
    """The turns as chat templates of transformers expect them: arguments as an object, tool turns with a name."""
    names = {call.id: call.name for message in messages for call in message.tool_calls}
    turns = []
    for message in messages:
        turn = {**message.openai(), "content": message.content}
        for call in turn.get("tool_calls", ()):
            call["function"]["arguments"] = parse_json(call["function"]["arguments"])
        if message.role == "tool":
            turn |= {"tool_call_id": message.tool_call_id, "name": names.get(message.tool_call_id or "", "")}
        turns.append(turn)
    return turns


def marked_tools(
    turns: Sequence[Fields], tools: Sequence[Fields]
) -> tuple[list[JsonObject], list[JsonObject], dict[str, str]]:
    """(turns, tools, mark -> what it stands for), with a mark in every place that a template must render.

    Marks consist of letters and digits, so that escaping does not change them.
    """
    marks: dict[str, str] = {}

    def mark(what: str) -> str:
        made = f"zq{len(marks)}qz"
        marks[made] = what
        return made

    declared = [
        dict(tool, function=dict(tool["function"], name=mark(f"the tool {tool['function']['name']}"))) for tool in tools
    ]
    shown = []
    for turn in turns:
        changed = dict(turn)
        if turn["role"] == "tool":
            changed["content"] = mark(f"the result of the tool {turn['name']}")
        if "tool_calls" in turn:
            changed["tool_calls"] = [_marked_call(call, mark) for call in turn["tool_calls"]]
            if turn["content"]:
                changed["content"] = mark("the text of a turn with a call")
        shown.append(changed)
    return shown, declared, marks


def _marked_call(call: Fields, mark: Any) -> JsonObject:
    name = call["function"]["name"]
    called = mark(f"the call of {name}")
    arguments = {mark(f"the arguments of {name}"): mark(f"the arguments of {name}")}
    return dict(call, function={"name": called, "arguments": arguments})
