"""DoRA: the magnitude of each row of an adapted weight is trained separately from its direction.

Method: Liu et al. 2024, "DoRA: Weight-Decomposed Low-Rank Adaptation". An adapted weight is m * (W + B A) / |W + B A|,
row by row. As in the paper (section 4.3) and in PEFT, gradients treat the norms |W + B A| as constants.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from tunesmith.engines.native.adapters.adapter import Place
from tunesmith.engines.native.adapters.trainable import write_factor_gradients
from tunesmith.engines.native.network.network import Network, recompute
from tunesmith.engines.native.network.products import LowRankFactors, PackedLinear


class Dora:
    """The magnitudes of the adapted rows: one flat fp32 master tensor over all places.

    adapted: for each place which of its rows [out] have an adapter; the others keep their magnitude. row_scales: what
    each place's product is multiplied with, m / |W + B A|, in the order of places.
    """

    def __init__(self, network: Network, adapted: Mapping[Place, Tensor]) -> None:
        self._network, self._adapted = network, adapted
        sizes = [len(rows) for rows in adapted.values()]
        self.master = torch.zeros(sum(sizes))
        self.gradient = torch.zeros_like(self.master)
        self.trained = torch.cat([rows.float() for rows in adapted.values()])
        self.values = dict(zip(adapted, self.master.split(sizes), strict=True))
        self.gradients = dict(zip(adapted, self.gradient.split(sizes), strict=True))
        self.row_scales: dict[Place, Tensor] = {}
        self._norms: dict[Place, Tensor] = {}
        self._squares: dict[Place, Tensor] = {}
        for number, group in adapted:
            square = network.layers[number].linear[group].weight.float().square().sum(1)
            self._squares[number, group] = square
            self.values[number, group].copy_(square.sqrt())

    def master_gradient(self) -> Tensor:
        """The master's gradient after a backward pass: that of the row scales m / |W + B A|, divided by the norms."""
        return self.gradient / torch.cat(list(self._norms.values())) * self.trained

    @torch.no_grad()
    def refresh(self, changed: Mapping[Place, LowRankFactors]) -> None:
        """Compute the norms |W + B A| after the low-rank factors changed.

        The square of a row's is |w|^2 + 2 b (A w) + b (A A^T) b.
        """
        for place, low_rank in changed.items():
            number, group = place
            product = self._network.layers[number].linear[group]
            a, c = low_rank.a.float(), low_rank.c.float()
            cross = product(low_rank.a).float() - (0.0 if product.bias is None else product.bias.float())
            square = self._squares[place] + 2 * (c * cross).sum(0) + (c * (a @ a.t() @ c)).sum(0)
            self._norms[place] = square.clamp_min(1e-12).sqrt()
            scales = self.values[place] / self._norms[place]
            self.row_scales[place] = torch.where(self._adapted[place], scales, 1.0).to(self._network.dtype)


class _DoraLinear(torch.autograd.Function):
    """m / |W + B A| * (x W^T + x A^T C) + bias. Gradients of A, C and the scales are written to into."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, anchor: Tensor, product: PackedLinear, low_rank: LowRankFactors, scales: Tensor, into: Any
    ) -> Tensor:
        low, again = low_rank.low(x), recompute(x)
        plain = product(x, low, low_rank)
        if product.bias is not None:
            plain -= product.bias
        ctx.save_for_backward(low, plain, scales, x if again is None else None)
        ctx.products, ctx.into, ctx.recompute = (product, low_rank), into, again
        scaled = plain * scales
        return scaled if product.bias is None else scaled + product.bias

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, None, None, None, None, None]:
        low, plain, scales, x = ctx.saved_tensors
        ga, gc, gm = ctx.into
        torch.sum(gradient.float() * plain.float(), 0, out=gm)
        gx = write_factor_gradients(ctx, low, x, gradient * scales, (ga, gc))
        return gx, None, None, None, None, None


def dora_linear(
    x: Tensor, anchor: Tensor, product: PackedLinear, low_rank: LowRankFactors, scales: Tensor, into: Any
) -> Tensor:
    """An adapted linear layer with trained magnitudes. into: where gradients of a, c and the scales are written."""
    return _DoraLinear.apply(x, anchor, product, low_rank, scales, into)  # type: ignore[no-any-return]
