"""What is decoded: a row with what is wanted of it and given to it, and how its next token is chosen.

Shapes: K key/value heads, D head size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from tunesmith.engines.constraint import Guide
from tunesmith.engines.native.adapters.adapter import PackedAdapter
from tunesmith.engines.native.decoding.pages import PAGE
from tunesmith.engines.native.network import ops

_COLDEST = 1e-6  # as a temperature; below it nothing but the likeliest token is drawn
_SHORT = 64  # tokens of a prompt that joins the others' pass; a longer one's attention is a product of its own


@dataclass(frozen=True, slots=True)
class Sampling:
    """How a row's next token is chosen. temperature 0: the likeliest."""

    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0


@dataclass(frozen=True, slots=True)
class Score:
    """A token's log-probability under the model, and the likeliest tokens with theirs, the likeliest first."""

    logprob: float
    top: tuple[tuple[int, float], ...]


class Listener(Protocol):
    """Whoever is told what a row is given, by the thread that decodes."""

    def take(self, token: int, score: Score | None) -> bool:
        """The next token; whether the row shall end with it. score: where the row asks for it."""
        ...

    def end(self, *, stopped: bool, error: BaseException | None = None) -> None:
        """No more will come. stopped: by an end token."""


@dataclass(eq=False, slots=True)
class Prefix:
    """What several prompts under one adapter begin with. read: how many of its tokens are in keys and values
    [K, read, D] of every layer."""

    ids: tuple[int, ...]
    adapter: PackedAdapter | None
    keys: list[Tensor] = field(default_factory=list)
    values: list[Tensor] = field(default_factory=list)
    read: int = 0
    _pages: list[ops.PrefixPages] | None = None

    def pages(self) -> list[ops.PrefixPages]:
        """The same as decoding reads them, once all of it was read."""
        if self._pages is None:
            self._pages = [ops.in_pages(*each, PAGE) for each in zip(self.keys, self.values, strict=True)]
        return self._pages


@dataclass(eq=False, slots=True)
class Row:
    """One answer to decode. ids: the prompt, without what prefix holds, one token at least. limit: most tokens to be
    given. top: how many of the likeliest tokens to name at each step, None for no log-probabilities."""

    ids: Sequence[int]
    prefix: Prefix | None
    adapter: PackedAdapter | None
    limit: int
    sampling: Sampling
    listener: Listener
    guide: Guide | None = None
    top: int | None = None
    pages: list[int] = field(default_factory=list)
    read: int = 0  # tokens of ids that were read
    given: list[int] = field(default_factory=list)
    generator: torch.Generator | None = None

    @property
    def joins(self) -> bool:
        """Whether its prompt is read in the others' pass: a short one, once its prefix was read."""
        there = self.prefix is None or self.prefix.read == len(self.prefix.ids)
        return there and len(self.ids) <= _SHORT

    @property
    def start(self) -> int:
        """The position of its own first token."""
        return 0 if self.prefix is None else len(self.prefix.ids)


def scored(logprobs: Tensor, token: int, top: int) -> Score:
    """What a token scored among logprobs [vocabulary], and the top likeliest."""
    values, places = logprobs.topk(top)
    return Score(float(logprobs[token]), tuple(zip(places.tolist(), values.tolist(), strict=True)))


def sample(scores: Tensor, sampling: Sampling, generator: torch.Generator) -> int:
    """Draw from the smallest set of tokens whose probability reaches top_p (Holtzman et al. 2019)."""
    # From the highest on: of a temperature near zero all others go to zero, where scores over it would be no numbers.
    chances = torch.softmax((scores - scores.max()) / max(sampling.temperature, _COLDEST), -1)
    if sampling.top_p >= 1.0:
        return int(torch.multinomial(chances, 1, generator=generator))
    chances, tokens = chances.sort(descending=True)
    chances[chances.cumsum(-1) - chances >= sampling.top_p] = 0.0
    return int(tokens[torch.multinomial(chances, 1, generator=generator)])
