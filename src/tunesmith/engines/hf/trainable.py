"""What the trainings of transformers' modules have in common, whichever weights are trained."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from importlib.metadata import version

import torch
from torch import Tensor, nn

from tunesmith.core.errors import Refused
from tunesmith.engines.batch import Batch
from tunesmith.engines.device import device_name
from tunesmith.engines.hf import packing
from tunesmith.engines.hf.costs import DTYPES, activation_bytes, training_flops
from tunesmith.engines.hf.model import HFModel
from tunesmith.engines.hf.sharding import layers
from tunesmith.engines.packed import read_lengths
from tunesmith.engines.process import MEASURED_ROWS, product_flops
from tunesmith.engines.ranks import held
from tunesmith.engines.settings import HF, WeightSettings
from tunesmith.engines.training_protocol import LabelWeights, TrainableModel

_FLOAT = 4  # bytes


class HFTrainable(TrainableModel):
    """The methods of a trainable model that do not depend on which weights are trained.

    adapter: its name in the model; None where the base's own weights are trained. parameters: what is trained, by its
    names in the module. _added: how many numbers are trained beside the base's.
    """

    engine_name = HF
    adapter: str | None = None
    _added = 0
    parameters: Mapping[str, nn.Parameter]

    def __init__(self, model: HFModel, settings: WeightSettings) -> None:
        """Raises TunesmithError for a family whose layers are not known, where they are to be computed again."""
        self._model, self._settings = model, settings
        self._recomputed = layers(model.module) if settings.recompute else []
        if model.late is None:
            _ = model.packs  # found out with the base's own weights, before anything changes them

    @property
    @abstractmethod
    def replaces_base(self) -> bool:
        """Whether training changes the base's own weights, so that the base cannot answer any more."""

    @property
    def device(self) -> torch.device:
        """The device that the weights are on."""
        return self._model.device

    @property
    def shares_prefix(self) -> bool:
        """Whether a common prefix is computed once: where batches are packed (see HFModel.packs), but not by flash
        attention, which reads whole rows."""
        return self._model.packs and self._model.attention != packing.FLASH

    @property
    def trained_numbers(self) -> int:
        """How many numbers are trained."""
        return sum(tensor.numel() for tensor in self.parameters.values())

    def environment(self) -> Mapping[str, str]:
        """The device, what the base is kept and computed in, and how batches are laid out."""
        found = {"device": device_name(self.device), "precision": self._precision, "attention": self._model.attention}
        found["batches"] = "packed" if self._model.packs else "padded"
        return found | ({"liger": version("liger-kernel")} if self._model.settings.liger else {})

    def loss(self, batch: Batch, weights: LabelWeights) -> Tensor:
        """The weighted sum of a batch's negative log-likelihoods: a scalar, with gradients unless autograd is off."""
        self._model.release_cache()
        losses = self._label_losses(batch)
        if not isinstance(weights, Tensor):
            weights = weights(-losses.detach())
        return (losses * weights.to(self.device)).sum()

    @torch.no_grad()
    def label_losses(self, batch: Batch) -> Tensor:
        """The negative log-likelihood of each label [N] of a batch, fp32, without gradients."""
        return self._label_losses(batch)

    @torch.no_grad()
    def reference_losses(self, batch: Batch) -> Tensor:
        """As label_losses, by the module without the adapter. Raises Refused where training changes the base."""
        if self.replaces_base:
            raise Refused(
                "the objective compares with the base, whose weights this training changes",
                where="train.method, train.start",
                fix="leave both out, so that an adapter of the base is trained",
            )
        self._model.release_cache()
        with self._model.using(None):
            return self._model.label_losses(batch, packed=self._model.packs)

    def _label_losses(self, batch: Batch) -> Tensor:
        with self._model.using(self.adapter):
            return self._model.label_losses(batch, packed=self._model.packs, recompute=self._recomputed)

    def memory_estimate(self, batch: Batch) -> int:
        """Bytes of a batch: activations and logits, this rank's gradients, and where the batch is packed one layer's
        attention."""
        (tokens, scored), shapes = self._computed(batch), self._model.shapes
        kept = activation_bytes(shapes, self._precision, tokens=tokens, scored=scored, recompute=bool(self._recomputed))
        numbers = self._gradient_numbers()
        if self.shares_prefix:  # keys and values of every row, with their gradients
            numbers += 4 * len(batch.lengths) * (batch.prefix + max(batch.lengths)) * max(shapes.widest)
        return kept + _FLOAT * numbers

    def flops(self, batch: Batch) -> float:
        """Floating-point operations of a batch's matrix products, forward and backward. Attention is left out."""
        tokens, scored = self._computed(batch)
        again = bool(self._recomputed)
        return training_flops(self._model.shapes, tokens=tokens, scored=scored, trained=self._added, recompute=again)

    def _gradient_numbers(self) -> int:
        """The size of this rank's gradients, in fp32 numbers."""
        return sum(held(tensor).numel() for tensor in self.parameters.values())

    def _computed(self, batch: Batch) -> tuple[int, int]:
        """Tokens that the module computes for a batch, and how many of them get logits: those with a label, or all of
        padded rows where the family changes what its head gives."""
        rows, labels = read_lengths(batch), batch.labels.numel()
        if self._model.packs:
            return batch.prefix + int(rows.sum()), labels
        padded = len(rows) * (batch.prefix + int(rows.max()))
        return padded, labels if self._model.plain_head else padded

    def peak_flops(self, batch: Batch) -> float:
        """Floating-point operations a second that the device reaches on the largest linear layer's product."""
        rows = min(self._computed(batch)[0], MEASURED_ROWS)
        return product_flops(rows, *self._model.shapes.widest, self.device, self._model.settings.dtype)

    @property
    def _precision(self) -> str:
        return next(name for name, dtype in DTYPES.items() if dtype == self._model.settings.dtype)
