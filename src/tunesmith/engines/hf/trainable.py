"""A LoRA adapter under training in transformers' module, by PEFT."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tunesmith.core.errors import Refused, UsageError
from tunesmith.engines.batch import Batch
from tunesmith.engines.device import device_name
from tunesmith.engines.hf import four_bits, packing
from tunesmith.engines.hf.costs import DTYPES, activation_bytes, sizes, training_flops
from tunesmith.engines.hf.model import HFModel, remove_with
from tunesmith.engines.hf.sharding import layers
from tunesmith.engines.peak import MEASURED_ROWS, product_flops
from tunesmith.engines.ranks import ALONE, Ranks, whole
from tunesmith.engines.settings import HF, WeightSettings
from tunesmith.engines.training_protocol import Objective, ParameterGroup
from tunesmith.models.weight_files import AdapterConfig, save_adapter_file

_FLOAT = 4  # bytes


class HFTrainable:
    """Implements engines.training_protocol.TrainableModel. What is trained is fp32, also on a base in bf16, so that the
    optimiser moves PEFT's own parameters.

    adapter: its name in the model. parameters: what is trained, by its names in the module.
    """

    engine_name = HF

    def __init__(self, model: HFModel, settings: WeightSettings, *, seed: int, ranks: Ranks = ALONE) -> None:
        """The start weights are PEFT's, drawn with seed. With several ranks, the model is sharded over them.

        Raises Refused for settings that PEFT or this base cannot honour, and for layers that the model does not call.
        """
        self._model, self._settings = model, settings
        targets = model.targets(settings.targets)
        _check_rank(targets, settings)
        self._recomputed = layers(model.module) if settings.recompute else []
        if model.late is None:
            _ = model.packs  # found out with the base's own weights, before PiSSA changes them
        pattern, last = ("layers", None) if settings.layers is None else model.last_layers(settings.layers)
        self._config = AdapterConfig(
            rank=settings.rank,
            alpha=settings.adapter_alpha(),
            targets=frozenset(name.rsplit(".", 1)[-1] for name in targets),
            root=settings.scaling == "root",
            dora=settings.dora,
            layers=last,
            layers_pattern=pattern,
        )
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.adapter = model.add_adapter(self._config, settings.start)
        remove_with(self, model, self.adapter)
        self.parameters = model.adapter_parameters(self.adapter)
        if uncalled := model.uncalled(self.adapter):
            raise Refused(
                f"the model does not run {uncalled[0]} as a layer, so an adapter there would have no effect",
                where="train.targets",
                fix="name the layers to adapt without it",
            )
        if ranks.size > 1:
            model.shard(self.adapter, ranks, changed_base=settings.start == "pissa")
            self.parameters = model.adapter_parameters(self.adapter)
        self._start = _copies(self.parameters) if settings.start == "pissa" else None

    @property
    def device(self) -> torch.device:
        """The device that the base and the adapter are on."""
        return self._model.device

    @property
    def shares_prefix(self) -> bool:
        """Whether batches are packed (see HFModel.packs). Otherwise each row is computed whole."""
        return self._model.packs

    def pad_rows(self) -> None:
        """Compute batches padded from now on, as for a family that cannot be packed: to compare the two."""
        self._model.packs = False

    @property
    def replaces_base(self) -> bool:
        """Whether the start took something out of the base's weights, so that they are the base with the adapter only,
        and until the first step."""
        return self._start is not None

    @property
    def trained_numbers(self) -> int:
        """How many numbers are trained."""
        return sum(tensor.numel() for tensor in self.parameters.values())

    def environment(self) -> Mapping[str, str]:
        """The libraries' versions, the device, what the base is kept and computed in, and how batches are laid out."""
        model = self._model
        found = {"peft": version("peft"), "device": device_name(self.device), "precision": self._precision}
        found |= {"attention": model.attention, "batches": "packed" if model.packs else "padded"}
        if self._settings.quantize is not None:
            found["quantized"] = four_bits.description()
        return found

    def parameter_groups(self) -> list[ParameterGroup]:
        """A, B and DoRA's magnitudes. LoRA+ (Hayou et al. 2024): B has a higher learning rate than A."""
        parts = {part: _named(self.parameters, part) for part in ("lora_A", "lora_B", "lora_magnitude_vector")}
        rates = {"lora_B": self._settings.b_rate}
        return [ParameterGroup(tensors, rates.get(part, 1.0)) for part, tensors in parts.items() if tensors]

    def loss(self, batch: Batch, objective: Objective, divisor: float) -> Tensor:
        """The objective over a batch's labels: a scalar, with gradients unless autograd is off."""
        return (self._label_losses(batch) * objective.coefficients(batch, divisor).to(self.device)).sum()

    @torch.no_grad()
    def label_losses(self, batch: Batch) -> Tensor:
        """The negative log-likelihood of each label [N] of a batch, fp32, without gradients."""
        return self._label_losses(batch)

    def _label_losses(self, batch: Batch) -> Tensor:
        with self._model.using(self.adapter):
            logits = self._model.logits(batch, packed=self._model.packs, recompute=self._recomputed)
        return F.cross_entropy(logits.float(), batch.labels.to(self.device), reduction="none")

    def collect_gradients(self) -> None:
        """Give zeros to a tensor that no token reached. Autograd added the other gradients already."""
        for tensor in self.parameters.values():
            if tensor.grad is None:
                tensor.grad = torch.zeros_like(tensor)

    def parameters_changed(self) -> None:
        """Nothing to do: the module computes with the parameters themselves."""

    def save(self, folder: Path) -> None:
        """Write the adapter in PEFT's layout into an existing folder. One that started at PiSSA has twice the rank.

        All ranks call this, and rank 0 writes.
        """
        model, config, tensors = self._model, self._config, self._model.adapter_tensors(self.adapter)
        if not model.ranks.first:
            return
        if self._start is not None:
            tensors, config = model.without_start(self.adapter, tensors, self._start), config.of_twice_the_rank()
        targets = frozenset(name.split(".lora_")[0].rsplit(".", 1)[-1] for name in tensors)
        save_adapter_file(
            folder,
            replace(config, targets=targets),
            {name: tensor.detach().cpu().contiguous().numpy() for name, tensor in tensors.items()},
            base=model.base.digest,
            fingerprint=model.base.fingerprint,
        )

    def memory_estimate(self, batch: Batch) -> int:
        """Bytes of a batch: activations and logits, the adapter's gradients, and where the batch is packed one layer's
        attention."""
        (tokens, scored), shapes = self._computed(batch), self._model.shapes
        kept = activation_bytes(shapes, self._precision, tokens=tokens, scored=scored, recompute=bool(self._recomputed))
        numbers = self.trained_numbers
        if self._model.packs:  # keys and values of every row, with their gradients
            numbers += 4 * len(batch.lengths) * (batch.prefix + max(batch.lengths)) * max(shapes.widest)
        return kept + _FLOAT * numbers

    def flops(self, batch: Batch) -> float:
        """Floating-point operations of a batch's matrix products, forward and backward. Attention is left out."""
        tokens, scored = self._computed(batch)
        return training_flops(
            self._model.shapes,
            tokens=tokens,
            scored=scored,
            trained=self.trained_numbers,
            recompute=bool(self._recomputed),
        )

    def _computed(self, batch: Batch) -> tuple[int, int]:
        """Tokens that the module computes for a batch, and how many of them get logits: without padding, those with a
        label; with it, all."""
        rows = packing.pack(batch)
        if self._model.packs:
            return rows.ids.numel(), batch.labels.numel()
        padded = len(rows.padded) * rows.prefix + rows.padded.numel()
        return padded, padded

    def peak_flops(self, batch: Batch) -> float:
        """Floating-point operations a second that the device reaches on the largest linear layer's product."""
        rows = min(self._computed(batch)[0], MEASURED_ROWS)
        return product_flops(rows, *self._model.shapes.widest, self.device, self._model.settings.dtype)

    @property
    def _precision(self) -> str:
        return next(name for name, dtype in DTYPES.items() if dtype == self._model.settings.dtype)


def _check_rank(targets: Mapping[str, nn.Module], settings: WeightSettings) -> None:
    """PiSSA starts at singular vectors, of which a weight has no more than its smaller size."""
    most = min(min(sizes(module)) for module in targets.values())
    if settings.start == "pissa" and settings.rank > most:
        raise UsageError(
            f"start: pissa needs as many singular vectors as the rank, {settings.rank}, but a weight has only {most}",
            where="train.rank, train.start",
            fix=f"set rank to {most} or lower, or leave start out",
        )


def _copies(parameters: Mapping[str, nn.Parameter]) -> dict[str, Tensor]:
    return {f"model.{name}": whole(tensor.detach()).clone() for name, tensor in parameters.items()}


def _named(parameters: Mapping[str, nn.Parameter], part: str) -> list[Tensor]:
    return [tensor for name, tensor in parameters.items() if f".{part}." in name]
