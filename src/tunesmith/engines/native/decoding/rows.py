"""What the running batch decodes: rows, and the prefixes that rows share."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import torch

from tunesmith.engines.decoding.constraint import Guide
from tunesmith.engines.decoding.sampling import Listener, Sampling
from tunesmith.engines.native.adapters.adapter import PackedAdapter
from tunesmith.engines.native.network.ops import PrefixPages


@dataclass(eq=False, slots=True)
class Prefix:
    """What several prompts under one adapter begin with.

    layers: the keys and values of every layer, once prefilling has begun. A pass prefills it as it does a row.
    """

    ids: tuple[int, ...]
    adapter: PackedAdapter | None
    layers: list[PrefixPages] = field(default_factory=list)
    prefilled: int = 0
    prefix: ClassVar[None] = None
    start: ClassVar[int] = 0

    @property
    def pages(self) -> Sequence[int]:
        """The numbers of its pages in layers."""
        return range(len(self.layers[0].keys))

    @property
    def complete(self) -> bool:
        """Whether all tokens are prefilled."""
        return self.prefilled == len(self.ids)


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
    def start(self) -> int:
        """The position of its first token after the prefix."""
        return 0 if self.prefix is None else len(self.prefix.ids)
