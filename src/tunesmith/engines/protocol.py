"""The interface of an engine, which evaluation and serving use, and its requests and answers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, Literal, Protocol, TypeVar

from tunesmith.core.errors import Refused
from tunesmith.core.messages import Message
from tunesmith.core.progress import SILENT, Progress

# Allows json.dumps' whitespace or none: with unbounded whitespace, a model could go on with it forever.
# whitespace_pattern does not serve: some releases of llguidance read " ?" as any number of spaces.
ITEM_SEPARATOR: Final = ", ?"
KEY_SEPARATOR: Final = ": ?"
Loaded = TypeVar("Loaded")
ConstrainedBy = Literal["constrain", "messages", "response_format.json_schema", "tools"]


@dataclass(frozen=True, slots=True)
class Generation:
    """One request.

    temperature: 0 decodes greedily; seed has no effect then. stop: texts that end the answer and are not part of it.
    schema: JSON Schema, as JSON, that decoding follows, with keys in the schema's order. grammar: what it follows
    instead, in llguidance's dialect of Lark; an engine without grammars follows the schema where both are given.
    constrained_by: where the schema or grammar comes from, which is at fault where it cannot be followed: the
    candidate's settings, or a field of the request. top_logprobs: number of likeliest tokens to report at each step
    with their log-probabilities; None: report no log-probabilities.
    """

    messages: tuple[Message, ...]
    max_tokens: int = 256
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0
    stop: tuple[str, ...] = ()
    schema: str | None = None
    grammar: str | None = None
    constrained_by: ConstrainedBy = "constrain"
    top_logprobs: int | None = None


def restricted(schema: Mapping[str, Any]) -> dict[str, Any]:
    """The JSON Schema with llguidance's options for whitespace. Other libraries (xgrammar) ignore them."""
    options = {"whitespace_flexible": False, "item_separator": ITEM_SEPARATOR, "key_separator": KEY_SEPARATOR}
    return {**schema, "x-guidance": options}


@dataclass(frozen=True, slots=True)
class TokenScore:
    """A token as text and as bytes (a character may be spread over several tokens), and its log-probability: the
    model's own, before temperature, top_p or a schema. top: the likeliest tokens there, the likeliest first."""

    token: str
    data: bytes
    logprob: float
    top: tuple[TokenScore, ...] = ()


@dataclass(frozen=True, slots=True)
class Scored:
    """A piece of a stream whose request asks for log-probabilities: text, and the tokens that begin in it."""

    text: str
    scores: tuple[TokenScore, ...]


@dataclass(frozen=True, slots=True)
class Completion:
    """One answer. finish is "stop" at the end token or a stop text, "length" at max_tokens or the context's end.
    by_stop_text: one of the request's stop texts ended it. scores: of the text's tokens, where the request asks for
    log-probabilities. served_by: the model's name as an endpoint reported it. confidence: the probability (0 to 1) of
    the whole answer, where an endpoint or a classifier gives one."""

    text: str
    finish: Literal["stop", "length"]
    prompt_tokens: int
    completion_tokens: int
    by_stop_text: bool = field(default=False, kw_only=True)
    scores: tuple[TokenScore, ...] = field(default=(), kw_only=True)
    served_by: str = field(default="", kw_only=True)
    confidence: float | None = field(default=None, kw_only=True)


UNBOUNDED: Final = 1 << 30  # the context length of what has none
# What a stream gives: pieces of text, then the whole answer.
Streamed = str | Scored | Completion


@dataclass(frozen=True, slots=True)
class Question:
    """A multiple-choice probe: which of choices is the assistant's likeliest answer to messages."""

    messages: tuple[Message, ...]
    choices: tuple[str, ...]


class Responder(Protocol):
    """What answers a candidate's requests: the engine, a baseline or an endpoint."""

    @property
    def context_length(self) -> int:
        """Most tokens a prompt and its answer may have together."""

    def generate(
        self, requests: Sequence[Generation], adapter: str | None = None, progress: Progress = SILENT
    ) -> list[Completion]:
        """Answers in the order of requests. Raises UsageError for a prompt that does not fit the context, and where a
        request wants log-probabilities that there are none of."""

    def stream(self, request: Generation, adapter: str | None = None) -> Iterator[Streamed]:
        """Pieces of the answer's text as they are decoded, or all of it in one; the last item is the whole Completion.
        Closing the iterator cancels the request."""
        (done,) = self.generate([request], adapter)
        yield done.text if request.top_logprobs is None else Scored(done.text, done.scores)
        yield done


class Engine(Responder, Protocol):
    """Answers requests for one base model and any number of adapters. Thread-safe."""

    @property
    def base(self) -> str:
        """Digest of the base record."""

    @property
    def follows_grammars(self) -> bool:
        """Whether it can hold answers to a grammar, and not to a schema only."""

    def load_adapter(self, name: str, folder: Path) -> None:
        """Load a training's folder under name (the training's digest). Raises Refused if it does not fit the base."""

    def holds(self, name: str) -> bool:
        """Whether name is loaded. An engine may unload models that were trained in full."""

    def choose(
        self, questions: Sequence[Question], adapter: str | None = None, progress: Progress = SILENT
    ) -> list[list[float]]:
        """For each question the log-probability of each choice, summed over its tokens (end token included)."""


def loaded(adapters: Mapping[str, Loaded], name: str | None) -> Loaded | None:
    """The adapter of this name; None for the base. Raises Refused where it is not loaded."""
    if name is not None and name not in adapters:
        raise Refused(f"adapter {name} is not loaded", fix="load it first")
    return None if name is None else adapters[name]
