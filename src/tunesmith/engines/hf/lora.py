"""LoRA on a model of another family (models.foreign): the same settings, loop and files, in transformers' module."""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import cache
from importlib.metadata import version
from pathlib import Path

import torch
from torch import Tensor

from tunesmith.core.errors import Refused
from tunesmith.engines.batch import Batch
from tunesmith.engines.hf.model import HFModel, Low
from tunesmith.engines.peak import MEASURED_ROWS, measured_flops
from tunesmith.engines.settings import HF, WeightSettings
from tunesmith.engines.training_protocol import Objective, ParameterGroup
from tunesmith.models.base import Base
from tunesmith.models.weight_files import save_adapter_file


class HFLora:
    """masters: every A, every B, each a flat fp32 tensor, whose parts the model computes with as they lie."""

    engine_name = HF
    shares_prefix = False  # the module computes each row whole

    def __init__(self, network: HFModel, base: Base, settings: WeightSettings, seed: int) -> None:
        _check(settings)
        self._base = base
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
        self._start(seed)
        a, b = self._leaves
        self.parts = {name: Low(*pair, scale) for name, pair in zip(places, zip(a, b, strict=True), strict=True)}
        network.parts = self.parts

    @property
    def trained_numbers(self) -> int:
        """How many numbers are trained."""
        return sum(map(len, self.masters))

    def environment(self) -> Mapping[str, str]:
        """The version of transformers, whose module computes."""
        return {"transformers": version("transformers")}

    def parameter_groups(self) -> list[ParameterGroup]:
        """A and B, whose learning rate is a multiple of A's (LoRA+)."""
        a, b = self.masters
        return [ParameterGroup([a]), ParameterGroup([b], self._b_rate)]

    def loss(self, batch: Batch, objective: Objective, divisor: float) -> Tensor:
        """The objective over a batch's labels: a scalar, with gradients unless autograd is off."""
        scores = self.network.scores(batch).float()
        losses = torch.nn.functional.cross_entropy(scores, batch.labels, reduction="none")
        return losses.dot(objective.coefficients(batch, divisor))

    def memory_estimate(self, batch: Batch) -> int:
        """Bytes that a batch takes at the least, with the gradients of the adapter."""
        return self.network.kept_bytes(batch) + sum(master.nbytes for master in self.masters)

    def flops(self, batch: Batch) -> float:
        """Floating-point operations of a batch: of every token to the logits and back, and for the adapter."""
        return float(batch.tokens * (4 * self.network.multiplied + 6 * self.trained_numbers))

    def peak_flops(self, batch: Batch) -> float:
        """Floating-point operations a second on the widest linear layer, for as many rows as a batch has tokens."""
        out, into = self.network.widest
        return _peak(min(batch.tokens, MEASURED_ROWS), out, into)

    def collect_gradients(self) -> None:
        """Move the last backward pass's gradients onto the masters. A layer that no token came to has none."""
        for master, leaves in zip(self.masters, self._leaves, strict=True):
            found = [torch.zeros_like(leaf) if leaf.grad is None else leaf.grad for leaf in leaves]
            gradient = torch.cat([each.flatten() for each in found])
            master.grad = gradient if master.grad is None else master.grad.add_(gradient)
            for leaf in leaves:
                leaf.grad = None

    def parameters_changed(self) -> None:
        """Nothing to do: the model computes with the masters."""

    def save(self, folder: Path) -> None:
        """Write the adapter into an existing folder, in PEFT's layout."""
        tensors = {
            f"base_model.model.{name}.lora_{half}.weight": getattr(part, half.lower()).detach().contiguous().numpy()
            for name, part in self.parts.items()
            for half in "AB"
        }
        targets = {name.rsplit(".", 1)[-1] for name in self.parts}
        save_adapter_file(
            folder,
            tensors,
            base=self._base.digest,
            fingerprint=self._base.fingerprint,
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


@cache
def _peak(rows: int, out: int, into: int) -> float:
    weight, x = (torch.full((size, into), 0.01) for size in (out, rows))
    return measured_flops(lambda: torch.nn.functional.linear(x, weight), 2.0 * rows * into * out)


def _check(settings: WeightSettings) -> None:
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
