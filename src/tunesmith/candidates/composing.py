"""Composes what a model sees: a candidate's prompt, shots and retrieved texts before a request or a training row.

No engine is needed here: training rows are composed before any weights are loaded.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Literal

from tunesmith.candidates.candidate import Candidate
from tunesmith.candidates.retrieval import Embed, Index, PassageIndex, example_index, last_request
from tunesmith.core.access import ANYONE, Caller
from tunesmith.core.errors import UsageError
from tunesmith.core.messages import Conversation, Message, Turns, tools_of, with_tools
from tunesmith.data.dataset import Example, load_dataset
from tunesmith.data.documents import Documents, Passage
from tunesmith.store.store import Store

# Which system prompt a request gets. replaced: the candidate's, in place of the request's own system turn.
PromptUsed = Literal["candidate", "replaced", "request", "none"]
_REMEMBERED = 512


@dataclass(frozen=True, slots=True)
class Retrieved:
    """What was retrieved for one request, the best match last.

    ids: of examples or passages. sources: their sources, each once. shown: the examples as turns.
    """

    ids: tuple[str, ...] = ()
    sources: tuple[str, ...] = ()
    shown: tuple[Turns, ...] = ()
    passages: tuple[Passage, ...] = ()


class Composer:
    """Composes conversations for one candidate. Reads the dataset and the documents on first use.

    caller: whom a request is answered for; passages that they may not see are not retrieved.
    """

    def __init__(self, store: Store, candidate: Candidate) -> None:
        self._store, self._candidate = store, candidate
        self._retrieve_text = lru_cache(_REMEMBERED)(self._look_up)

    @property
    def asked_as(self) -> Caller:
        """The caller that evaluations and `tunesmith chat` stand for, as the documents' settings name it."""
        return ANYONE if self._documents is None else self._documents.asked_as

    def conversation(self, messages: Conversation, caller: Caller) -> Turns:
        """The request with the candidate's prompt, shots and retrieved texts before it.

        The candidate's prompt replaces the request's own system turn; `prompt_used` tells where it does.
        """
        return compose(self._candidate, messages, self.retrieved(messages, caller))

    def training_conversation(self, example: Example) -> Turns:
        """A row as training sees it. Rows of its own group are not retrieved, as none would be for a new request.

        Passages with labels are not retrieved either: whatever the weights learn of them, they tell every caller. The
        answers of shots and retrieved examples have weight 0, or a row would be learned with each row that it is
        retrieved for. The row's own turns keep their weights.
        """
        composed = compose(self._candidate, example.messages, self.retrieved_without_group(example))
        before = len(composed) - len(turns_only(example.messages))
        return (*map(_not_learned, composed[:before]), *composed[before:])

    def retrieved(self, messages: Conversation, caller: Caller) -> Retrieved:
        """What is retrieved for a request; nothing where the candidate retrieves nothing."""
        return Retrieved() if self._candidate.retrieve is None else self._retrieve_text(last_request(messages), caller)

    def retrieved_without_group(self, example: Example) -> Retrieved:
        """What is retrieved for a training row when its own group is left out, for anybody."""
        retrieve = self._candidate.retrieve
        if retrieve is None:
            return Retrieved()
        if retrieve.from_ == "documents":
            return self._retrieve_text(last_request(example.request), ANYONE)
        skip = self._places_of_group.get(example.group, set())
        return self._shown(self._index.nearest(last_request(example.request), retrieve.k, skip))

    def nearest(self, messages: Conversation) -> float:
        """Similarity (0 to 1) of a request to the most similar training example; drift monitoring reads it.

        Raises UsageError for a candidate that names no dataset.
        """
        return self._by_words.similarity(last_request(messages))

    @cached_property
    def examples(self) -> list[Example]:
        """The training examples. Raises UsageError for a candidate that names no dataset."""
        if self._candidate.dataset is None:
            raise UsageError(f"candidate {self._candidate.name} names no dataset to look things up in")
        return load_dataset(self._store, self._candidate.dataset).examples("train")

    def _look_up(self, text: str, caller: Caller) -> Retrieved:
        # Remembered by text and caller, so that no caller's answer comes sooner because another one asked the same.
        assert self._candidate.retrieve is not None
        k = self._candidate.retrieve.k
        if self._documents is None:
            return self._shown(self._index.nearest(text, k))
        passages = tuple(self._passages.nearest(text, k, caller))
        cited = tuple(dict.fromkeys(passage.source for passage in passages))
        return Retrieved(tuple(passage.id for passage in passages), cited, (), passages)

    def _shown(self, places: Sequence[int]) -> Retrieved:
        chosen = [self.examples[place] for place in places]
        cited = tuple(dict.fromkeys(example.source for example in chosen))
        return Retrieved(tuple(one.id for one in chosen), cited, tuple(turns_only(one.messages) for one in chosen))

    @cached_property
    def _documents(self) -> Documents | None:
        digest = self._candidate.documents
        return None if digest is None else Documents(self._store, digest)

    @cached_property
    def _places_of_group(self) -> dict[str, set[int]]:
        places: dict[str, set[int]] = {}
        for place, example in enumerate(self.examples):
            places.setdefault(example.group, set()).add(place)
        return places

    @cached_property
    def _by_words(self) -> Index:
        return example_index(self.examples)

    @cached_property
    def _index(self) -> Index:
        return self._by_words if self._by == "bm25" else example_index(self.examples, self._by, self._embed)

    @cached_property
    def _passages(self) -> PassageIndex:
        assert self._documents is not None
        return PassageIndex(self._documents.passages, self._by, self._embed)

    @property
    def _by(self) -> str:
        return self._candidate.retrieve.by if self._candidate.retrieve else "bm25"

    @property
    def _embed(self) -> Embed | None:
        digest = self._candidate.embedder
        if digest is None:
            return None
        from tunesmith.models.embedding import open_embedder

        embedder = open_embedder(digest)
        return lambda texts: embedder.embed(texts, self._store.local("work", "vectors"))


def compose(candidate: Candidate, messages: Conversation, retrieved: Retrieved = Retrieved()) -> Turns:
    """Messages of a request or a training row, with prompt, passages, shots and retrieved examples before them.

    The system turn holds the candidate's prompt, or the request's own system turn where the candidate has no prompt;
    then the passages. Raises UsageError for no messages.
    """
    if not messages:
        raise UsageError("there is nothing to answer", where="messages", fix="send at least one user message")
    prompt = candidate.prompt.strip() or _own_system_turn(messages)
    system = "\n\n".join(part for part in (prompt, _cited(retrieved.passages)) if part)
    shown = [message for example in (*candidate.shots, *retrieved.shown) for message in example]
    turns = [message for message in messages if message.role != "system"]
    opening = [Message(role="system", content=system)] if system else []
    composed = (*opening, *shown, *turns)
    # Only the request's own tools are offered, on the first turn; those of shown examples are not.
    offered = any(message.tools for message in (*composed, *messages))
    return with_tools(composed, tools_of(messages)) if offered else composed


def prompt_used(candidate: Candidate, messages: Conversation) -> PromptUsed:
    """Which system prompt a candidate gives a request."""
    if candidate.prompt_source == "none":
        return "none"
    own = bool(_own_system_turn(messages))
    if candidate.prompt_source == "candidate":
        return "replaced" if own else "candidate"
    return "request" if own else "none"


def count_prompts(candidate: Candidate, requests: Iterable[Conversation]) -> dict[str, int]:
    """How many requests get which system prompt, without zeros."""
    return dict(sorted(Counter(str(prompt_used(candidate, request)) for request in requests).items()))


def describe_prompts(counts: Mapping[str, int]) -> str:
    """What `count_prompts` counted, in words."""
    total = sum(counts.values())
    replaced, own, none = (counts.get(key, 0) for key in ("replaced", "request", "none"))
    if replaced:
        return f"the candidate's prompt, which replaces the system turn of {replaced} of {total} rows"
    if own:
        return f"the system turn of {own} of {total} rows" + (", no system prompt for the others" if none else "")
    return "no system prompt" if none else "the candidate's prompt"


def _own_system_turn(messages: Conversation) -> str:
    return "\n\n".join(message.content.strip() for message in messages if message.role == "system").strip()


def turns_only(messages: Conversation) -> Turns:
    """An example as a shot: without its system turn, since the candidate's prompt comes first."""
    return tuple(message for message in messages if message.role != "system")


def _not_learned(message: Message) -> Message:
    return message.model_copy(update={"weight": 0}) if message.role == "assistant" else message


def _cited(passages: Sequence[Passage]) -> str:
    """Passages as the prompt shows them: numbered, each with its source, the best match last."""
    if not passages:
        return ""
    blocks = []
    for number, passage in enumerate(passages, start=1):
        title = f", {passage.title}" if passage.title else ""
        blocks.append(f"[{number}] ({passage.source}{title})\n{passage.text}")
    return "Passages that may help:\n\n" + "\n\n".join(blocks)
