"""Continuous batching: rows join the running batch as others end, with different shared prefixes and adapters.

What several prompts begin with is computed once. A row's keys and values lie in pages (Kwon et al. 2023, vLLM). All of
its pages are reserved when it joins, so no row is ever evicted. Rows join in the order in which they arrived, so no row
waits forever. Short prompts are prefilled in the pass that decodes the other rows. Long prompts are prefilled in chunks
between two passes (Agrawal et al. 2023, Sarathi).

Shapes: B rows, T tokens of a pass, M width, K key/value heads, G query heads for each, P tokens of a shared prefix,
D head size.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from tunesmith.core.errors import Refused
from tunesmith.engines.constraint import mask_disallowed_
from tunesmith.engines.native.adapters.adapter import PackedAdapter, adapted_linear
from tunesmith.engines.native.adapters.batch import AdapterBatch
from tunesmith.engines.native.decoding.pages import PAGE, PageCache
from tunesmith.engines.native.decoding.rows import Prefix, Row
from tunesmith.engines.native.network import ops
from tunesmith.engines.native.network.attention import Blocks, Layout, mix
from tunesmith.engines.native.network.network import Attend, Linear, Network, angles, forward, frozen_linear, logits
from tunesmith.engines.native.network.passes import FactorsAt, Pass, fits
from tunesmith.engines.sampling import sample, score_of

MOST_ROWS = 64
_MOST_ADAPTERS = 8  # in one batch: every row pays for the products of all of them
_CACHE_BYTES = 1 << 30
_CHUNK = 512  # prompt tokens that are prefilled between two passes


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
        """Admit rows, prefill a chunk of prompt tokens, and give each prefilled row its next token."""
        self._admit()
        prefilled = self._prefill_some()
        plan = self._plan_pass()
        if plan is not None:
            self._choose_tokens(plan.rows, self._run_pass(plan))
        if prefilled:
            hidden = torch.stack([last for _, last in prefilled])
            self._choose_tokens([row for row, _ in prefilled], logits(self._network, hidden))
            self._plan = None

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
            row.generator = torch.Generator().manual_seed(row.sampling.seed)
            self.rows.append(self.waiting.popleft())

    def _remove(self, row: Row) -> None:
        self.rows.remove(row)
        self.cache.free(row.pages)
        self._plan = None

    # Prefilling long prompts and prefixes

    def _prefill_some(self) -> list[tuple[Row, Tensor]]:
        """Prefill a chunk of the oldest unfinished prefix or long prompt, or several long prompts that fit together.

        Returns the rows whose prompt is complete, each with the hidden state [M] of its last token.
        """
        unfinished = [row for row in self.rows if row.prefilled < len(row.ids) and not row.joins_pass]
        if not unfinished:
            return []
        first, prefix = unfinished[0], unfinished[0].prefix
        linear = self._weights([first.adapter]).linear
        if prefix is not None and prefix.prefilled < len(prefix.ids):
            self._prefill_prefix(prefix, linear)
            return []
        chosen = [first]
        longest = min(_CHUNK, len(first.ids) - first.prefilled)
        for row in unfinished[1:] if len(first.ids) <= _CHUNK else ():
            padded = max(longest, len(row.ids)) * (len(chosen) + 1)
            if (row.prefix, row.adapter) == (prefix, first.adapter) and padded <= _CHUNK:
                longest = max(longest, len(row.ids))
                chosen.append(row)
        parts = [row.ids[row.prefilled : row.prefilled + longest] for row in chosen]
        hidden = self._prefill(first, chosen, parts, linear)
        for row, part in zip(chosen, parts, strict=True):
            row.prefilled += len(part)
        complete = [(row, last) for row, last in zip(chosen, hidden, strict=True) if row.prefilled == len(row.ids)]
        if not complete:  # other long prompts get the next turn
            self.rows.remove(first)
            self.rows.append(first)
        return complete

    def _prefill(self, first: Row, rows: Sequence[Row], parts: Sequence[Sequence[int]], linear: Linear) -> Tensor:
        """Prefill a part of each row, all with first's prefix; returns the hidden state of each part's last token,
        [B, M]."""
        places = [(row, row.prefilled + n) for row, part in zip(rows, parts, strict=True) for n in range(len(part))]
        targets = (
            torch.tensor([row.pages[place // PAGE] for row, place in places]),
            torch.tensor([place % PAGE for _, place in places]),
        )
        pages = torch.tensor(first.pages)

        def earlier(layer: int) -> tuple[Tensor, Tensor] | None:
            found = [] if first.prefix is None else [(first.prefix.keys[layer], first.prefix.values[layer])]
            if first.prefilled:
                plain = ops.places_of(self.cache.keys[layer][pages], self.cache.values[layer][pages])
                k, v = (x.transpose(0, 1).flatten(1, 2)[:, : first.prefilled] for x in plain)
                found.append((k, v))
            return None if not found else (torch.cat([k for k, _ in found], 1), torch.cat([v for _, v in found], 1))

        def keep(layer: int, layout: Layout, blocks: Blocks) -> None:
            caches = self.cache.keys[layer], self.cache.values[layer]
            ops.decode_keep(blocks.k, blocks.v, layout.row_of, layout.place_of, *targets, *caches)

        hidden = _forward_parts(self._network, linear, parts, first.start + first.prefilled, earlier, keep)
        return hidden[torch.tensor([len(part) for part in parts]).cumsum(0) - 1]

    def _prefill_prefix(self, prefix: Prefix, linear: Linear) -> None:
        part = prefix.ids[prefix.prefilled : prefix.prefilled + _CHUNK]
        keys: list[Tensor] = []
        values: list[Tensor] = []

        def earlier(layer: int) -> tuple[Tensor, Tensor] | None:
            return (prefix.keys[layer], prefix.values[layer]) if prefix.prefilled else None

        def keep(_layer: int, _layout: Layout, blocks: Blocks) -> None:
            keys.append(blocks.k[:, 0])
            values.append(blocks.v[:, 0])

        _forward_parts(self._network, linear, [part], prefix.prefilled, earlier, keep)
        if prefix.prefilled:
            keys = [torch.cat(both, 1) for both in zip(prefix.keys, keys, strict=True)]
            values = [torch.cat(both, 1) for both in zip(prefix.values, values, strict=True)]
        prefix.keys, prefix.values, prefix.prefilled = keys, values, prefix.prefilled + len(part)

    # One pass of all prefilled rows and of short prompts

    def _plan_pass(self) -> _PassPlan | None:
        """The next pass: the newest token of each decoded row, and short prompts whole.

        Most of a pass is spent on reading the weights. Putting both into one pass reads them once.
        """
        short, tokens = [], 0
        for row in self.rows:
            if row.joins_pass and row.prefilled < len(row.ids) and tokens + len(row.ids) <= _CHUNK:
                short.append(row)
                tokens += len(row.ids)
        decoded = [row for row in self.rows if row.given]
        if short:
            return _PassPlan(self._network, [*decoded, *short], self._weights)
        if self._plan is None and decoded:
            self._plan = _PassPlan(self._network, decoded, self._weights)
        return self._plan

    def _run_pass(self, plan: _PassPlan) -> Tensor:
        """Run a pass; returns the logits [B, vocabulary] of each row's last token."""
        network, places = self._network, plan.places
        ids, positions = plan.ids(), places.lengths + plan.starts
        if self._fits_native_pass and plan.weights.factors is not None:
            if plan.native is None:
                groups = [(None if prefix is None else prefix.pages(), rows) for prefix, rows in plan.groups]
                caches = (self.cache.keys, self.cache.values)
                plan.native = Pass(network, plan.weights.factors, places, groups, caches)
            hidden = plan.native.run(ids, positions)
        else:
            hidden = forward(network, ids, plan.weights.linear, self._attention(plan, positions))
        if plan is self._plan:
            places.grow()
            return logits(network, hidden)
        for row in plan.rows:
            row.prefilled = len(row.ids)
        self._plan = None
        return logits(network, hidden[plan.last])

    def _attention(self, plan: _PassPlan, positions: Tensor) -> Attend:
        network, places, shape = self._network, plan.places, self._network.shape
        turns = angles(network, positions)

        def attend(layer: int, qkv: Tensor) -> Tensor:
            keys, values = self.cache.keys[layer], self.cache.values[layer]
            options = (shape.attention_scale, network.layers[layer].window, shape.score_cap)
            q = ops.decode_split(qkv, *turns[network.layers[layer].rotary], keys, values, places)
            out = q.new_empty(q.shape[1], q.shape[0] * q.shape[2] * q.shape[3])
            for prefix, tokens in plan.groups:
                pages = None if prefix is None else prefix.pages()[layer]
                ops.decode_mix(q, pages, keys, values, places, tokens, out, *options)
            return out

        return attend

    def _weights(self, adapters: Sequence[PackedAdapter | None]) -> _Weights:
        """The weights for rows of these adapters, one adapter a row."""
        distinct = list(dict.fromkeys(adapters))
        if distinct == [None]:
            return _Weights(frozen_linear(self._network), lambda _: None)
        if len(distinct) == 1 and (only := distinct[0]) is not None:
            return _Weights(adapted_linear(self._network, only), only.plain_factors)
        wanted = [adapter for adapter in distinct if adapter is not None]
        if self._adapter_batch is None or not set(wanted) <= set(self._adapter_batch[0]):
            # Earlier adapters may be wanted again, so they stay while there is room.
            earlier = (
                [] if self._adapter_batch is None else [each for each in self._adapter_batch[0] if each not in wanted]
            )
            wanted = [*earlier[: _MOST_ADAPTERS - len(wanted)], *wanted]
            self._adapter_batch = (wanted, AdapterBatch(self._network, wanted))
        held, batch = self._adapter_batch
        owners = torch.tensor([-1 if adapter is None else held.index(adapter) for adapter in adapters])
        return _Weights(batch.linear(owners), batch.factors(owners))

    # Choosing tokens

    def _choose_tokens(self, rows: Sequence[Row], scores: Tensor) -> None:
        """Choose each row's next token by its logits [B, vocabulary] and tell its listener."""
        logprobs = [
            None if row.top is None else scores[place].float().log_softmax(-1) for place, row in enumerate(rows)
        ]
        failed: dict[Row, Exception] = {}
        mask_disallowed_(scores, [row.guide for row in rows])
        likeliest: list[int] = ops.largest(scores).tolist()
        for place, row in enumerate(rows):
            try:
                token = likeliest[place]
                if row.sampling.temperature > 0:
                    assert row.generator is not None
                    token = sample(scores[place].float(), row.sampling, row.generator)
                self._append(row, token, logprobs[place])
            except Exception as error:  # noqa: BLE001 - the logits, the schema or the listener of this row only
                failed[row] = error
        for row, reason in failed.items():
            self._remove(row)
            row.listener.end(stopped=False, error=reason)

    def _append(self, row: Row, token: int, logprobs: Tensor | None) -> None:
        """Add a token to a row, and end the row where the token, the listener or the limit says so."""
        stopped = token in self._stop_ids
        ended = stopped
        row.given.append(token)
        if stopped and row.guide is not None:
            row.guide.check()
        if not stopped:
            if row.guide is not None:
                row.guide.follow(token)
            ended = row.listener.take(token, None if logprobs is None else score_of(logprobs, token, row.top or 0))
        if ended or len(row.given) >= row.limit:
            self._remove(row)
            row.listener.end(stopped=stopped)


class _Weights(NamedTuple):
    """The linear layers for rows of some adapters, and those adapters' factors for a native pass (None: it cannot
    apply them)."""

    linear: Linear
    factors: FactorsAt | None


class _PassPlan:
    """The T tokens of one pass, those with the same prefix next to each other.

    The pass has the newest token of a decoded row. Of another row it has the whole prompt, each token of which sees the
    tokens before it.

    groups: a prefix and the slice of its tokens. starts [T]: for each token, the position of its row's first token
    after the prefix. last [B]: the index of each row's last token.
    """

    def __init__(
        self, network: Network, rows: Sequence[Row], weights: Callable[[Sequence[PackedAdapter | None]], _Weights]
    ) -> None:
        by_prefix: dict[Prefix | None, list[Row]] = {}
        for row in rows:
            by_prefix.setdefault(row.prefix, []).append(row)
        self.rows = [row for group in by_prefix.values() for row in group]
        counts = [1 if row.given else len(row.ids) for row in self.rows]
        self.last = torch.tensor(counts).cumsum(0) - 1
        self.groups: list[tuple[Prefix | None, slice]] = []
        first = 0
        for prefix, group in by_prefix.items():
            end = first + sum(1 if row.given else len(row.ids) for row in group)
            self.groups.append((prefix, slice(first, end)))
            first = end
        row_of_token = [row for row, count in zip(self.rows, counts, strict=True) for _ in range(count)]
        self.weights = weights([row.adapter for row in row_of_token])
        self.native: Pass | None = None  # created when the plan runs first
        self.starts = torch.tensor([row.start for row in row_of_token])
        most, shape = max(len(row.pages) for row in self.rows), network.shape
        table = torch.tensor([row.pages + [0] * (most - len(row.pages)) for row in self.rows])
        table = table.repeat_interleave(torch.tensor(counts), 0)
        lengths = torch.tensor([place for row in self.rows for place in _places(row)])
        sizes = (shape.kv_heads, shape.heads // shape.kv_heads, shape.head, PAGE)
        self.places = ops.Places(table, lengths, *sizes)

    def ids(self) -> Tensor:
        """The tokens [T]."""
        return torch.tensor([token for row in self.rows for token in (row.given[-1:] or row.ids)])


def _places(row: Row) -> Sequence[int]:
    """The places in the row of its tokens in the next pass."""
    place = len(row.ids) + len(row.given) - 1
    return (place,) if row.given else range(place + 1)


def _forward_parts(
    network: Network,
    linear: Linear,
    parts: Sequence[Sequence[int]],
    start: int,
    earlier: Callable[[int], tuple[Tensor, Tensor] | None],
    keep: Callable[[int, Layout, Blocks], None],
) -> Tensor:
    """Hidden states [T, M] of the tokens of parts, each part at positions from start on.

    earlier: a layer's keys and values [K, P, D] that all parts see. keep: receives each layer's new keys and values.
    """
    lengths = [len(part) for part in parts]
    positions = torch.tensor([start + place for length in lengths for place in range(length)])
    layout = Layout(0, lengths, positions, network)

    def attend(layer: int, qkv: Tensor) -> Tensor:
        blocks = layout.split(qkv, layer)
        seen = earlier(layer)
        keep(layer, layout, blocks)
        if seen is not None:
            blocks = Blocks(blocks.qp, *seen, *blocks[3:])
        mixed_prefix, mixed, *_ = mix(layout, blocks, layer)
        return layout.tokens(mixed_prefix, mixed)

    ids = torch.tensor([token for part in parts for token in part])
    return forward(network, ids, linear, attend)
