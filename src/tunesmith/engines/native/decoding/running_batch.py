"""Continuous batching: rows join the running batch as others end, with different shared prefixes and adapters.

What several prompts begin with is computed once. A row's keys and values lie in pages (Kwon et al. 2023, vLLM). All of
its pages are reserved when it joins, so no row is ever evicted. Rows join in the order in which they arrived, so no row
waits forever. One pass decodes rows and prefills parts of prompts, so that it reads the weights once for both (Agrawal
et al. 2023, Sarathi).

Shapes: B rows, T tokens of a pass, M width.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from tunesmith.core.errors import Refused
from tunesmith.engines.decoding.answers import DecodedRow
from tunesmith.engines.decoding.constraint import mask_disallowed_
from tunesmith.engines.native.adapters.adapter import PackedAdapter, adapted_linear
from tunesmith.engines.native.adapters.batch import AdapterBatch
from tunesmith.engines.native.network import ops
from tunesmith.engines.native.network.network import Attend, Linear, Network, angles, forward, frozen_linear, logits
from tunesmith.engines.native.network.ops import PrefixPages, page_shapes
from tunesmith.engines.native.network.passes import Caches, FactorsAt, Pass, fits
from tunesmith.engines.native.runtime import LargePages

MOST_ROWS = 64
_MOST_ADAPTERS = 8  # in one batch: every row pays for the products of all of them
_CACHE_BYTES = 1 << 30
_CHUNK = 512  # prompt tokens in a pass at most


@dataclass(eq=False, slots=True)
class Prefix:
    """What several prompts under one adapter begin with.

    layers: the keys and values of every layer, once prefilling has begun. A pass prefills it as it does a row.
    """

    ids: tuple[int, ...]
    adapter: PackedAdapter | None
    layers: list[ops.PrefixPages] = field(default_factory=list)
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


@dataclass(eq=False, slots=True, kw_only=True)
class Row(DecodedRow):
    """One answer to decode. ids: the prompt without the prefix, at least one token."""

    prefix: Prefix | None = None
    adapter: PackedAdapter | None = None
    pages: list[int] = field(default_factory=list)
    prefilled: int = 0  # tokens of ids

    @property
    def start(self) -> int:
        """The position of its first token after the prefix."""
        return 0 if self.prefix is None else len(self.prefix.ids)


class RunningBatch:
    """Rows that are being decoded, and rows that wait to join. Must be used from one thread only."""

    def __init__(
        self, network: Network, stop_ids: frozenset[int], most_rows: int = MOST_ROWS, cache_bytes: int = _CACHE_BYTES
    ) -> None:
        self._network, self._stop_ids, self._most_rows = network, stop_ids, most_rows
        self.cache = PageCache(network, cache_bytes)
        self.waiting: deque[Row] = deque()
        self.rows: list[Row] = []
        self._plan: _PassPlan | None = None  # kept until a row joins or ends
        self._adapter_batch: tuple[list[PackedAdapter], AdapterBatch] | None = None
        self._fits_native_pass = fits(network)

    def __bool__(self) -> bool:
        """Whether any row is decoded or waits."""
        return bool(self.rows or self.waiting)

    def drop(self, rows: Iterable[Row]) -> None:
        """Stop decoding these rows, without telling their listeners."""
        dropped = set(rows)
        self.waiting = deque(row for row in self.waiting if row not in dropped)
        for row in [row for row in self.rows if row in dropped]:
            self._remove(row)

    def fail(self, error: BaseException) -> None:
        """End every row that is being decoded: after an error within a step, their state cannot be relied on."""
        failed, self.rows = self.rows, []
        self.cache.clear()
        self._plan = None
        for row in failed:
            row.listener.end(stopped=False, error=error)

    @torch.inference_mode()
    def step(self) -> None:
        """Admit rows, prefill parts of prompts, and give each prefilled row its next token."""
        self._admit()
        self._prefill_prefix()
        decoded, prompts = [row for row in self.rows if row.given], self._next_prompts()
        if prompts or (decoded and self._plan is None):
            self._plan = _PassPlan(self._network, decoded, prompts, self._weights)
        plan = self._plan
        if plan is None:
            return
        hidden = self._run_pass(plan, (self.cache.keys, self.cache.values))
        plan.places.grow()
        for row, part in prompts:
            row.prefilled += len(part)
        if prompts:
            self._plan = None
        rows = [*plan.decoded, *(row for row, _ in prompts)]
        complete = [number for number, row in enumerate(rows) if row.prefilled == len(row.ids)]
        if complete:
            scores = logits(self._network, hidden[plan.last[complete]])
            self._choose_tokens([rows[number] for number in complete], scores)

    def _admit(self) -> None:
        """Let waiting rows join in their order: a row that does not fit yet is not overtaken."""
        while self.waiting and len(self.rows) < self._most_rows:
            row = self.waiting[0]
            if len({other.adapter for other in (*self.rows, row)} - {None}) > _MOST_ADAPTERS:
                return
            try:
                pages = self.cache.allocate(len(row.ids) + row.limit)
            except Refused as error:
                self.waiting.popleft().listener.end(stopped=False, error=error)
                continue
            if pages is None:
                return
            row.pages = pages
            self.rows.append(self.waiting.popleft())

    def _remove(self, row: Row) -> None:
        self.rows.remove(row)
        self.cache.free(row.pages)
        self._plan = None

    # Passes

    def _prefill_prefix(self) -> None:
        """Prefill a part of the oldest unfinished prefix, in a pass of its own: its pages are not the cache's."""
        prefix = next((row.prefix for row in self.rows if row.prefix is not None and not row.prefix.complete), None)
        if prefix is None:
            return
        if not prefix.layers:
            shape, dtype, count = self._network.shape, self._network.dtype, -(-len(prefix.ids) // PAGE)
            sizes = page_shapes(shape.kv_heads, PAGE, shape.head, dtype)
            # Zeros, as in PageCache.
            pages = ([torch.zeros(count, *size, dtype=dtype) for size in sizes] for _ in range(shape.layers))
            prefix.layers = [PrefixPages(keys, values, len(prefix.ids)) for keys, values in pages]
        part = prefix.ids[prefix.prefilled : prefix.prefilled + _CHUNK]
        plan = _PassPlan(self._network, [], [(prefix, part)], self._weights)
        self._run_pass(plan, ([layer.keys for layer in prefix.layers], [layer.values for layer in prefix.layers]))
        prefix.prefilled += len(part)

    def _next_prompts(self) -> list[tuple[Row, Sequence[int]]]:
        """Rows with the parts of their prompts that the next pass prefills, up to _CHUNK tokens."""
        prompts: list[tuple[Row, Sequence[int]]] = []
        left = _CHUNK
        for row in self.rows:
            part = row.ids[row.prefilled : row.prefilled + left]
            if part and (row.prefix is None or row.prefix.complete):
                prompts.append((row, part))
                left -= len(part)
        if prompts and len(prompts[0][1]) == _CHUNK:  # other prompts get the next turn
            self.rows.remove(prompts[0][0])
            self.rows.append(prompts[0][0])
        return prompts

    def _run_pass(self, plan: _PassPlan, caches: Caches) -> Tensor:
        """Run a pass; returns the hidden states [T, M]."""
        network, ids, positions = self._network, plan.ids(), plan.places.lengths + plan.starts
        if not self._fits_native_pass or plan.factors is None:
            return forward(network, ids, plan.linear, self._attention(plan, positions, caches))
        if plan.native is None:
            plan.native = Pass(network, plan.factors, plan.places, plan.groups, caches)
        return plan.native.run(ids, positions)

    def _attention(self, plan: _PassPlan, positions: Tensor, caches: Caches) -> Attend:
        network, places, shape = self._network, plan.places, self._network.shape
        turns = angles(network, positions)

        def attend(layer: int, qkv: Tensor) -> Tensor:
            keys, values = caches[0][layer], caches[1][layer]
            options = (shape.attention_scale, network.layers[layer].window, shape.score_cap)
            q = ops.decode_split(qkv, *turns[network.layers[layer].rotary], keys, values, places)
            out = q.new_empty(q.shape[1], q.shape[0] * q.shape[2] * q.shape[3])
            for shared, tokens, prompt in plan.groups:
                pages = None if shared is None else shared[layer]
                ops.decode_mix(q, pages, keys, values, places, tokens, out, *options, prompt=prompt)
            return out

        return attend

    def _weights(self, adapters: Sequence[PackedAdapter | None]) -> tuple[Linear, FactorsAt | None]:
        """The linear layers for rows of these adapters, one adapter a row, and the adapters' factors for a native pass;
        None where it cannot apply them."""
        distinct = list(dict.fromkeys(adapters))
        if len(distinct) == 1:
            if (only := distinct[0]) is None:
                return frozen_linear(self._network), lambda _: None
            return adapted_linear(self._network, only), only.plain_factors
        wanted = [adapter for adapter in distinct if adapter is not None]
        if self._adapter_batch is None or not set(wanted) <= set(self._adapter_batch[0]):
            # Earlier adapters may be wanted again, so they stay while there is room.
            earlier = [each for each in (self._adapter_batch or ([],))[0] if each not in wanted]
            wanted = [*earlier[: _MOST_ADAPTERS - len(wanted)], *wanted]
            self._adapter_batch = (wanted, AdapterBatch(self._network, wanted))
        held, batch = self._adapter_batch
        owners = torch.tensor([-1 if adapter is None else held.index(adapter) for adapter in adapters])
        return batch.linear(owners), batch.factors(owners)

    # Choosing tokens

    def _choose_tokens(self, rows: Sequence[Row], scores: Tensor) -> None:
        """Choose each row's next token by its logits [B, vocabulary] and tell its listener."""
        logprobs = [
            None if row.request.top_logprobs is None else scores[place].float().log_softmax(-1)
            for place, row in enumerate(rows)
        ]
        mask_disallowed_(scores, [row.guide for row in rows], ops.forbid_)
        likeliest: list[int] = scores.float().argmax(-1).tolist()  # four times as fast as in bf16
        for place, row in enumerate(rows):
            failed: Exception | None = None
            try:
                token = row.choose(scores[place]) if row.request.temperature > 0 else likeliest[place]
                if not row.append(token, logprobs[place], self._stop_ids):
                    continue
            except Exception as error:  # noqa: BLE001 - the logits, the schema or the listener of this row only
                failed = error
            self._remove(row)
            row.listener.end(stopped=failed is None and token in self._stop_ids, error=failed)


class _PassPlan:
    """The T tokens of one pass: the newest token of decoded rows, those with the same prefix next to each other, and
    parts of prompts.

    decoded: the decoded rows in the order of their tokens. groups: the pages of a prefix by layer, the slice of its
    rows' tokens, and whether they are neighbouring ones of one prompt. starts [T]: for each token, the position of its
    row's first token after the prefix. last [B]: the index of the last token of each decoded row, then of each part.
    linear, factors: see RunningBatch._weights. native: created when the plan runs first.
    """

    def __init__(
        self,
        network: Network,
        decoded: Sequence[Row],
        prompts: Sequence[tuple[Row | Prefix, Sequence[int]]],
        weights: Callable[[Sequence[PackedAdapter | None]], tuple[Linear, FactorsAt | None]],
    ) -> None:
        by_prefix: dict[Prefix | None, list[Row]] = {}
        for row in decoded:
            by_prefix.setdefault(row.prefix, []).append(row)
        self.decoded, self._prompts = [row for group in by_prefix.values() for row in group], prompts
        rows = [*self.decoded, *(row for row, _ in prompts)]
        counts = [1] * len(decoded) + [len(part) for _, part in prompts]
        self.last = torch.tensor(counts).cumsum(0) - 1
        self.groups: list[tuple[Sequence[PrefixPages] | None, slice, bool]] = []
        first = 0
        for prefix, count, prompt in (
            *((prefix, len(group), False) for prefix, group in by_prefix.items()),
            *((row.prefix, len(part), True) for row, part in prompts),
        ):
            shared = None if prefix is None else prefix.layers
            self.groups.append((shared, slice(first, first + count), prompt))
            first += count
        row_of_token = [row for row, count in zip(rows, counts, strict=True) for _ in range(count)]
        self.linear, self.factors = weights([row.adapter for row in row_of_token])
        self.native: Pass | None = None
        self.starts = torch.tensor([row.start for row in row_of_token])
        most, shape = max(len(row.pages) for row in rows), network.shape
        table = torch.tensor([[*row.pages] + [0] * (most - len(row.pages)) for row in rows])
        table = table.repeat_interleave(torch.tensor(counts), 0)
        newest = [len(row.ids) + len(row.given) - 1 for row in self.decoded]
        parts = [row.prefilled + place for row, part in prompts for place in range(len(part))]
        sizes = (shape.kv_heads, shape.heads // shape.kv_heads, shape.head, PAGE)
        self.places = ops.Places(table, torch.tensor(newest + parts), *sizes)

    def ids(self) -> Tensor:
        """The tokens [T]."""
        newest = [row.given[-1] for row in self.decoded]
        return torch.tensor(newest + [token for _, part in self._prompts for token in part])


PAGE = 32  # places


class PageCache:
    """Keys and values of every layer, reserved when pages are allocated first.

    keys, values: for each layer its pages, in the layout of ops.page_shapes. A page's keys and values of all layers lie
    next to each other, and the first pages are allocated first. So of all that is reserved, the operating system maps
    only what rows have used. A row that needs more than most_bytes gets it while no other row holds a page; the memory
    is released afterwards.
    """

    def __init__(self, network: Network, most_bytes: int) -> None:
        self._network, shape = network, network.shape
        self._sizes = (shape.layers, 2, shape.kv_heads * PAGE * shape.head)  # of a page
        self.page_bytes = math.prod(self._sizes) * network.dtype.itemsize
        self._most = max(1, most_bytes // self.page_bytes)
        self.clear()

    @property
    def pages(self) -> int:
        """Number of reserved pages."""
        return len(self._memory)

    @property
    def allocated(self) -> int:
        """Number of pages that rows hold."""
        return self.pages - len(self._free)

    def allocate(self, places: int) -> list[int] | None:
        """Pages for so many places; None if too few are free now. Raises Refused if there is no memory for them."""
        wanted = -(-places // PAGE)
        if wanted > len(self._free):
            if self.allocated or wanted <= self.pages:
                return None
            self._reserve(max(wanted, self._most), wanted)
        return [self._free.pop() for _ in range(wanted)]

    def free(self, pages: Iterable[int]) -> None:
        """Take a row's pages back."""
        self._free.extend(pages)
        if not self.allocated and self.pages > self._most:
            self.clear()

    def clear(self) -> None:
        """Take all pages back and release their memory: no row holds one. After an error they may hold anything."""
        self._use(self._network.embedding.new_zeros(0, *self._sizes))

    def _reserve(self, pages: int, least: int) -> None:
        """Reserve so many pages, or as many as there is memory for, but at least `least`."""
        self.clear()  # before reserving: there may be no room for both
        while True:
            try:
                # Zeros, since attention multiplies unwritten places by zero, and a NaN would survive that.
                self._use(LargePages().zeros((pages, *self._sizes), self._network.dtype))
                return
            except (OSError, RuntimeError) as error:  # of mmap
                if pages == least:
                    raise Refused(
                        f"there is no memory for {least * PAGE} places of keys and values, "
                        f"{least * self.page_bytes / 1e6:.0f} MB",
                        fix="ask for a shorter answer, or give the process more memory (see `ulimit -v`)",
                    ) from error
                pages = max(least, pages // 2)

    def _use(self, memory: Tensor) -> None:
        shape = self._network.shape
        self._memory = memory
        self.keys, self.values = (
            [memory[:, layer, part].unflatten(-1, page) for layer in range(shape.layers)]
            for part, page in enumerate(page_shapes(shape.kv_heads, PAGE, shape.head, memory.dtype))
        )
        self._free = list(range(len(memory) - 1, -1, -1))
