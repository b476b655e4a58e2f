"""How a request becomes an answer. Evaluation, serving and the canary all come through here."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Protocol

from tunesmith.candidates.baselines import last_request, make_floor
from tunesmith.candidates.candidate import Candidate
from tunesmith.candidates.endpoint import Endpoint
from tunesmith.candidates.retrieval import Embed, Index, example_index
from tunesmith.candidates.settings import EndpointSettings
from tunesmith.core.errors import UsageError
from tunesmith.core.messages import Message, tools_of, with_tools
from tunesmith.core.progress import SILENT, Progress
from tunesmith.data.dataset import Example, load_dataset
from tunesmith.data.documents import Documents, Passage
from tunesmith.engines.protocol import Completion, Engine, Generation, Streamed
from tunesmith.store.store import Store

_REMEMBERED = 512


class Responder(Protocol):
    """Who answers a candidate's requests: the engine, a floor or an endpoint."""

    @property
    def context_length(self) -> int:
        """Most tokens a prompt and its answer may have together."""
        ...

    def count_tokens(self, messages: Sequence[Message]) -> int:
        """Tokens of the prompt; 0 where nobody here can count them."""
        ...

    def generate(
        self, requests: Sequence[Generation], adapter: str | None = None, progress: Progress = SILENT
    ) -> list[Completion]:
        """Answers in the order of requests."""
        ...

    def stream(self, request: Generation, adapter: str | None = None) -> Iterator[Streamed]:
        """Pieces of the answer; the last item is the whole Completion."""
        ...


@dataclass(frozen=True, slots=True)
class Found:
    """What was looked up for one request, the best last. ids: of examples or passages; sources: theirs, each once."""

    ids: tuple[str, ...] = ()
    sources: tuple[str, ...] = ()
    shown: tuple[tuple[Message, ...], ...] = ()
    passages: tuple[Passage, ...] = ()


class Answerer:
    """One candidate, ready to turn requests into what its responder is asked.

    engine: may be None for a candidate that the base does not answer. endpoint: how an outside model is reached.
    """

    def __init__(
        self,
        store: Store,
        engine: Engine | None,
        candidate: Candidate,
        endpoint: EndpointSettings | None = None,
    ) -> None:
        if candidate.asks_base and (engine is None or candidate.base != engine.base):
            raise UsageError(f"candidate {candidate.name} stands on another base than the engine runs")
        self._store, self._candidate, self._engine, self._endpoint = store, candidate, engine, endpoint
        self.found = lru_cache(_REMEMBERED)(self._look_up)

    @property
    def name(self) -> str:
        """The candidate's."""
        return self._candidate.name

    @property
    def adapter(self) -> str | None:
        """The name under which the candidate's weights are loaded into the engine."""
        return self._candidate.training

    @cached_property
    def responder(self) -> Responder:
        """Who answers. Raises UsageError for an endpoint whose settings are not at hand."""
        if self._candidate.method != "model":
            return make_floor(self._candidate.method, self._examples)
        if self._candidate.endpoint is not None:
            if self._endpoint is None:
                url = self._candidate.endpoint.url
                raise UsageError(
                    f"{self._candidate.name} is answered by {url}, which is not asked from here",
                    fix="an endpoint is a rival to measure; release another candidate",
                )
            return Endpoint(self._endpoint)
        assert self._engine is not None
        return self._engine

    def conversation(self, messages: Sequence[Message]) -> tuple[Message, ...]:
        """The request with the candidate's prompt, shots and what was looked up before it.

        A system turn of the request's own follows the candidate's prompt in one system turn.
        """
        found = Found() if self._candidate.retrieve is None else self.found(last_request(messages))
        return compose(self._candidate, messages, found)

    def generation(
        self,
        messages: Sequence[Message],
        *,
        max_tokens: int | None = None,
        temperature: float = 0.0,
        top_p: float = 1.0,
        seed: int = 0,
        stop: tuple[str, ...] = (),
        top_logprobs: int | None = None,
    ) -> Generation:
        """What to ask the responder. max_tokens may lower the candidate's own bound, not raise it."""
        bound = self._candidate.max_tokens
        return Generation(
            messages=self.conversation(messages),
            max_tokens=bound if max_tokens is None else min(bound, max_tokens),
            temperature=temperature,
            top_p=top_p,
            seed=seed,
            stop=stop,
            schema=self._candidate.answer_schema,
            top_logprobs=top_logprobs,
        )

    def sources(self, messages: Sequence[Message]) -> Found:
        """What is looked up for a request: nothing where the candidate looks nothing up."""
        return Found() if self._candidate.retrieve is None else self.found(last_request(messages))

    def without_group(self, example: Example) -> Found:
        """What is looked up for a training row, its own group left out: at test time no row of its group is there."""
        retrieve = self._candidate.retrieve
        if retrieve is None:
            return Found()
        if retrieve.from_ == "documents":
            return self.found(last_request(example.request))
        skip = self._places_of_group.get(example.group, frozenset())
        return self._shown(self._index.nearest(last_request(example.request), retrieve.k, skip))

    def nearest(self, messages: Sequence[Message]) -> float:
        """Similarity (0 to 1) of the request to the training example most like it: what the drift watch looks at."""
        return self._by_words.similarity(last_request(messages))

    def _look_up(self, text: str) -> Found:
        assert self._candidate.retrieve is not None
        return self._shown(self._index.nearest(text, self._candidate.retrieve.k))

    def _shown(self, places: Sequence[int]) -> Found:
        if self._documents is not None:
            passages = tuple(self._documents.passages[place] for place in places)
            cited = tuple(dict.fromkeys(passage.source for passage in passages))
            return Found(tuple(passage.id for passage in passages), cited, (), passages)
        chosen = [self._examples[place] for place in places]
        cited = tuple(dict.fromkeys(example.source for example in chosen))
        return Found(tuple(one.id for one in chosen), cited, tuple(turns_only(one.messages) for one in chosen))

    @cached_property
    def _documents(self) -> Documents | None:
        digest = self._candidate.documents
        return None if digest is None else Documents(self._store, digest)

    @cached_property
    def _examples(self) -> list[Example]:
        if self._candidate.dataset is None:
            raise UsageError(f"candidate {self._candidate.name} names no dataset to look things up in")
        return load_dataset(self._store, self._candidate.dataset).examples("train")

    @cached_property
    def _places_of_group(self) -> dict[str, frozenset[int]]:
        places: dict[str, set[int]] = {}
        for place, example in enumerate(self._examples):
            places.setdefault(example.group, set()).add(place)
        return {group: frozenset(each) for group, each in places.items()}

    @cached_property
    def _by_words(self) -> Index:
        return example_index(self._examples)

    @cached_property
    def _index(self) -> Index:
        by = self._candidate.retrieve.by if self._candidate.retrieve else "bm25"
        if self._documents is not None:
            texts = [f"{passage.title}\n{passage.text}".strip() for passage in self._documents.passages]
            return Index(texts, by, self._embed)
        return self._by_words if by == "bm25" else example_index(self._examples, by, self._embed)

    @property
    def _embed(self) -> Embed | None:
        digest = self._candidate.embedder
        if digest is None:
            return None
        from tunesmith.models.embedding import open_embedder

        embedder = open_embedder(digest)
        return lambda texts: embedder.embed(texts, self._store.root / "work" / "vectors")


def compose(candidate: Candidate, messages: Sequence[Message], found: Found = Found()) -> tuple[Message, ...]:
    """Put prompt, passages, shots and retrieved examples before the messages of a request or a training row."""
    if not messages:
        raise UsageError("there is nothing to answer", where="messages", fix="send at least one user message")
    own = [message.content for message in messages if message.role == "system"]
    system = "\n\n".join(part for part in (candidate.prompt.strip(), _cited(found.passages), *own) if part)
    shown = [message for example in (*candidate.shots, *found.shown) for message in example]
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


def _cited(passages: Sequence[Passage]) -> str:
    """Passages as the prompt shows them: numbered, each with its source, the best last."""
    if not passages:
        return ""
    blocks = []
    for number, passage in enumerate(passages, start=1):
        title = f", {passage.title}" if passage.title else ""
        blocks.append(f"[{number}] ({passage.source}{title})\n{passage.text}")
    return "Passages that may help:\n\n" + "\n\n".join(blocks)
