"""Batched decoding: the prompts' common beginning is computed once, every row keeps its own static key/value cache.

Shapes: B rows, K key/value heads, G query heads for each, P tokens of the shared prefix, S places of a row's own cache,
D head size.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from dataclasses import dataclass

import torch
from llguidance import LLMatcher
from torch import Tensor

from tunesmith.inference.constraint import Constraints, follow
from tunesmith.models import ops
from tunesmith.models.attention import Blocks, Layout, mix
from tunesmith.models.batch import common_prefix
from tunesmith.models.network import Linear, Network, angles, forward, logits

# Rows that have ended are dropped from the batch once they make up this share of it.
_DROPPED_AT = 0.25


@dataclass(frozen=True)
class Prefix:
    """A computed beginning: its tokens, and keys and values [K, P, D] of every layer."""

    ids: tuple[int, ...]
    keys: tuple[Tensor, ...]
    values: tuple[Tensor, ...]


@dataclass(frozen=True, slots=True)
class Sampling:
    """How a row's next token is chosen. temperature 0: the likeliest."""

    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0


@torch.inference_mode()
def compute_prefix(network: Network, linear: Linear, ids: Sequence[int]) -> Prefix:
    """Run tokens that several prompts begin with."""
    keys: list[Tensor] = []
    values: list[Tensor] = []
    layout = Layout(0, (len(ids),), torch.arange(len(ids)), network)

    def attend(_layer: int, qkv: Tensor) -> Tensor:
        blocks = layout.split(qkv)
        keys.append(blocks.k[:, 0])
        values.append(blocks.v[:, 0])
        early, own, *_ = mix(layout, blocks)
        return layout.tokens(early, own)

    forward(network, torch.tensor(ids), linear, attend)
    return Prefix(tuple(ids), tuple(keys), tuple(values))


class Rows:
    """A batch under way. Each call of step gives every live row its next token."""

    def __init__(
        self,
        network: Network,
        linear: Linear,
        prompts: Sequence[Sequence[int]],
        room: int,
        samplings: Sequence[Sampling],
        prefix: Prefix | None,
        guides: Sequence[LLMatcher | None],
        constraints: Constraints | None,
    ) -> None:
        """prompts: ids, each longer than the prefix and beginning with it. room: most tokens a row will be given."""
        self._network, self._linear, self._prefix = network, linear, prefix
        self._shared = len(prefix.ids) if prefix else 0
        own = [list(prompt[self._shared :]) for prompt in prompts]
        shape = network.shape
        size = (len(own), shape.kv_heads, max(map(len, own)) + room, shape.head)
        self._keys = [torch.zeros(size, dtype=network.dtype) for _ in range(shape.layers)]
        self._values = [torch.zeros(size, dtype=network.dtype) for _ in range(shape.layers)]
        self._lengths = torch.tensor([len(ids) for ids in own])
        self._generators = [_generator(sampling) for sampling in samplings]
        self._samplings = list(samplings)
        self._guides, self._constraints = list(guides), constraints
        self._given: list[int] = []
        self._next: Tensor | None = self._prefill(own)  # logits of the token to come, once they are known

    @torch.inference_mode()
    def step(self) -> list[int]:
        """The next token of each live row; what a row was given is read at the step after."""
        scores = self._advance() if self._next is None else self._next
        if self._constraints is not None:
            scores = self._constraints.mask(self._guides, scores)
        self._given, self._next = self._choose(scores), None
        if self._constraints is not None:
            follow(self._guides, self._given)
        return self._given

    @torch.inference_mode()
    def drop(self, live: Sequence[int]) -> None:
        """Keep only the rows at these places."""
        kept = torch.tensor(live)
        self._keys = [cache.index_select(0, kept) for cache in self._keys]
        self._values = [cache.index_select(0, kept) for cache in self._values]
        self._lengths = self._lengths[kept]
        self._given = [self._given[row] for row in live]
        self._generators = [self._generators[row] for row in live]
        self._samplings = [self._samplings[row] for row in live]
        self._guides = [self._guides[row] for row in live]

    @torch.inference_mode()
    def _prefill(self, own: Sequence[Sequence[int]]) -> Tensor:
        lengths = [len(ids) for ids in own]
        positions = torch.tensor([self._shared + place for length in lengths for place in range(length)])
        layout = Layout(0, lengths, positions, self._network)

        def attend(layer: int, qkv: Tensor) -> Tensor:
            blocks = layout.split(qkv)
            for cache, new in ((self._keys[layer], blocks.k), (self._values[layer], blocks.v)):
                cache[:, :, : layout.longest] = new.transpose(0, 1)
            if self._prefix is not None:
                blocks = Blocks(blocks.qp, self._prefix.keys[layer], self._prefix.values[layer], *blocks[3:])
            early, mixed, *_ = mix(layout, blocks)
            return layout.tokens(early, mixed)

        ids = torch.tensor([token for row in own for token in row])
        hidden = forward(self._network, ids, self._linear, attend)
        return logits(self._network, hidden[self._lengths.cumsum(0) - 1])

    def _advance(self) -> Tensor:
        """Run the tokens given last; logits [B, vocabulary]."""
        network, lengths, scale = self._network, self._lengths, self._network.shape.attention_scale
        cos, sin = angles(network, lengths + self._shared)

        def attend(layer: int, qkv: Tensor) -> Tensor:
            keys, values = self._keys[layer], self._values[layer]
            q = ops.decode_split(qkv, cos, sin, keys, values, lengths)
            if self._prefix is None:
                return ops.decode_mix(q, None, keys, values, lengths, scale)
            kv, rows, group, size = q.shape
            shared = q.flatten(1, 2) @ self._prefix.keys[layer].transpose(1, 2)
            mixed = ops.decode_mix(q, shared, keys, values, lengths, scale)
            over = (shared @ self._prefix.values[layer]).view(kv, rows, group, size)
            mixed.view(rows, kv, group, size).add_(over.transpose(0, 1))
            return mixed

        hidden = forward(network, torch.tensor(self._given), self._linear, attend)
        self._lengths = lengths + 1
        return logits(network, hidden)

    def _choose(self, scores: Tensor) -> list[int]:
        likeliest: list[int] = ops.largest(scores).tolist()
        for row, sampling in enumerate(self._samplings):
            if sampling.temperature > 0:
                likeliest[row] = _sample(scores[row].float(), sampling, self._generators[row])
        return likeliest


def decode(
    network: Network,
    linear: Linear,
    prompts: Sequence[Sequence[int]],
    limits: Sequence[int],
    samplings: Sequence[Sampling],
    stop_ids: frozenset[int],
    prefix: Prefix | None,
    guides: Sequence[LLMatcher | None],
    constraints: Constraints | None,
) -> Generator[list[tuple[int, int | None]], set[int] | None, None]:
    """For each step the (row, token) of every row still under way; token None says the row met an end token.

    guides: what holds each row to its schema; constraints: what made them, None where no row has one. limits: most
    tokens of each row. A row is not given again after its end token or its last allowed one. A caller may
    send() a set of rows to end early.
    """
    rows = Rows(network, linear, prompts, max(limits), samplings, prefix, guides, constraints)
    order = list(range(len(prompts)))  # which row stands at which place
    given = [0] * len(prompts)
    over: set[int] = set()
    while order:
        told: list[tuple[int, int | None]] = []
        for row, token in zip(order, rows.step(), strict=True):
            if row in over:
                continue
            given[row] += 1
            if token in stop_ids:
                told.append((row, None))
                over.add(row)
            else:
                told.append((row, token))
                if given[row] >= limits[row]:
                    over.add(row)
        ended = yield told
        if ended:
            over.update(ended)
        live = [place for place, row in enumerate(order) if row not in over]
        if not live:
            return
        if len(live) <= len(order) * (1 - _DROPPED_AT):
            rows.drop(live)
            order = [order[place] for place in live]


def shared_length(prompts: Sequence[Sequence[int]]) -> int:
    """How many tokens can be computed once for all prompts: each keeps at least one of its own."""
    return min(common_prefix(prompts), min(map(len, prompts)) - 1)


def _generator(sampling: Sampling) -> torch.Generator:
    return torch.Generator().manual_seed(sampling.seed)


def _sample(scores: Tensor, sampling: Sampling, generator: torch.Generator) -> int:
    """Draw from the smallest set of tokens whose probability reaches top_p (Holtzman et al. 2019)."""
    chances, tokens = torch.softmax(scores / sampling.temperature, -1).sort(descending=True)
    chances[chances.cumsum(-1) - chances >= sampling.top_p] = 0.0
    return int(tokens[torch.multinomial(chances, 1, generator=generator)])
