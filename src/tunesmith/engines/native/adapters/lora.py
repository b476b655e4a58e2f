"""A LoRA adapter under training: fp32 master weights, and packed copies of them that the passes compute with.

bf16 has 8 bits of precision: a small update added to a bf16 weight rounds to nothing, so the optimiser works on fp32
master weights. All of an adapter's numbers lie in two flat tensors, so that rounding, scaling and optimising are one
operation each instead of one for every layer.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tunesmith.engines.batch import Batch
from tunesmith.engines.native.adapters.adapter import Adapter, Place, blocks, save_adapter
from tunesmith.engines.native.adapters.trainable import NativeTrainable, frozen
from tunesmith.engines.native.network.network import GROUPS, Linear, Network, recompute
from tunesmith.engines.native.network.products import TILE, LowRankFactors, PackedLinear, outer
from tunesmith.engines.settings import TARGETS, WeightSettings, match_layers
from tunesmith.engines.training_protocol import ParameterGroup
from tunesmith.models.base import Base
from tunesmith.models.weight_files import AdapterConfig


class Adapted(NamedTuple):
    """An adapted place: its low-rank factors, and where a backward pass writes the gradients of a and c."""

    factors: LowRankFactors
    a_gradient: Tensor
    c_gradient: Tensor


class LoraModel(NativeTrainable):
    """A network with a LoRA adapter under training. Implements engines.training_protocol.TrainableModel.

    A place is a layer and a group of linear layers that read the same input. Its a [n r, in] holds the A of its n
    adapted layers concatenated by rows, its c [r, out of those layers] their transposed B concatenated by columns.

    masters: flat fp32 tensors: every a, every c. Copies are as products take them: a [R, in] and c [R, out], where R is
    n r rounded up to what tiles multiply. There, each layer's c is scaled and has separate rows.

    An adapter of N numbers takes 12 N bytes while it is trained (master weights and AdamW's moments), and 4 N more
    during an update (gradients). Its copies take 2 bytes a number, the zeros between them included, and twice that
    where tiles multiply them. With rank 16 on every layer of a 135M model, N is 4.9M and a copy has 9.6M numbers: 59,
    20 and 57 MB.
    """

    def __init__(self, base: Base, network: Network, settings: WeightSettings, seed: int) -> None:
        """Raises UsageError for targets that the network does not have."""
        self._base, self._b_rate = base, settings.b_rate
        self.network = self.base_network = network
        layers = network.shape.layers
        self.first = 0 if settings.layers is None else max(0, layers - settings.layers)
        self.config = AdapterConfig(
            rank=settings.rank,
            alpha=settings.adapter_alpha(),
            targets=frozenset(match_layers(settings.targets, TARGETS, "train.targets")),
            root=settings.scaling == "root",
            layers=tuple(range(self.first, layers)) if self.first else None,
        )
        self.places: list[Place] = [
            (number, group)
            for number in range(self.first, layers)
            for group in GROUPS
            if blocks(network, group, self.config)
        ]
        # Where each layer's c lies in its place's master and copy.
        self._parts = {group: list(self._c_places(group)) for group in {group for _, group in self.places}}
        shapes = list(zip(*(self._shapes(number, group) for number, group in self.places), strict=True))
        self.masters = [torch.zeros(sum(rows * columns for rows, columns in each)) for each in shapes]
        self._a, self._c = (_views(master, each) for master, each in zip(self.masters, shapes, strict=True))
        self._start(seed)
        self._copies: dict[Place, Adapted] = {}
        self._anchor = torch.zeros((), requires_grad=True)

    @property
    def trained_numbers(self) -> int:
        """How many numbers are trained."""
        return sum(map(len, self.masters))

    def parameter_groups(self) -> list[ParameterGroup]:
        """a and c. LoRA+ (Hayou et al. 2024): B, which starts at zero, learns best at a higher rate."""
        return [ParameterGroup([master], each) for master, each in zip(self.masters, (1.0, self._b_rate), strict=True)]

    def linear(self) -> Linear:
        """The linear layers with the adapter; a backward pass leaves gradients for collect_gradients()."""
        copies = self.copies()

        def apply(number: int, group: str, x: Tensor) -> Tensor:
            product = self.network.layers[number].linear[group]
            if (number, group) not in copies:
                return frozen(product, x)
            factors, ga, gc = copies[number, group]
            return _LoraLinear.apply(x, self._anchor, product, factors, ga, gc)  # type: ignore[no-any-return]

        return apply

    @torch.no_grad()
    def collect_gradients(self) -> None:
        """Add the last backward pass's gradients, unpacked and in fp32, to those of the master weights."""
        found = [torch.empty_like(master) for master in self.masters]
        gradients = [(ga, gc) for _, ga, gc in self._copies.values()]
        views = zip(*map(_views, found, (map(_shape, self._a), map(_shape, self._c))), strict=True)
        for (_, group), (ga, gc), (into_a, into_c) in zip(self.places, gradients, views, strict=True):
            into_a.copy_(ga[: len(into_a)])
            for mine, columns, rows in self._parts[group]:
                into_c[:, mine].copy_(gc[columns, rows])
        found[1].mul_(self.config.scale)
        for master, gradient in zip(self.masters, found, strict=True):
            master.grad = gradient if master.grad is None else master.grad.add_(gradient)

    @torch.no_grad()
    def parameters_changed(self) -> None:
        """Round the master weights into the copies. Where there are none yet, the next pass makes them."""
        if not self._copies:
            return
        for place, (factors, _, _) in enumerate(self._copies.values()):
            self._round(place, factors.a, factors.c)
            factors.refresh()

    @torch.no_grad()
    def copies(self) -> dict[Place, Adapted]:
        """The copies of each place. Gradients are written over the copies themselves where the product reads only what
        was laid out of them."""
        if not self._copies:
            for place, (number, group) in enumerate(self.places):
                product = self.network.layers[number].linear[group]
                rows = self._copied_rows(group)
                a, c = (torch.empty(rows, size, dtype=self.network.dtype) for size in (product.into, product.out))
                self._round(place, a, c)
                factors = LowRankFactors(a, c)
                into = (a, c) if product.tiles is not None else (torch.empty_like(a), torch.empty_like(c))
                self._copies[number, group] = Adapted(factors, *into)
        return self._copies

    def save(self, folder: Path) -> None:
        """Write the adapter into an existing folder, in PEFT's layout."""
        save_adapter(self.adapter(), self.network, self._base, folder)

    def adapter(self) -> Adapter:
        """The master weights as an adapter of the base."""
        b = {place: self._spread(number).t() for number, place in enumerate(self.places)}
        return Adapter(self.config, a=dict(zip(self.places, self._a, strict=True)), b=b, m={})

    def kept_numbers(self) -> int:
        """Numbers that the adapter keeps of each token: the low-rank values."""
        return sum(self._copied_rows(group) for _, group in self.places)

    def missing_bytes(self) -> int:
        """Bytes of copies, what is laid out of them and their gradients; 0 once they exist."""
        if self._copies:
            return 0
        total = 0
        for number, group in self.places:
            product = self.network.layers[number].linear[group]
            total += self._copied_rows(group) * (product.into + product.out) * (3 if product.tiles is not None else 2)
        return total * self.network.dtype.itemsize

    def trained_flops(self, batch: Batch) -> float:
        """2 forward, 2 back to the input and 2 for the gradient, of each number and token."""
        return 6.0 * self.trained_numbers * batch.tokens

    def _round(self, place: int, a: Tensor, c: Tensor) -> None:
        """Write a place's master weights into its copies."""
        size = len(self._a[place])
        a[:size].copy_(self._a[place])
        a[size:].zero_()
        c.zero_()
        for mine, columns, rows in self._parts[self.places[place][1]]:
            torch.mul(self._c[place][:, mine], self.config.scale, out=c[columns, rows])

    def _copied_rows(self, group: str) -> int:
        return -(-self._columns(group) // TILE) * TILE

    def _columns(self, group: str) -> int:
        return len(blocks(self.network, group, self.config)) * self.config.rank

    def _c_places(self, group: str) -> Iterator[tuple[slice, slice, slice]]:
        """For each adapted layer of a group: its columns in c's master, its rows and its columns in c's copy."""
        first = 0
        for _, rows, columns in blocks(self.network, group, self.config):
            yield slice(first, first := first + rows.stop - rows.start), columns, rows

    def _shapes(self, number: int, group: str) -> tuple[tuple[int, int], tuple[int, int]]:
        product = self.network.layers[number].linear[group]
        return (self._columns(group), product.into), (self.config.rank, self._parts[group][-1][0].stop)

    def _spread(self, place: int) -> Tensor:
        """A place's c [n r, out]: each layer's in rows of its own, zeros elsewhere."""
        number, group = self.places[place]
        out = self.network.layers[number].linear[group].out
        wide = torch.zeros(self._columns(group), out)
        for mine, columns, rows in self._parts[group]:
            wide[columns, rows] = self._c[place][:, mine]
        return wide

    def _start(self, seed: int) -> None:
        """PEFT's start: A uniform within 1 / sqrt(in) (Kaiming with a = sqrt(5)), B zero, so that nothing changes."""
        generator = torch.Generator().manual_seed(seed)
        for a in self._a:
            bound = 1.0 / math.sqrt(a.shape[1])
            a.uniform_(-bound, bound, generator=generator)


def _views(flat: Tensor, shapes: Iterable[tuple[int, int]]) -> list[Tensor]:
    """Consecutive parts of a flat tensor as matrices."""
    shapes = list(shapes)
    parts = flat.split([rows * columns for rows, columns in shapes])
    return [part.view(shape) for part, shape in zip(parts, shapes, strict=True)]


def _shape(matrix: Tensor) -> tuple[int, int]:
    return matrix.shape[0], matrix.shape[1]


class _LoraLinear(torch.autograd.Function):
    """x W^T + bias + x A^T C with the frozen W. Gradients of A and C are written to ga and gc.

    anchor requires a gradient, so that autograd runs the backward pass even where x needs none.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, anchor: Tensor, product: PackedLinear, factors: LowRankFactors, ga: Tensor, gc: Tensor
    ) -> Tensor:
        low, again = factors.low(x), recompute(x)
        ctx.save_for_backward(low, x if again is None else None)
        ctx.products, ctx.into, ctx.recompute = (product, factors), (ga, gc), again
        return product(x, low, factors)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, None, None, None, None, None]:
        low, x = ctx.saved_tensors
        (product, factors), (into_a, into_c) = ctx.products, ctx.into
        low_gradient = factors.low_gradient(gradient)
        if ctx.recompute is None:
            outer(low_gradient, x, into_a)
        else:  # x is computed again
            ctx.recompute.ask(lambda again: outer(low_gradient, again, into_a))
        outer(low, gradient, into_c)
        gx = product.input_gradient(gradient, low_gradient, factors) if ctx.needs_input_grad[0] else None
        return gx, None, None, None, None, None
