"""A LoRA adapter under training: fp32 master weights, bf16 copies that the step computes with.

bf16 has 8 bits of precision: an update of a small learning rate added to a bf16 weight rounds to nothing, so the
optimiser works on fp32 masters. All of an adapter's numbers lie in one buffer, so that what is done to each of them
(rounding, scaling, the optimiser) is one operation and not one for every layer.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tunesmith.models import ops
from tunesmith.models.adapter import Adapter, Place, blocks, encode_adapter, target_names
from tunesmith.models.base import BaseModel
from tunesmith.models.network import GROUPS, Linear, Network
from tunesmith.models.products import TILE, Frozen, Pair, outer
from tunesmith.training.loss import cross_entropy
from tunesmith.training.magnitudes import Magnitudes, dora_linear
from tunesmith.training.principal import Departure, principal
from tunesmith.training.settings import TrainSettings


class Adapted(NamedTuple):
    """An adapted place: its pair, and where a backward pass leaves the gradients of a and c."""

    pair: Pair
    ga: Tensor
    gc: Tensor


class Lora:
    """Masters and their compute copies, a [R, in] and c [R, out] of every adapted group.

    R is the sum of the ranks of a group's parts, rounded up to what tiles multiply; c is b transposed (see
    models.adapter.Adapter), and its copy already holds the adapter's scale. masters: flat fp32 tensors, every a,
    every c and, with DoRA, every row's length.
    """

    def __init__(self, network: Network, settings: TrainSettings) -> None:
        self.network, self.rank, self._b_rate = network, settings.rank, settings.b_rate
        self.alpha = float(settings.alpha if settings.alpha is not None else 2 * settings.rank)
        self.root = settings.scaling == "root"
        self.targets = frozenset(target_names() if "all" in settings.targets else settings.targets)
        first = 0 if settings.layers is None else max(0, network.shape.layers - settings.layers)
        self.places: list[Place] = [
            (number, group)
            for number in range(first, network.shape.layers)
            for group in GROUPS
            if blocks(network, group, self.rank, self.targets)
        ]
        shapes = list(zip(*(self._shapes(number, group) for number, group in self.places), strict=True))
        on = network.device
        self.masters = [_flat(each, on) for each in shapes]
        # What a copy is of its master, and a master's gradient of its copy's: 0 where there is nothing to learn.
        self._factors = [_flat(each, on) for each in shapes]
        self._a, self._c = (_views(master, each) for master, each in zip(self.masters, shapes, strict=True))
        self._views = [_views(factor, each) for factor, each in zip(self._factors, shapes, strict=True)]
        self._start(settings.seed, *self._views)
        self._departure: Departure | None = None
        if settings.start == "pissa":
            self._start_at_principal()
            self._departure = Departure(self._a, self._c)
        copied = [[(rows * (2 if self._departure else 1), size) for rows, size in each] for each in shapes]
        self._copies = [_flat(each, on, network.dtype) for each in copied]
        self._gradients = [_flat(each, on, network.dtype) for each in copied]
        pairs = map(Pair, *(_views(copy, each) for copy, each in zip(self._copies, copied, strict=True)))
        into = (_views(gradient, each) for gradient, each in zip(self._gradients, copied, strict=True))
        self._pairs = dict(zip(self.places, map(Adapted, pairs, *into), strict=True))
        self._anchor = torch.zeros((), requires_grad=True, device=on)
        self.magnitudes: Magnitudes | None = None
        if settings.dora:
            adapted = zip(self.places, self._views[1], strict=True)
            self.magnitudes = Magnitudes(network, {place: factor.any(0) for place, factor in adapted})
            self.masters.append(self.magnitudes.master)
        self.refresh_copies()

    @property
    def scale(self) -> float:
        """What the adapter's sum is multiplied with."""
        return self.alpha / (math.sqrt(self.rank) if self.root else self.rank)

    @property
    def parameters(self) -> int:
        """Trained numbers."""
        own = 0 if self.magnitudes is None else self.magnitudes.trained.count_nonzero()
        return int(sum(factor.count_nonzero() for factor in self._factors) + own)

    def groups(self) -> list[dict[str, Any]]:
        """AdamW's groups. LoRA+ (Hayou et al. 2024): B, which starts at zero, learns best at a higher rate than A."""
        multiples = (1.0, self._b_rate, 1.0)
        return [{"params": [master], "multiple": each} for master, each in zip(self.masters, multiples, strict=False)]

    def linear(self) -> Linear:
        """The base's linear layers with the adapter on top; a backward pass leaves the adapter's gradients here."""

        def apply(number: int, group: str, x: Tensor) -> Tensor:
            product = self.network.layers[number].linear[group]
            if (number, group) not in self._pairs:
                return frozen(product, x)
            pair, ga, gc = self._pairs[number, group]
            if self.magnitudes is not None:
                into = (ga, gc, self.magnitudes.gradients[number, group])
                return dora_linear(x, self._anchor, product, pair, self.magnitudes.factors[number, group], into)
            return _LoraLinear.apply(x, self._anchor, product, pair, ga, gc)  # type: ignore[no-any-return]

        return apply

    def adapted(self, number: int, group: str) -> Adapted | None:
        """What a place has of an adapter; None where it has none."""
        return self._pairs.get((number, group))

    def loss(self, hidden: Tensor, labels: Tensor, share: Tensor) -> Tensor:
        """The loss of labels under normed hidden states, through the base's head."""
        return cross_entropy(hidden, self.network.head, labels, share, cap=self.network.shape.logit_cap)

    def take_gradients(self) -> None:
        """Move the last backward pass's gradients onto the masters, in fp32, on top of what they hold."""
        gradients = self._gradients
        if self._departure is not None:
            _, *into = zip(*self._pairs.values(), strict=True)
            gradients = self._departure.gradients(*into)
        for master, gradient, factor in zip(self.masters, gradients, self._factors, strict=False):
            master.grad = ops.widened(gradient, factor, master.grad)
        if self.magnitudes is not None:
            found, master = self.magnitudes.take_gradients(), self.magnitudes.master
            master.grad = found if master.grad is None else master.grad.add_(found)

    @torch.no_grad()
    def refresh_copies(self) -> None:
        """Round the masters into the copies, after the masters changed."""
        if self._departure is not None:
            pairs = [pair for pair, _, _ in self._pairs.values()]
            self._departure.refresh(self._a, self._c, self._views[1], pairs)
        else:
            for master, copy, factor in zip(self.masters, self._copies, self._factors, strict=False):
                ops.rounded(master, factor, copy)
        for pair, _, _ in self._pairs.values():
            pair.refresh()
        if self.magnitudes is not None:
            self.magnitudes.refresh({place: pair for place, (pair, _, _) in self._pairs.items()})

    def files(self, base: BaseModel) -> dict[str, bytes]:
        """The adapter in PEFT's layout."""
        return encode_adapter(self.adapter(), self.network, base)

    def adapter(self) -> Adapter:
        """The masters as an adapter of the base: one of twice the rank where they started at its principal vectors."""
        rank, a, c = self.rank, self._a, self._c
        parts = [self._columns(group) // rank for _, group in self.places]
        if self._departure is not None:
            a, c = self._departure.adapter(a, c, rank, parts)
            rank = 2 * rank
        more = rank / self.rank
        a = [x[: count * rank] for x, count in zip(a, parts, strict=True)]
        b = [x[: count * rank].t() for x, count in zip(c, parts, strict=True)]
        return Adapter(
            rank=rank,
            alpha=self.alpha * (math.sqrt(more) if self.root else more),
            root=self.root,
            targets=self.targets,
            a=dict(zip(self.places, a, strict=True)),
            b=dict(zip(self.places, b, strict=True)),
            m={} if self.magnitudes is None else self.magnitudes.values,
        )

    def _columns(self, group: str) -> int:
        return len(blocks(self.network, group, self.rank, self.targets)) * self.rank

    def _shapes(self, number: int, group: str) -> tuple[tuple[int, int], tuple[int, int]]:
        product = self.network.layers[number].linear[group]
        columns = -(-self._columns(group) // TILE) * TILE
        return (columns, product.into), (columns, product.out)

    def _start(self, seed: int, a_factors: list[Tensor], c_factors: list[Tensor]) -> None:
        generator = torch.Generator().manual_seed(seed)
        for (_, group), a, above, below in zip(self.places, self._a, a_factors, c_factors, strict=True):
            size = self._columns(group)
            # PEFT's start: A uniform within 1/sqrt(in) (Kaiming with a = sqrt(5)), B zero: nothing changes yet.
            bound = 1.0 / math.sqrt(a.shape[1])
            # Drawn on the processor wherever it goes, so that a seed means the same everywhere.
            a[:size] = torch.empty(size, a.shape[1]).uniform_(-bound, bound, generator=generator)
            above[:size] = 1.0
            for _, rows, columns in blocks(self.network, group, self.rank, self.targets):
                below[columns, rows] = self.scale

    def _start_at_principal(self) -> None:
        for (number, group), a, c in zip(self.places, self._a, self._c, strict=True):
            weight = self.network.layers[number].linear[group].weight.float().cpu()  # as in _start
            for _, rows, columns in blocks(self.network, group, self.rank, self.targets):
                a[columns], c[columns, rows] = principal(weight[rows], self.rank, self.scale)


def _flat(shapes: Sequence[tuple[int, int]], on: torch.device, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.zeros(sum(rows * columns for rows, columns in shapes), dtype=dtype, device=on)


def _views(flat: Tensor, shapes: Sequence[tuple[int, int]]) -> list[Tensor]:
    parts = flat.split([rows * columns for rows, columns in shapes])
    return [part.view(shape) for part, shape in zip(parts, shapes, strict=True)]


class _LoraLinear(torch.autograd.Function):
    """x W^T + bias + x A^T C with the frozen W. Gradients of A and C are written to ga and gc; anchor is what makes
    autograd come here where x needs no gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, anchor: Tensor, product: Frozen, pair: Pair, ga: Tensor, gc: Tensor) -> Tensor:
        low = pair.low(x)
        ctx.save_for_backward(x, low)
        ctx.products, ctx.into = (product, pair), (ga, gc)
        return product(x, low, pair)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, None, None, None, None, None]:
        x, low = ctx.saved_tensors
        product, pair = ctx.products
        ga, gc = ctx.into
        into_low = pair.into_low(gradient)
        outer(into_low, x, ga)
        outer(low, gradient, gc)
        gx = product.back(gradient, into_low, pair) if ctx.needs_input_grad[0] else None
        return gx, None, None, None, None, None


class _FrozenLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, product: Frozen) -> Tensor:
        ctx.product = product
        return product(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return ctx.product.back(gradient), None


def frozen(product: Frozen, x: Tensor) -> Tensor:
    """A frozen product that passes gradients on to x."""
    return _FrozenLinear.apply(x, product)  # type: ignore[no-any-return]
