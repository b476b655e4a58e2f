"""A LoRA adapter under training: fp32 master weights, bf16 copies that the step computes with.

bf16 has 8 bits of precision: an update of a small learning rate added to a bf16 weight rounds to nothing, so the
optimiser works on fp32 masters. All of an adapter's numbers lie in one buffer, so that what is done to each of them
(rounding, scaling, the optimiser) is one operation and not one for every layer.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tunesmith.engines.native.adapters.adapter import Adapter, Place, blocks, encode_adapter, target_names
from tunesmith.engines.native.adapters.dora import Magnitudes, dora_linear
from tunesmith.engines.native.adapters.loss import cross_entropy
from tunesmith.engines.native.adapters.pissa import Departure, principal
from tunesmith.engines.native.network.network import GROUPS, Linear, Network, recompute
from tunesmith.engines.native.network.products import TILE, LowRankFactors, PackedLinear, outer
from tunesmith.models.base import Base
from tunesmith.models.families import meant
from tunesmith.training.settings import TrainSettings


class Adapted(NamedTuple):
    """An adapted place: its pair, and where a backward pass leaves the gradients of a and c."""

    pair: LowRankFactors
    ga: Tensor
    gc: Tensor


class Lora:
    """Masters of every adapted group, and copies of them to compute with.

    masters: flat fp32 tensors: every a, every c and, with DoRA, every row's length, trained numbers alone. Of a group a
    is [n r, in], its n adapted parts' A one under another, and c is [r, out of those parts], their B transposed (see
    models.adapter.Adapter) side by side. Copies are as products take them: a [R, in] and c [R, out], R the sum of the
    parts' ranks rounded up to what tiles multiply, each part's c in rows of its own and times the adapter's scale.

    What an adapter of N numbers costs: 12 N bytes while it is trained (masters, AdamW's moments), 4 N during an update
    (the masters' gradients), and during a pass its copies: 2 bytes a number of each copy, zeros included, and twice
    that where tiles multiply them (laid out once for each direction). With rank 16 on every layer of a model of 135M,
    N is 4.9M and a copy has 9.6M numbers: 59 MB, 20 MB and 57 MB.
    """

    def __init__(self, network: Network, settings: TrainSettings) -> None:
        self.network, self.rank, self._b_rate = network, settings.rank, settings.b_rate
        self.alpha = float(settings.alpha if settings.alpha is not None else 2 * settings.rank)
        self.root = settings.scaling == "root"
        self.targets = frozenset(meant(settings.targets, target_names(), "train.targets"))
        first = 0 if settings.layers is None else max(0, network.shape.layers - settings.layers)
        self.places: list[Place] = [
            (number, group)
            for number in range(first, network.shape.layers)
            for group in GROUPS
            if blocks(network, group, self.rank, self.targets)
        ]
        # Where each part's c lies in its group's master and copy.
        self._parts = {group: list(self._side_by_side(group)) for group in {group for _, group in self.places}}
        shapes = list(zip(*(self._shapes(number, group) for number, group in self.places), strict=True))
        self.masters = [_flat(each) for each in shapes]
        self._a, self._c = (_views(master, each) for master, each in zip(self.masters, shapes, strict=True))
        self._start(settings.seed)
        self._departure: Departure | None = None
        if settings.start == "pissa":
            self._start_at_principal()
            self._departure = Departure(self._a, [self._spread(place) for place in range(len(self.places))])
        self._pairs: dict[Place, Adapted] = {}
        self._anchor = torch.zeros((), requires_grad=True)
        self.magnitudes: Magnitudes | None = None
        if settings.dora:
            self.magnitudes = Magnitudes(network, {place: self._rows(*place) for place in self.places})
            self.masters.append(self.magnitudes.master)

    @property
    def scale(self) -> float:
        """What the adapter's sum is multiplied with."""
        return self.alpha / (math.sqrt(self.rank) if self.root else self.rank)

    @property
    def parameters(self) -> int:
        """Trained numbers."""
        own = 0 if self.magnitudes is None else self.magnitudes.trained.count_nonzero()
        return int(sum(len(master) for master in self.masters[:2]) + own)

    def groups(self) -> list[dict[str, Any]]:
        """AdamW's groups. LoRA+ (Hayou et al. 2024): B, which starts at zero, learns best at a higher rate than A."""
        multiples = (1.0, self._b_rate, 1.0)
        return [{"params": [master], "multiple": each} for master, each in zip(self.masters, multiples, strict=False)]

    def linear(self) -> Linear:
        """The base's linear layers with the adapter on top; a backward pass leaves the adapter's gradients here."""
        pairs = self._copies()

        def apply(number: int, group: str, x: Tensor) -> Tensor:
            product = self.network.layers[number].linear[group]
            if (number, group) not in pairs:
                return frozen(product, x)
            pair, ga, gc = pairs[number, group]
            if self.magnitudes is not None:
                into = (ga, gc, self.magnitudes.gradients[number, group])
                return dora_linear(x, self._anchor, product, pair, self.magnitudes.factors[number, group], into)
            return _LoraLinear.apply(x, self._anchor, product, pair, ga, gc)  # type: ignore[no-any-return]

        return apply

    def adapted(self, number: int, group: str) -> Adapted | None:
        """What a place has of an adapter; None where it has none."""
        return self._copies().get((number, group))

    def loss(self, hidden: Tensor, labels: Tensor, share: Tensor) -> Tensor:
        """The loss of labels under normed hidden states, through the base's head."""
        return cross_entropy(hidden, self.network.head, labels, share, cap=self.network.shape.logit_cap)

    @torch.no_grad()
    def take_gradients(self) -> None:
        """Move the last backward pass's gradients onto the masters, in fp32, on top of what they hold."""
        found = [torch.empty_like(master) for master in self.masters[:2]]
        if self._departure is not None:
            _, *into = zip(*self._pairs.values(), strict=True)
            gradients = self._departure.gradients(*into)
        else:
            gradients = [(ga, gc) for _, ga, gc in self._pairs.values()]
        views = zip(*map(_views, found, (map(_shape, self._a), map(_shape, self._c))), strict=True)
        for (_, group), (ga, gc), (into_a, into_c) in zip(self.places, gradients, views, strict=True):
            into_a.copy_(ga[: len(into_a)])
            for mine, columns, rows in self._parts[group]:
                into_c[:, mine].copy_(gc[columns, rows])
        found[1].mul_(self.scale)
        for master, gradient in zip(self.masters, found, strict=False):
            master.grad = gradient if master.grad is None else master.grad.add_(gradient)
        if self.magnitudes is not None:
            learnt, master = self.magnitudes.take_gradients(), self.magnitudes.master
            master.grad = learnt if master.grad is None else master.grad.add_(learnt)

    @torch.no_grad()
    def refresh_copies(self) -> None:
        """Round the masters into the copies, after the masters changed; where there are none, the next pass does."""
        if not self._pairs:
            return
        for place, (pair, _, _) in enumerate(self._pairs.values()):
            self._round(place, pair.a, pair.c)
            pair.refresh()
        if self.magnitudes is not None:
            self.magnitudes.refresh({place: pair for place, (pair, _, _) in self._pairs.items()})

    @property
    def missing_bytes(self) -> int:
        """What the next pass takes for copies, what is laid out of them and their gradients; 0 where they are there."""
        if self._pairs:
            return 0
        total = 0
        for number, group in self.places:
            product = self.network.layers[number].linear[group]
            total += self._copied_rows(group) * (product.into + product.out) * (3 if product.tiles is not None else 2)
        return total * self.network.dtype.itemsize

    def release_buffers(self) -> None:
        """Give the copies' memory back until the next pass makes them anew."""
        self._pairs = {}

    @torch.no_grad()
    def _copies(self) -> dict[Place, Adapted]:
        """The pairs, and where their gradients go: over the copies themselves where the product reads what is laid out
        of them and nothing else."""
        if not self._pairs:
            for place, (number, group) in enumerate(self.places):
                product = self.network.layers[number].linear[group]
                rows = self._copied_rows(group)
                a, c = (torch.empty(rows, size, dtype=self.network.dtype) for size in (product.into, product.out))
                self._round(place, a, c)
                pair = LowRankFactors(a, c)
                own = (a, c) if product.tiles is not None else (torch.empty_like(a), torch.empty_like(c))
                self._pairs[number, group] = Adapted(pair, *own)
            if self.magnitudes is not None:
                self.magnitudes.refresh({place: pair for place, (pair, _, _) in self._pairs.items()})
        return self._pairs

    def _round(self, place: int, a: Tensor, c: Tensor) -> None:
        """A place's masters into its copies."""
        if self._departure is not None:
            self._departure.refresh(place, self._a[place], self._spread(place), self.scale, a, c)
            return
        size = len(self._a[place])
        a[:size].copy_(self._a[place])
        a[size:].zero_()
        c.zero_()
        for mine, columns, rows in self._parts[self.places[place][1]]:
            torch.mul(self._c[place][:, mine], self.scale, out=c[columns, rows])

    def files(self, base: Base) -> dict[str, bytes]:
        """The adapter in PEFT's layout."""
        return encode_adapter(self.adapter(), self.network, base)

    def adapter(self) -> Adapter:
        """The masters as an adapter of the base: one of twice the rank where they started at its principal vectors."""
        rank, a = self.rank, self._a
        c = [self._spread(place) for place in range(len(self.places))]
        if self._departure is not None:
            a, c = self._departure.adapter(a, c, rank)
            rank = 2 * rank
        more = rank / self.rank
        return Adapter(
            rank=rank,
            alpha=self.alpha * (math.sqrt(more) if self.root else more),
            root=self.root,
            targets=self.targets,
            a=dict(zip(self.places, a, strict=True)),
            b={place: each.t() for place, each in zip(self.places, c, strict=True)},
            m={} if self.magnitudes is None else self.magnitudes.values,
        )

    def _copied_rows(self, group: str) -> int:
        return -(-self._columns(group) // TILE) * TILE * (2 if self._departure else 1)

    def _columns(self, group: str) -> int:
        return len(blocks(self.network, group, self.rank, self.targets)) * self.rank

    def _side_by_side(self, group: str) -> Iterator[tuple[slice, slice, slice]]:
        """For each adapted part of a group: its columns in c's master, its rows and its columns in c's copy."""
        first = 0
        for _, rows, columns in blocks(self.network, group, self.rank, self.targets):
            yield slice(first, first := first + rows.stop - rows.start), columns, rows

    def _shapes(self, number: int, group: str) -> tuple[tuple[int, int], tuple[int, int]]:
        product = self.network.layers[number].linear[group]
        return (self._columns(group), product.into), (self.rank, self._parts[group][-1][0].stop)

    def _rows(self, number: int, group: str) -> Tensor:
        """Which rows [out] of a place's weight have an adapter."""
        adapted = torch.zeros(self.network.layers[number].linear[group].out, dtype=torch.bool)
        for _, _, rows in self._parts[group]:
            adapted[rows] = True
        return adapted

    def _spread(self, place: int) -> Tensor:
        """A place's c [n r, out]: each part's in rows of its own, zeros elsewhere."""
        number, group = self.places[place]
        out = self.network.layers[number].linear[group].out
        wide = torch.zeros(self._columns(group), out)
        for mine, columns, rows in self._parts[group]:
            wide[columns, rows] = self._c[place][:, mine]
        return wide

    def _start(self, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        for a in self._a:
            # PEFT's start: A uniform within 1/sqrt(in) (Kaiming with a = sqrt(5)), B zero: nothing changes yet.
            bound = 1.0 / math.sqrt(a.shape[1])
            a.uniform_(-bound, bound, generator=generator)

    def _start_at_principal(self) -> None:
        for (number, group), a, c in zip(self.places, self._a, self._c, strict=True):
            weight = self.network.layers[number].linear[group].weight.float()
            for mine, columns, rows in self._parts[group]:
                a[columns], c[:, mine] = principal(weight[rows], self.rank, self.scale)


def _flat(shapes: Sequence[tuple[int, int]]) -> Tensor:
    return torch.zeros(sum(rows * columns for rows, columns in shapes))


def _views(flat: Tensor, shapes: Iterable[tuple[int, int]]) -> list[Tensor]:
    shapes = list(shapes)
    parts = flat.split([rows * columns for rows, columns in shapes])
    return [part.view(shape) for part, shape in zip(parts, shapes, strict=True)]


def _shape(matrix: Tensor) -> tuple[int, int]:
    return matrix.shape[0], matrix.shape[1]


class _LoraLinear(torch.autograd.Function):
    """x W^T + bias + x A^T C with the frozen W. Gradients of A and C are written to ga and gc; anchor is what makes
    autograd come here where x needs no gradient."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, anchor: Tensor, product: PackedLinear, pair: LowRankFactors, ga: Tensor, gc: Tensor
    ) -> Tensor:
        low, again = pair.low(x), recompute(x)
        ctx.save_for_backward(low, x if again is None else None)
        ctx.products, ctx.into, ctx.recompute = (product, pair), (ga, gc), again
        return product(x, low, pair)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, None, None, None, None, None]:
        low, x = ctx.saved_tensors
        product, pair = ctx.products
        ga, gc = ctx.into
        low_gradient = pair.low_gradient(gradient)
        if ctx.recompute is None:
            outer(low_gradient, x, ga)
        else:
            ctx.recompute.ask(lambda again: outer(low_gradient, again, ga))
        outer(low, gradient, gc)
        gx = product.input_gradient(gradient, low_gradient, pair) if ctx.needs_input_grad[0] else None
        return gx, None, None, None, None, None


class _FrozenLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, product: PackedLinear) -> Tensor:
        ctx.product = product
        return product(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return ctx.product.input_gradient(gradient), None


def frozen(product: PackedLinear, x: Tensor) -> Tensor:
    """A frozen product that passes gradients on to x."""
    return _FrozenLinear.apply(x, product)  # type: ignore[no-any-return]
