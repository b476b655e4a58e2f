"""How a request becomes an answer. Evaluation, serving and the canary all come through here."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property

from tunesmith.candidates.candidate import Candidate
from tunesmith.candidates.retrieval import Index
from tunesmith.core.errors import UsageError
from tunesmith.core.messages import Message, tools_of, with_tools
from tunesmith.data.dataset import load_dataset
from tunesmith.inference.engine import Engine, Generation
from tunesmith.store.store import Store


class Answerer:
    """One candidate, ready to turn requests into what an engine is asked."""

    def __init__(self, store: Store, engine: Engine, candidate: Candidate) -> None:
        if candidate.base != engine.base:
            raise UsageError(f"candidate {candidate.name} stands on another base than the engine runs")
        self._store, self._candidate = store, candidate

    @property
    def adapter(self) -> str | None:
        """The name under which the candidate's weights are loaded into the engine."""
        return self._candidate.training

    def conversation(self, messages: Sequence[Message]) -> tuple[Message, ...]:
        """The request with the candidate's prompt, shots and retrieved examples before it.

        A system turn of the request's own follows the candidate's prompt in one system turn.
        """
        return compose(self._candidate, messages, self._retrieved(messages))

    def generation(
        self,
        messages: Sequence[Message],
        *,
        max_tokens: int | None = None,
        temperature: float = 0.0,
        top_p: float = 1.0,
        seed: int = 0,
        stop: tuple[str, ...] = (),
    ) -> Generation:
        """What to ask the engine. max_tokens may lower the candidate's own bound, not raise it."""
        bound = self._candidate.max_tokens
        return Generation(
            messages=self.conversation(messages),
            max_tokens=bound if max_tokens is None else min(bound, max_tokens),
            temperature=temperature,
            top_p=top_p,
            seed=seed,
            stop=stop,
            schema=self._candidate.answer_schema,
        )

    def nearest(self, messages: Sequence[Message]) -> float:
        """Similarity (0 to 1) of the request to the training example most like it: what the drift watch looks at."""
        return self._index.similarity(_last_request(messages))

    def _retrieved(self, messages: Sequence[Message]) -> list[tuple[Message, ...]]:
        if self._candidate.retrieve is None:
            return []
        found = self._index.nearest(_last_request(messages), self._candidate.retrieve.k)
        return [turns_only(example.messages) for example in found]

    @cached_property
    def _index(self) -> Index:
        if self._candidate.dataset is None:
            raise UsageError(f"candidate {self._candidate.name} names no dataset to look things up in")
        return Index(load_dataset(self._store, self._candidate.dataset).examples("train"))


def compose(
    candidate: Candidate, messages: Sequence[Message], retrieved: Sequence[Sequence[Message]] = ()
) -> tuple[Message, ...]:
    """Put prompt, shots and retrieved examples before the messages of a request or a training row."""
    if not messages:
        raise UsageError("there is nothing to answer", where="messages", fix="send at least one user message")
    own = [message.content for message in messages if message.role == "system"]
    system = "\n\n".join(part for part in (candidate.prompt.strip(), *own) if part)
    shown = [message for example in (*candidate.shots, *retrieved) for message in example]
    turns = [message for message in messages if message.role != "system"]
    opening = [Message(role="system", content=system)] if system else []
    composed = (*opening, *shown, *turns)
    # The request's own tools, on the first turn; what a shown example could call is not offered.
    return (
        with_tools(composed, tools_of(messages))
        if any(message.tools for message in (*composed, *messages))
        else composed
    )


def turns_only(messages: Sequence[Message]) -> tuple[Message, ...]:
    """An example as a shot: its system turn left out, since the candidate's own stands first."""
    return tuple(message for message in messages if message.role != "system")


def _last_request(messages: Sequence[Message]) -> str:
    for message in reversed(messages):
        if message.role == "user":
            return message.content
    raise UsageError("there is no user message to answer", where="messages")
