"""A LoRA adapter under training: fp32 master weights, and packed copies of them that the passes compute with.

bf16 has 8 bits of precision: a small update added to a bf16 weight rounds to nothing, so the optimiser works on fp32
master weights. All of an adapter's numbers lie in two flat tensors, so that rounding, scaling and optimising are one
operation each instead of one for every layer.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tunesmith.engines.batch import Batch
from tunesmith.engines.native.adapters.adapter import LAYERS, Place, blocks
from tunesmith.engines.native.adapters.trainable import NativeTrainable, frozen
from tunesmith.engines.native.network.network import GROUPS, Linear, Network, recompute
from tunesmith.engines.native.network.products import TILE, LowRankFactors, PackedLinear, outer
from tunesmith.engines.settings import TARGETS, WeightSettings, match_layers
from tunesmith.engines.training_protocol import ParameterGroup
from tunesmith.models.base import Base
from tunesmith.models.weight_files import AdapterConfig, save_adapter_file


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
        super().__init__(base, network, settings)
        self.network, self._b_rate, layers = network, settings.b_rate, network.shape.layers
        self.config = AdapterConfig(
            rank=settings.rank,
            alpha=settings.adapter_alpha(),
            targets=frozenset(match_layers(settings.targets, TARGETS, "train.targets")),
            root=settings.scaling == "root",
            layers=tuple(range(self.first, layers)) if self.first else None,
        )
        # Of each group's adapted layers the name, the columns of c's master, and the rows and columns of c's copy.
        self._parts: dict[str, list[tuple[str, slice, slice, slice]]] = {}
        for group in GROUPS:
            first = 0
            for part, rows, columns in blocks(network, group, self.config):
                mine = slice(first, first := first + rows.stop - rows.start)
                self._parts.setdefault(group, []).append((part, mine, columns, rows))
        self.places: list[Place] = [(number, group) for number in range(self.first, layers) for group in self._parts]
        self._products = [network.layers[number].linear[group] for number, group in self.places]
        ranks = [len(self._parts[group]) * settings.rank for _, group in self.places]
        self._rows = [-(-rank // TILE) * TILE for rank in ranks]  # of the copies
        self._shapes = (
            [(rank, product.into) for rank, product in zip(ranks, self._products, strict=True)],
            [(settings.rank, self._parts[group][-1][1].stop) for _, group in self.places],
        )
        self.masters = [torch.zeros(sum(rows * columns for rows, columns in each)) for each in self._shapes]
        self._a, self._c = map(_views, self.masters, self._shapes)
        # PEFT's start: A uniform within 1 / sqrt(in) (Kaiming with a = sqrt(5)), B zero, so that nothing changes.
        generator = torch.Generator().manual_seed(seed)
        for a in self._a:
            bound = 1.0 / math.sqrt(a.shape[1])
            a.uniform_(-bound, bound, generator=generator)
        self._copies: dict[Place, Adapted] = {}
        self._anchor = torch.zeros((), requires_grad=True)

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
        totals = [torch.empty_like(master) for master in self.masters]
        gradients = [(ga, gc) for _, ga, gc in self._copies.values()]
        views = zip(*map(_views, totals, self._shapes), strict=True)
        for (_, group), (ga, gc), (into_a, into_c) in zip(self.places, gradients, views, strict=True):
            into_a.copy_(ga[: len(into_a)])
            for _, mine, columns, rows in self._parts[group]:
                into_c[:, mine].copy_(gc[columns, rows])
        totals[1].mul_(self.config.scale)
        for master, gradient in zip(self.masters, totals, strict=True):
            master.grad = gradient if master.grad is None else master.grad.add_(gradient)

    @torch.no_grad()
    def parameters_changed(self) -> None:
        """Round the master weights into the copies. Where there are none yet, the next pass makes them."""
        for place, (factors, _, _) in enumerate(self._copies.values()):
            self._round(place, factors.a, factors.c)
            factors.refresh()

    @torch.no_grad()
    def copies(self) -> dict[Place, Adapted]:
        """The copies of each place. Gradients are written over the copies themselves where the product reads only what
        was laid out of them."""
        if not self._copies:
            for number, (place, product) in enumerate(zip(self.places, self._products, strict=True)):
                sizes = ((self._rows[number], size) for size in (product.into, product.out))
                a, c = (torch.empty(size, dtype=self.network.dtype) for size in sizes)
                self._round(number, a, c)
                into = (a, c) if product.tiles is not None else (torch.empty_like(a), torch.empty_like(c))
                self._copies[place] = Adapted(LowRankFactors(a, c), *into)
        return self._copies

    def save(self, folder: Path) -> None:
        """Write the adapter into an existing folder, in PEFT's layout and fp32."""
        tensors: dict[str, Tensor] = {}
        for (number, group), a, c in zip(self.places, self._a, self._c, strict=True):
            for part, mine, columns, _ in self._parts[group]:
                tensors[f"{LAYERS}.{number}.{part}.lora_A.weight"] = a[columns]
                tensors[f"{LAYERS}.{number}.{part}.lora_B.weight"] = c[:, mine].t()
        arrays = {name: tensor.contiguous().numpy() for name, tensor in tensors.items()}
        save_adapter_file(folder, self.config, arrays, base=self._base.digest, fingerprint=self._base.fingerprint)

    def kept_numbers(self) -> int:
        """Numbers that the adapter keeps of each token: the low-rank values."""
        return sum(self._rows)

    def missing_bytes(self) -> int:
        """Bytes of copies, what is laid out of them and their gradients; 0 once they exist."""
        each = (
            rows * (product.into + product.out) * (2 if product.tiles is None else 3)
            for rows, product in zip(self._rows, self._products, strict=True)
        )
        return 0 if self._copies else sum(each) * self.network.dtype.itemsize

    def trained_flops(self, batch: Batch) -> float:
        """2 forward, 2 back to the input and 2 for the gradient, of each number and token."""
        return 6.0 * self.trained_numbers * batch.tokens

    def _round(self, place: int, a: Tensor, c: Tensor) -> None:
        """Write a place's master weights into its copies."""
        size = len(self._a[place])
        a[:size].copy_(self._a[place])
        a[size:].zero_()
        c.zero_()
        for _, mine, columns, rows in self._parts[self.places[place][1]]:
            torch.mul(self._c[place][:, mine], self.config.scale, out=c[columns, rows])


def _views(flat: Tensor, shapes: Sequence[tuple[int, int]]) -> list[Tensor]:
    """Consecutive parts of a flat tensor as matrices."""
    parts = flat.split([rows * columns for rows, columns in shapes])
    return [part.view(shape) for part, shape in zip(parts, shapes, strict=True)]


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
