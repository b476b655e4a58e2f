"""The running batch: rows join it as others end, behind different shared prefixes and under different adapters.

What several prompts begin with is computed once. A row's own keys and values lie in pages (Kwon et al. 2023, vLLM),
reserved whole when it joins, so that none is ever put out again; rows join in the order in which they came, so none
waits for ever. Short prompts are read in the pass that gives the others their next tokens, long ones in parts between
two passes (Agrawal et al. 2023, Sarathi).

Shapes: B rows, K key/value heads, G query heads for each, P tokens of a shared prefix, D head size.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from tunesmith.core.errors import Refused
from tunesmith.engines.constraint import hold_
from tunesmith.engines.native.adapters.adapter import PackedAdapter, adapted_linear
from tunesmith.engines.native.adapters.batch import AdapterBatch
from tunesmith.engines.native.decoding.pages import PAGE, PageCache
from tunesmith.engines.native.decoding.rows import Prefix, Row, sample, scored
from tunesmith.engines.native.network import ops
from tunesmith.engines.native.network.attention import Blocks, Layout, mix
from tunesmith.engines.native.network.network import Attend, Linear, Network, angles, forward, frozen_linear, logits
from tunesmith.engines.native.network.passes import FactorsAt, Pass, fits

MOST_ROWS = 64
_MOST_ADAPTERS = 8  # in one batch: every row pays for the products of all of them
_CACHE_BYTES = 1 << 30
_READ = 512  # tokens of prompts that are read between two steps


class Batch:
    """Rows under way and rows that wait. For one thread."""

    def __init__(
        self, network: Network, stop_ids: frozenset[int], most_rows: int = MOST_ROWS, cache_bytes: int = _CACHE_BYTES
    ) -> None:
        self._network, self._stop_ids, self._most_rows = network, stop_ids, most_rows
        self.cache = PageCache(network, cache_bytes)
        self.waiting: deque[Row] = deque()
        self.rows: list[Row] = []
        self._steady: _Together | None = None  # the live rows' pass, until one joins or ends
        self._stack: tuple[list[PackedAdapter], AdapterBatch] | None = None
        self._whole = fits(network)

    def __bool__(self) -> bool:
        """Whether there is anything to do."""
        return bool(self.rows or self.waiting)

    def drop(self, rows: Iterable[Row]) -> None:
        """Nobody waits for these any more."""
        gone = set(rows)
        self.waiting = deque(row for row in self.waiting if row not in gone)
        for row in [row for row in self.rows if row in gone]:
            self._remove(row)

    def fail(self, error: BaseException) -> None:
        """End every row under way: after an error in the midst of a step, nothing of them can be relied on."""
        failed, self.rows = self.rows, []
        self.cache.clear()
        self._steady = None
        for row in failed:
            row.listener.end(stopped=False, error=error)

    @torch.inference_mode()
    def step(self) -> None:
        """Let rows in, read a part of what is unread, and give every row that was read whole its next token."""
        self._admit()
        begun = self._read_some()
        together = self._arranged()
        if together is not None:
            self._give(together.rows, self._advance(together))
        if begun:
            hidden = torch.stack([last for _, last in begun])
            self._give([row for row, _ in begun], logits(self._network, hidden))
            self._steady = None

    def _admit(self) -> None:
        """In order: one that does not fit yet is not overtaken."""
        while self.waiting and len(self.rows) < self._most_rows:
            row = self.waiting[0]
            if len({one.adapter for one in (*self.rows, row)} - {None}) > _MOST_ADAPTERS:
                return
            try:
                pages = self.cache.lend(len(row.ids) + row.limit)
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
        self.cache.give_back(row.pages)
        self._steady = None

    # Reading long prompts and prefixes

    def _read_some(self) -> list[tuple[Row, Tensor]]:
        """Read some tokens of the oldest unread prefix or long prompt, or all of several that fit together: the rows
        that were read whole, each with the hidden state of its last token."""
        unread = [row for row in self.rows if row.read < len(row.ids) and not row.joins]
        if not unread:
            return []
        first, prefix = unread[0], unread[0].prefix
        linear = self._weights([first.adapter]).linear
        if prefix is not None and prefix.read < len(prefix.ids):
            self._read_prefix(prefix, linear)
            return []
        chosen = [first]
        longest = min(_READ, len(first.ids) - first.read)
        for row in unread[1:] if len(first.ids) <= _READ else ():
            padded = max(longest, len(row.ids)) * (len(chosen) + 1)
            if (row.prefix, row.adapter) == (prefix, first.adapter) and padded <= _READ:
                longest = max(longest, len(row.ids))
                chosen.append(row)
        parts = [row.ids[row.read : row.read + longest] for row in chosen]
        hidden = self._read(first, chosen, parts, linear)
        for row, part in zip(chosen, parts, strict=True):
            row.read += len(part)
        whole = [(row, last) for row, last in zip(chosen, hidden, strict=True) if row.read == len(row.ids)]
        if not whole:  # the others' turn, before its next part
            self.rows.remove(first)
            self.rows.append(first)
        return whole

    def _read(self, first: Row, rows: Sequence[Row], parts: Sequence[Sequence[int]], linear: Linear) -> Tensor:
        """Read a part of each row, all behind what first stands behind; hidden states [B, M] of each one's last."""
        each = [(row, row.read + number) for row, part in zip(rows, parts, strict=True) for number in range(len(part))]
        where = (
            torch.tensor([row.pages[place // PAGE] for row, place in each]),
            torch.tensor([n % PAGE for _, n in each]),
        )
        own = torch.tensor(first.pages)

        def before(layer: int) -> tuple[Tensor, Tensor] | None:
            found = [] if first.prefix is None else [(first.prefix.keys[layer], first.prefix.values[layer])]
            if first.read:
                plain = ops.places_of(self.cache.keys[layer][own], self.cache.values[layer][own])
                k, v = (x.transpose(0, 1).flatten(1, 2)[:, : first.read] for x in plain)
                found.append((k, v))
            return None if not found else (torch.cat([k for k, _ in found], 1), torch.cat([v for _, v in found], 1))

        def keep(layer: int, layout: Layout, blocks: Blocks) -> None:
            caches = self.cache.keys[layer], self.cache.values[layer]
            ops.decode_keep(blocks.k, blocks.v, layout.row_of, layout.place_of, *where, *caches)

        hidden = _run(self._network, linear, parts, first.start + first.read, before, keep)
        return hidden[torch.tensor([len(part) for part in parts]).cumsum(0) - 1]

    def _read_prefix(self, prefix: Prefix, linear: Linear) -> None:
        part = prefix.ids[prefix.read : prefix.read + _READ]
        keys: list[Tensor] = []
        values: list[Tensor] = []

        def before(layer: int) -> tuple[Tensor, Tensor] | None:
            return (prefix.keys[layer], prefix.values[layer]) if prefix.read else None

        def keep(_layer: int, _layout: Layout, blocks: Blocks) -> None:
            keys.append(blocks.k[:, 0])
            values.append(blocks.v[:, 0])

        _run(self._network, linear, [part], prefix.read, before, keep)
        if prefix.read:
            keys = [torch.cat(both, 1) for both in zip(prefix.keys, keys, strict=True)]
            values = [torch.cat(both, 1) for both in zip(prefix.values, values, strict=True)]
        prefix.keys, prefix.values, prefix.read = keys, values, prefix.read + len(part)

    # One pass of all rows that were read, and of short prompts

    def _arranged(self) -> _Together | None:
        """What the next pass runs: of each row the token it was given last, and short prompts whole. The weights, which
        take most of a pass to be read, are so read once for both."""
        short, tokens = [], 0
        for row in self.rows:
            if row.joins and row.read < len(row.ids) and tokens + len(row.ids) <= _READ:
                short.append(row)
                tokens += len(row.ids)
        live = [row for row in self.rows if row.given]
        if short:
            return _Together(self._network, [*live, *short], self._weights)
        if self._steady is None and live:
            self._steady = _Together(self._network, live, self._weights)
        return self._steady

    def _advance(self, together: _Together) -> Tensor:
        """Run a pass; logits [B, vocabulary] of its rows."""
        network, places = self._network, together.places
        ids, positions = together.ids(), places.lengths + together.starts
        if self._whole and together.weights.factors is not None:
            if together.whole is None:
                groups = [(None if prefix is None else prefix.pages(), rows) for prefix, rows in together.groups]
                caches = (self.cache.keys, self.cache.values)
                together.whole = Pass(network, together.weights.factors, places, groups, caches)
            hidden = together.whole.run(ids, positions)
        else:
            hidden = forward(network, ids, together.weights.linear, self._attention(together, positions))
        if together is self._steady:
            places.grow()
            return logits(network, hidden)
        for row in together.rows:
            row.read = len(row.ids)
        self._steady = None
        return logits(network, hidden[together.last])

    def _attention(self, together: _Together, positions: Tensor) -> Attend:
        network, places, shape = self._network, together.places, self._network.shape
        turns = angles(network, positions)

        def attend(layer: int, qkv: Tensor) -> Tensor:
            keys, values = self.cache.keys[layer], self.cache.values[layer]
            how = (shape.attention_scale, network.layers[layer].window, shape.score_cap)
            q = ops.decode_split(qkv, *turns[network.layers[layer].rotary], keys, values, places)
            out = q.new_empty(q.shape[1], q.shape[0] * q.shape[2] * q.shape[3])
            for prefix, tokens in together.groups:
                early = None if prefix is None else prefix.pages()[layer]
                ops.decode_mix(q, early, keys, values, places, tokens, out, *how)
            return out

        return attend

    def _weights(self, adapters: Sequence[PackedAdapter | None]) -> _Weights:
        """The weights for rows of these adapters."""
        several = list(dict.fromkeys(adapters))
        if several == [None]:
            return _Weights(frozen_linear(self._network), lambda _: None)
        if len(several) == 1 and (only := several[0]) is not None:
            return _Weights(adapted_linear(self._network, only), only.plain_factors)
        named = [adapter for adapter in several if adapter is not None]
        if self._stack is None or not set(named) <= set(self._stack[0]):
            # Those that were there may come again: they stay while there is room.
            kept = [] if self._stack is None else [one for one in self._stack[0] if one not in named]
            named = [*kept[: _MOST_ADAPTERS - len(named)], *named]
            self._stack = (named, AdapterBatch(self._network, named))
        held, stack = self._stack
        owners = torch.tensor([-1 if one is None else held.index(one) for one in adapters])
        return _Weights(stack.linear(owners), stack.factors(owners))

    # What rows are given

    def _give(self, rows: Sequence[Row], scores: Tensor) -> None:
        """Choose each row's next token by its scores [B, vocabulary] and tell its listener."""
        told = [None if row.top is None else scores[place].float().log_softmax(-1) for place, row in enumerate(rows)]
        failed: dict[Row, Exception] = {}
        hold_(scores, [row.guide for row in rows])
        likeliest: list[int] = ops.largest(scores).tolist()
        for place, row in enumerate(rows):
            try:
                token = likeliest[place]
                if row.sampling.temperature > 0:
                    assert row.generator is not None
                    token = sample(scores[place].float(), row.sampling, row.generator)
                self._give_one(row, token, told[place])
            except Exception as error:  # noqa: BLE001 - scores, a schema or a listener: this row's fault alone
                failed[row] = error
        for row, why in failed.items():
            self._remove(row)
            row.listener.end(stopped=False, error=why)

    def _give_one(self, row: Row, token: int, logprobs: Tensor | None) -> None:
        stopped = token in self._stop_ids
        ended = stopped
        row.given.append(token)
        if not stopped:
            if row.guide is not None:
                row.guide.follow(token)
            ended = row.listener.take(token, None if logprobs is None else scored(logprobs, token, row.top or 0))
        if ended or len(row.given) >= row.limit:
            self._remove(row)
            row.listener.end(stopped=stopped)


class _Weights(NamedTuple):
    """The linear layers for rows of some adapters, and what of those adapters a whole pass takes; None: it cannot."""

    linear: Linear
    factors: FactorsAt | None


class _Together:
    """The tokens of one pass, T of them, those behind one prefix side by side: of a row that was given something its
    last one, of another its prompt, each token of which sees those before it as if they had been given.

    groups: (prefix, its tokens). starts: [T] positions of their rows' own first tokens. last: [B] each row's last token
    among all.
    """

    def __init__(
        self, network: Network, rows: Sequence[Row], weights: Callable[[Sequence[PackedAdapter | None]], _Weights]
    ) -> None:
        behind: dict[Prefix | None, list[Row]] = {}
        for row in rows:
            behind.setdefault(row.prefix, []).append(row)
        self.rows = [row for several in behind.values() for row in several]
        counts = [1 if row.given else len(row.ids) for row in self.rows]
        self.last = torch.tensor(counts).cumsum(0) - 1
        self.groups: list[tuple[Prefix | None, slice]] = []
        first = 0
        for prefix, several in behind.items():
            end = first + sum(1 if row.given else len(row.ids) for row in several)
            self.groups.append((prefix, slice(first, end)))
            first = end
        each = [row for row, count in zip(self.rows, counts, strict=True) for _ in range(count)]
        self.weights = weights([row.adapter for row in each])
        self.whole: Pass | None = None  # made at its first run
        self.starts = torch.tensor([row.start for row in each])
        most, shape = max(len(row.pages) for row in self.rows), network.shape
        table = torch.tensor([row.pages + [0] * (most - len(row.pages)) for row in self.rows])
        table = table.repeat_interleave(torch.tensor(counts), 0)
        lengths = torch.tensor([place for row in self.rows for place in _due(row)])
        sizes = (shape.kv_heads, shape.heads // shape.kv_heads, shape.head, PAGE)
        self.places = ops.Places(table, lengths, *sizes)

    def ids(self) -> Tensor:
        """The tokens [T]."""
        return torch.tensor([token for row in self.rows for token in (row.given[-1:] or row.ids)])


def _due(row: Row) -> Sequence[int]:
    """The places of the tokens that a row has in its next pass."""
    place = len(row.ids) + len(row.given) - 1
    return (place,) if row.given else range(place + 1)


def _run(
    network: Network,
    linear: Linear,
    parts: Sequence[Sequence[int]],
    start: int,
    before: Callable[[int], tuple[Tensor, Tensor] | None],
    keep: Callable[[int, Layout, Blocks], None],
) -> Tensor:
    """Hidden states [T, M] of rows' tokens, each row from position start on, behind keys and values [K, P, D] that
    before gives for a layer. keep is given each layer's new ones."""
    lengths = [len(part) for part in parts]
    positions = torch.tensor([start + place for length in lengths for place in range(length)])
    layout = Layout(0, lengths, positions, network)

    def attend(layer: int, qkv: Tensor) -> Tensor:
        blocks = layout.split(qkv, layer)
        earlier = before(layer)
        keep(layer, layout, blocks)
        if earlier is not None:
            blocks = Blocks(blocks.qp, *earlier, *blocks[3:])
        early, mixed, *_ = mix(layout, blocks, layer)
        return layout.tokens(early, mixed)

    ids = torch.tensor([token for part in parts for token in part])
    return forward(network, ids, linear, attend)
