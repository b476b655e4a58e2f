"""What the running batch decodes: rows, and the prefixes that rows share.

Shapes: K key/value heads, D head size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from tunesmith.engines.constraint import Guide
from tunesmith.engines.native.adapters.adapter import PackedAdapter
from tunesmith.engines.native.decoding.pages import PAGE
from tunesmith.engines.native.network import ops
from tunesmith.engines.sampling import Listener, Sampling

_SHORT = 64  # tokens; a longer prompt's attention is faster in a product for itself than in the others' pass


@dataclass(eq=False, slots=True)
class Prefix:
    """What several prompts under one adapter begin with. keys, values: [K, prefilled, D] of every layer, of the tokens
    that were prefilled already."""

    ids: tuple[int, ...]
    adapter: PackedAdapter | None
    keys: list[Tensor] = field(default_factory=list)
    values: list[Tensor] = field(default_factory=list)
    prefilled: int = 0
    _pages: list[ops.PrefixPages] | None = None

    def pages(self) -> list[ops.PrefixPages]:
        """The keys and values of every layer in pages, as decoding reads them. All tokens must be prefilled."""
        if self._pages is None:
            self._pages = [ops.in_pages(*each, PAGE) for each in zip(self.keys, self.values, strict=True)]
        return self._pages


@dataclass(eq=False, slots=True)
class Row:
    """One answer to decode.

    ids: the prompt without the prefix, at least one token. limit: the most tokens to give. top: how many of the
    likeliest tokens to score at each step; None: no log-probabilities.
    """

    ids: Sequence[int]
    prefix: Prefix | None
    adapter: PackedAdapter | None
    limit: int
    sampling: Sampling
    listener: Listener
    guide: Guide | None = None
    top: int | None = None
    pages: list[int] = field(default_factory=list)
    prefilled: int = 0  # tokens of ids
    given: list[int] = field(default_factory=list)
    generator: torch.Generator | None = None

    @property
    def joins_pass(self) -> bool:
        """Whether its prompt is short and its prefix complete, so that the other rows' pass prefills it."""
        complete = self.prefix is None or self.prefix.prefilled == len(self.prefix.ids)
        return complete and len(self.ids) <= _SHORT

    @property
    def start(self) -> int:
        """The position of its first token after the prefix."""
        return 0 if self.prefix is None else len(self.prefix.ids)
