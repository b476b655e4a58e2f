"""A LoRA adapter under training: fp32 master weights, bf16 copies that the step computes with.

bf16 has 8 bits of precision: an update of a small learning rate added to a bf16 weight rounds to nothing, so the
optimiser works on fp32 masters.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tunesmith.models.adapter import Adapter, Place, blocks, target_names
from tunesmith.models.network import GROUPS, Linear, Network
from tunesmith.training.settings import TrainSettings


class Lora:
    """Masters and their compute copies, a and b of every adapted group (see models.adapter.Adapter)."""

    def __init__(self, network: Network, settings: TrainSettings) -> None:
        self.network, self.rank = network, settings.rank
        self.alpha = float(settings.alpha if settings.alpha is not None else 2 * settings.rank)
        self.targets = frozenset(target_names() if "all" in settings.targets else settings.targets)
        generator = torch.Generator().manual_seed(settings.seed)
        self.places: list[Place] = []
        self.masters: list[Tensor] = []  # a and b of each place in turn
        self._masks: list[Tensor | None] = []
        for number, layer in enumerate(network.layers):
            for group in GROUPS:
                found = blocks(network, group, self.rank, self.targets)
                if found:
                    self.places.append((number, group))
                    self._start(layer.linear[group], found, generator)
        self.copies = [master.detach().to(network.dtype, copy=True).requires_grad_() for master in self.masters]

    @property
    def parameters(self) -> int:
        """Trained numbers: what lies on the groups' diagonals."""
        return sum(
            self.rank * (rows.stop - rows.start + self.network.layers[number].linear[group].shape[1])
            for number, group in self.places
            for _, rows, _ in blocks(self.network, group, self.rank, self.targets)
        )

    def linear(self) -> Linear:
        """The base's linear layers with the adapter on top, recording gradients for the adapter's copies."""
        pairs = {place: (self.copies[2 * i], self.copies[2 * i + 1]) for i, place in enumerate(self.places)}
        scale = self.alpha / self.rank

        def apply(number: int, group: str, x: Tensor) -> Tensor:
            layer = self.network.layers[number]
            weight, bias = layer.linear[group], layer.bias.get(group)
            if (number, group) not in pairs:
                return F.linear(x, weight, bias)
            a, b = pairs[number, group]
            return _LoraLinear.apply(x, weight, bias, a, b, scale)  # type: ignore[no-any-return]

        return apply

    def take_gradients(self) -> None:
        """Move the copies' gradients onto the masters, in fp32; off a group's diagonal there is nothing to learn."""
        for master, copy, mask in zip(self.masters, self.copies, self._masks, strict=True):
            if copy.grad is None:
                master.grad = torch.zeros_like(master)
                continue
            master.grad = copy.grad.float()
            if mask is not None:
                master.grad.mul_(mask)
            copy.grad = None

    @torch.no_grad()
    def refresh_copies(self) -> None:
        """Round the masters into the copies, after the masters changed."""
        for master, copy in zip(self.masters, self.copies, strict=True):
            copy.copy_(master)

    def adapter(self) -> Adapter:
        """The masters as an adapter."""
        return Adapter(
            rank=self.rank,
            alpha=self.alpha,
            targets=self.targets,
            a={place: self.masters[2 * i].detach() for i, place in enumerate(self.places)},
            b={place: self.masters[2 * i + 1].detach() for i, place in enumerate(self.places)},
        )

    def _start(self, weight: Tensor, found: list[tuple[str, slice, slice]], generator: torch.Generator) -> None:
        out, into = weight.shape
        columns = len(found) * self.rank
        # PEFT's start: A uniform within 1/sqrt(in) (Kaiming with a = sqrt(5)), B zero, so that nothing changes yet.
        bound = 1.0 / math.sqrt(into)
        a = torch.empty(columns, into).uniform_(-bound, bound, generator=generator).requires_grad_()
        b = torch.zeros(out, columns).requires_grad_()
        mask: Tensor | None = None
        if len(found) > 1:
            mask = torch.zeros(out, columns)
            for _, rows, place in found:
                mask[rows, place] = 1.0
        self.masters += [a, b]
        self._masks += [None, mask]


class _LoraLinear(torch.autograd.Function):
    """x W^T + bias + scale (x A^T) B^T with the frozen W: gradients for x, A and B alone."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, scale: float) -> Tensor:
        low = x @ a.t()
        y = F.linear(x, weight, bias).addmm_(low, b.t(), alpha=scale)
        ctx.save_for_backward(x, weight, a, b, low)
        ctx.scale = scale
        return y

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, Tensor, Tensor, None]:
        x, weight, a, b, low = ctx.saved_tensors
        into_low = (gradient @ b).mul_(ctx.scale)
        gx = (gradient @ weight).addmm_(into_low, a)
        return gx, None, None, into_low.t() @ x, (gradient.t() @ low).mul_(ctx.scale), None
