"""A LoRA adapter under training in transformers' module, by PEFT."""

from __future__ import annotations

import weakref
from collections.abc import Mapping
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path

import torch
from torch import Tensor, nn

from tunesmith.core.errors import Refused, UsageError
from tunesmith.engines.hf import four_bits
from tunesmith.engines.hf.costs import sizes
from tunesmith.engines.hf.model import HFModel
from tunesmith.engines.hf.trainable import HFTrainable
from tunesmith.engines.ranks import ALONE, Ranks, whole
from tunesmith.engines.settings import WeightSettings
from tunesmith.engines.training_protocol import ParameterGroup
from tunesmith.models.weight_files import AdapterConfig, save_adapter_file


class LoraTrainable(HFTrainable):
    """Implements engines.training_protocol.TrainableModel. What is trained is fp32, also on a base in bf16, so that the
    optimiser moves PEFT's own parameters."""

    adapter: str

    def __init__(self, model: HFModel, settings: WeightSettings, *, seed: int, ranks: Ranks = ALONE) -> None:
        """The start weights are PEFT's, drawn with seed. With several ranks, the model is sharded over them.

        Raises Refused for settings that PEFT or this base cannot honour, and for layers that the model does not call.
        """
        super().__init__(model, settings)
        targets = model.targets(settings.targets)
        _check_rank(targets, settings)
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
        weakref.finalize(self, model.remove_adapter, self.adapter).atexit = False
        self.parameters = model.adapter_parameters(self.adapter)
        if uncalled := model.uncalled(self.adapter):
            raise Refused(
                f"the model does not run {uncalled[0]} as a layer, so an adapter there would have no effect",
                where="train.targets",
                fix="name the layers to adapt without it",
            )
        if ranks.size > 1:
            changed = [".base_layer."] if settings.start == "pissa" else []
            model.shard(ranks, drawn=(f".{self.adapter}.", *changed))
            self.parameters = model.adapter_parameters(self.adapter)
        self._added = self.trained_numbers
        self._start = _copies(self.parameters) if settings.start == "pissa" else None

    @property
    def replaces_base(self) -> bool:
        """Whether the start took something out of the base's weights, so that they are the base with the adapter only,
        and until the first step."""
        return self._start is not None

    def environment(self) -> Mapping[str, str]:
        """What every training states, PEFT's version, and how the base is quantised."""
        found = {**super().environment(), "peft": version("peft")}
        return found if self._settings.quantize is None else found | {"quantized": four_bits.description()}

    def parameter_groups(self) -> list[ParameterGroup]:
        """A, B and DoRA's magnitudes. LoRA+ (Hayou et al. 2024): B has a higher learning rate than A."""
        parts = {part: _named(self.parameters, part) for part in ("lora_A", "lora_B", "lora_magnitude_vector")}
        rates = {"lora_B": self._settings.b_rate}
        return [ParameterGroup(tensors, rates.get(part, 1.0)) for part, tensors in parts.items() if tensors]

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
