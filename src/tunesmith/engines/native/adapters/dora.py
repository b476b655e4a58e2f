"""DoRA: each row of an adapted weight has a length of its own, trained beside its direction.

Method: Liu et al. 2024, "DoRA: Weight-Decomposed Low-Rank Adaptation". An adapted weight is m * (W + B A) / |W + B A|,
row by row; as in the paper (section 4.3) and in PEFT the lengths |W + B A| count as constants in the gradient.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from tunesmith.engines.native.adapters.adapter import Place
from tunesmith.engines.native.network.network import Network, recompute
from tunesmith.engines.native.network.products import LowRankFactors, PackedLinear, outer


class Magnitudes:
    """Lengths of the adapted rows: one flat fp32 master over all places, and what each place's product is multiplied
    with. adapted: for each place which of its rows [out] have an adapter; the others keep their length."""

    def __init__(self, network: Network, adapted: Mapping[Place, Tensor]) -> None:
        self._network, self._adapted = network, adapted
        sizes = [len(rows) for rows in adapted.values()]
        self.master = torch.zeros(sum(sizes))
        self.gradient = torch.zeros_like(self.master)
        self.trained = torch.cat([rows.float() for rows in adapted.values()])
        self.values = dict(zip(adapted, self.master.split(sizes), strict=True))
        self.gradients = dict(zip(adapted, self.gradient.split(sizes), strict=True))
        self.factors: dict[Place, Tensor] = {}  # in the order of places
        self._lengths: dict[Place, Tensor] = {}
        self._squares: dict[Place, Tensor] = {}
        for number, group in adapted:
            square = network.layers[number].linear[group].weight.float().square().sum(1)
            self._squares[number, group] = square
            self.values[number, group].copy_(square.sqrt())

    def take_gradients(self) -> Tensor:
        """The last backward pass's gradient of the master: that of a factor m / |W + B A|, over the length."""
        return self.gradient / torch.cat(list(self._lengths.values())) * self.trained

    @torch.no_grad()
    def refresh(self, pairs: Mapping[Place, LowRankFactors]) -> None:
        """Take the lengths |W + B A| anew, after the pairs changed: |w|^2 + 2 b (A w) + b (A A^T) b of each row."""
        for place, pair in pairs.items():
            number, group = place
            product = self._network.layers[number].linear[group]
            a, c = pair.a.float(), pair.c.float()
            cross = product(pair.a).float() - (0.0 if product.bias is None else product.bias.float())
            square = self._squares[place] + 2 * (c * cross).sum(0) + (c * (a @ a.t() @ c)).sum(0)
            self._lengths[place] = square.clamp_min(1e-12).sqrt()
            factor = self.values[place] / self._lengths[place]
            self.factors[place] = torch.where(self._adapted[place], factor, 1.0).to(self._network.dtype)


class _DoraLinear(torch.autograd.Function):
    """m / |W + B A| * (x W^T + x A^T C) + bias. Gradients of A, C and the factor go to into."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, anchor: Tensor, product: PackedLinear, pair: LowRankFactors, factor: Tensor, into: Any
    ) -> Tensor:
        low, again = pair.low(x), recompute(x)
        plain = product(x, low, pair)
        if product.bias is not None:
            plain -= product.bias
        ctx.save_for_backward(low, plain, factor, x if again is None else None)
        ctx.products, ctx.into, ctx.recompute = (product, pair), into, again
        scaled = plain * factor
        return scaled if product.bias is None else scaled + product.bias

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, None, None, None, None, None]:
        low, plain, factor, x = ctx.saved_tensors
        (product, pair), (ga, gc, gm) = ctx.products, ctx.into
        torch.sum(gradient.float() * plain.float(), 0, out=gm)
        gradient = gradient * factor
        low_gradient = pair.low_gradient(gradient)
        if ctx.recompute is None:
            outer(low_gradient, x, ga)
        else:
            ctx.recompute.ask(lambda again: outer(low_gradient, again, ga))
        outer(low, gradient, gc)
        gx = product.input_gradient(gradient, low_gradient, pair) if ctx.needs_input_grad[0] else None
        return gx, None, None, None, None, None


def dora_linear(
    x: Tensor, anchor: Tensor, product: PackedLinear, pair: LowRankFactors, factor: Tensor, into: Any
) -> Tensor:
    """An adapted product with lengths of its own; into: where the gradients of a, c and the factor go."""
    return _DoraLinear.apply(x, anchor, product, pair, factor, into)  # type: ignore[no-any-return]
