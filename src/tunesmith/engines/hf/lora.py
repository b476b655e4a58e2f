"""LoRA on a model of another family (models.foreign): the same settings, loop and files, in transformers' module."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from tunesmith.core.errors import Refused
from tunesmith.engines.hf.model import HFModel, Low
from tunesmith.models.base import Base
from tunesmith.models.weight_files import pack_adapter
from tunesmith.training.settings import TrainSettings


class HFLora:
    """masters: every A, every B, each a flat fp32 tensor, whose parts the model computes with as they lie."""

    def __init__(self, network: HFModel, settings: TrainSettings) -> None:
        _check(settings)
        self.network, self.rank, self._b_rate = network, settings.rank, settings.b_rate
        self.alpha = float(settings.alpha if settings.alpha is not None else 2 * settings.rank)
        self.root = settings.scaling == "root"
        scale = self.alpha / (math.sqrt(self.rank) if self.root else self.rank)
        places = network.targets(settings.targets)
        if beyond := sorted(places.keys() - network.reached()):
            raise Refused(
                f"the model does not run {beyond[0]} as a layer, so no adapter would come there",
                where="train.targets",
                fix="name the layers to adapt without it",
            )
        shapes = [[(self.rank, into) for _, into in places.values()], [(out, self.rank) for out, _ in places.values()]]
        self.masters = [torch.zeros(sum(rows * columns for rows, columns in each)) for each in shapes]
        self._leaves: list[list[Tensor]] = []
        for master, each in zip(self.masters, shapes, strict=True):
            parts = master.split([rows * columns for rows, columns in each])
            self._leaves.append(
                [part.view(shape).detach().requires_grad_() for part, shape in zip(parts, each, strict=True)]
            )
        self._start(settings.seed)
        a, b = self._leaves
        self.parts = {name: Low(*pair, scale) for name, pair in zip(places, zip(a, b, strict=True), strict=True)}
        network.parts = self.parts

    @property
    def parameters(self) -> int:
        """Trained numbers."""
        return sum(map(len, self.masters))

    def groups(self) -> list[dict[str, Any]]:
        """AdamW's groups; B's rate is a multiple of A's (LoRA+)."""
        a, b = self.masters
        return [{"params": [a], "multiple": 1.0}, {"params": [b], "multiple": self._b_rate}]

    def take_gradients(self) -> None:
        """Move the last backward pass's gradients onto the masters. A layer that no token came to has none."""
        for master, leaves in zip(self.masters, self._leaves, strict=True):
            found = [torch.zeros_like(leaf) if leaf.grad is None else leaf.grad for leaf in leaves]
            gradient = torch.cat([each.flatten() for each in found])
            master.grad = gradient if master.grad is None else master.grad.add_(gradient)
            for leaf in leaves:
                leaf.grad = None

    def refresh_copies(self) -> None:
        """Nothing to do: the model computes with the masters."""

    def files(self, base: Base) -> dict[str, bytes]:
        """The adapter in PEFT's layout."""
        tensors = {
            f"base_model.model.{name}.lora_{half}.weight": getattr(part, half.lower()).detach().contiguous().numpy()
            for name, part in self.parts.items()
            for half in "AB"
        }
        targets = {name.rsplit(".", 1)[-1] for name in self.parts}
        return pack_adapter(
            tensors,
            base=base.digest,
            fingerprint=base.fingerprint,
            rank=self.rank,
            alpha=self.alpha,
            root=self.root,
            targets=targets,
        )

    @torch.no_grad()
    def _start(self, seed: int) -> None:
        """PEFT's start: A uniform within 1/sqrt(in), B zero."""
        generator = torch.Generator().manual_seed(seed)
        for a in self._leaves[0]:
            bound = 1.0 / math.sqrt(a.shape[1])
            a.uniform_(-bound, bound, generator=generator)


def _check(settings: TrainSettings) -> None:
    """Raises Refused for what is written for the families of our own alone."""
    asked = {
        "method: full": settings.method == "full",
        "dora": settings.dora,
        "start: pissa": settings.start == "pissa",
        "layers": settings.layers is not None,
    }
    for what, wanted in asked.items():
        if wanted:
            raise Refused(
                f"{what} is written for the families of our own network; this base is run by transformers' modules, "
                "on which LoRA alone is trained",
                where="train",
                fix=f"leave {what.split(':')[0]} out, or take a base of one of those families",
            )
