"""Trainings of transformers' modules: a LoRA adapter by PEFT; every weight of the base, or all weights of its last
layers; and what both have in common."""

from __future__ import annotations

import weakref
from abc import abstractmethod
from collections import deque
from collections.abc import Mapping
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path

import torch
from torch import Tensor, nn

from tunesmith.core.errors import Refused, UsageError
from tunesmith.engines.batch import Batch, read_lengths
from tunesmith.engines.device import device_name
from tunesmith.engines.hf import packing
from tunesmith.engines.hf.costs import DTYPES, activation_bytes, is_linear, sizes, training_flops
from tunesmith.engines.hf.loading import four_bits_description
from tunesmith.engines.hf.model import HFModel
from tunesmith.engines.hf.sharding import layers
from tunesmith.engines.process import MEASURED_ROWS, product_flops
from tunesmith.engines.ranks import ALONE, Ranks, held, whole
from tunesmith.engines.settings import HF, WeightSettings
from tunesmith.engines.training_protocol import LabelWeights, ParameterGroup, TrainableModel
from tunesmith.engines.weights import save_model
from tunesmith.models.weight_files import AdapterConfig, save_adapter_file

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
        stated = {"device": device_name(self.device), "precision": self._precision, "attention": self._model.attention}
        stated["batches"] = "packed" if self._model.packs else "padded"
        return stated | ({"liger": version("liger-kernel")} if self._model.settings.liger else {})

    def loss(self, batch: Batch, weights: LabelWeights) -> Tensor:
        """The weighted sum of a batch's negative log-likelihoods: a scalar, with gradients unless autograd is off."""
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
        shapes, again = self._model.shapes, bool(self._recomputed)
        return training_flops(shapes, tokens=tokens, scored=scored, trained=self._added, recompute=again)

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
        most = min(min(sizes(module)) for module in targets.values())
        if settings.start == "pissa" and settings.rank > most:
            raise UsageError(
                f"start: pissa needs as many singular vectors as the rank, {settings.rank}, but a weight has only "
                f"{most}",
                where="train.rank, train.start",
                fix=f"set rank to {most} or lower, or leave start out",
            )
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
        self._start: dict[str, Tensor] | None = None  # a copy of PiSSA's
        if settings.start == "pissa":
            named = self.parameters.items()
            self._start = {f"model.{name}": whole(tensor.detach()).clone() for name, tensor in named}

    @property
    def replaces_base(self) -> bool:
        """Whether the start took something out of the base's weights, so that they are the base with the adapter only,
        and until the first step."""
        return self._start is not None

    def environment(self) -> Mapping[str, str]:
        """What every training states, PEFT's version, and how the base is quantised."""
        stated = {**super().environment(), "peft": version("peft")}
        return stated if self._settings.quantize is None else stated | {"quantized": four_bits_description()}

    def parameter_groups(self) -> list[ParameterGroup]:
        """A, B and DoRA's magnitudes. LoRA+ (Hayou et al. 2024): B has a higher learning rate than A."""
        rates = {"lora_A": 1.0, "lora_B": self._settings.b_rate, "lora_magnitude_vector": 1.0}
        named = self.parameters.items()
        groups = [([each for name, each in named if f".{part}." in name], rate) for part, rate in rates.items()]
        return [ParameterGroup(tensors, rate) for tensors, rate in groups if tensors]

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


class FullTrainable(HFTrainable):
    """Implements engines.training_protocol.TrainableModel.

    The optimiser moves fp32 master weights. Where the module computes in fp32, they are its own parameters. Where it
    computes in bf16, they start at its rounded weights, and after each step they are rounded into them.
    """

    replaces_base = True

    def __init__(self, model: HFModel, settings: WeightSettings, *, ranks: Ranks = ALONE) -> None:
        """With several ranks, the model is sharded over them.

        Raises Refused for weights that the base's files do not hold as the module does, and where several ranks would
        train weights of two dtypes.
        """
        super().__init__(model, settings)
        trained = dict(model.module.named_parameters())
        if settings.layers is not None:
            path, numbers = model.last_layers(settings.layers)
            parts = [f".{path}.{number}." for number in numbers]
            trained = {name: each for name, each in trained.items() if any(part in f".{name}" for part in parts)}
        if renamed := next((name for name in trained if name not in model.stored), None):
            raise Refused(
                f"transformers makes {renamed} out of other tensors of the base's files, and method: full writes "
                "those that it trains under the names that they have there",
                where="train.method",
                fix="leave method out, and name the layers to adapt in targets where experts are fused",
            )
        if ranks.size > 1 and len({each.dtype for each in trained.values()}) > 1:
            raise Refused(
                "the base keeps some weights in fp32, and fully_shard reduces gradients of one dtype only",
                where="train.precision",
                fix="set precision: fp32, or train in one process, without torchrun",
            )
        if ranks.size > 1:
            model.shard(ranks, trained=trained.keys())
            trained = {name: each for name, each in model.module.named_parameters() if name in trained}
        self.parameters = trained
        self._masters: dict[str, Tensor] = {}
        for name, parameter in trained.items():
            parameter.requires_grad_()
            self._masters[name] = parameter if parameter.dtype == torch.float32 else parameter.detach().float()

    def parameter_groups(self) -> list[ParameterGroup]:
        """Matrices, to which weight decay applies; norms and biases, to which it does not."""
        groups = [[each for each in self._masters.values() if (each.dim() > 1) is decays] for decays in (True, False)]
        return [ParameterGroup(groups[0]), ParameterGroup(groups[1], weight_decay=False)]

    @torch.no_grad()
    def collect_gradients(self) -> None:
        """Add the gradients to the master weights' in fp32, and zeros where no token reached a weight."""
        for name, parameter in self.parameters.items():
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            if (master := self._masters[name]) is not parameter:
                gradient, parameter.grad = parameter.grad.float(), None
                master.grad = gradient if master.grad is None else master.grad.add_(gradient)

    @torch.no_grad()
    def parameters_changed(self) -> None:
        """Round the master weights into the module's."""
        for name, parameter in self.parameters.items():
            if (master := self._masters[name]) is not parameter:
                parameter.copy_(master)

    def save(self, folder: Path) -> None:
        """Write model.safetensors into an existing folder: the base's weights with the trained ones in their place.

        All ranks call this. Tensors are brought together one by one, and rank 0 keeps them on the CPU and writes.
        Raises TunesmithError where no weight differs from the base's after rounding.
        """
        model = self._model
        weights = ((model.stored[name], whole(master.detach())) for name, master in self._masters.items())
        if model.ranks.first:
            save_model(weights, model.base, folder, model.repeated)
        else:
            deque(weights, maxlen=0)

    def flops(self, batch: Batch) -> float:
        """Floating-point operations of a batch's matrix products: 2 more for each trained number and token."""
        tokens, scored = self._computed(batch)
        linear = (each for each in self._model.module.modules() if is_linear(each) and each.weight.requires_grad)
        learned = (each.weight.numel() * (scored if each is self._model.head else tokens) for each in linear)
        return super().flops(batch) + 2.0 * float(sum(learned))

    def _gradient_numbers(self) -> int:
        fp32 = all(each is self.parameters[name] for name, each in self._masters.items())
        return super()._gradient_numbers() * (2 if fp32 else 3) // 2
