"""Full fine-tuning: every weight of the base, or all weights of its last layers.

fp32 master weights and gradients, and copies in the network's dtype to compute with (see lora.py for why): with AdamW's
two moments 18 bytes a weight where the network computes in bf16. The copies are multiplied in their plain layout:
packing them again after each step costs as much time as it saves.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from tunesmith.core.errors import Refused
from tunesmith.core.system import machine as memory
from tunesmith.engines.batch import Batch
from tunesmith.engines.native.adapters.trainable import NativeTrainable, frozen
from tunesmith.engines.native.network.network import GROUPS, Layer, Linear, Network
from tunesmith.engines.native.network.products import PackedLinear
from tunesmith.engines.native.network.weights import norm_names
from tunesmith.engines.settings import WeightSettings
from tunesmith.engines.training_protocol import ParameterGroup
from tunesmith.engines.weights import read_weights, save_model
from tunesmith.models.base import Base
from tunesmith.models.weight_files import EMBEDDING, HEAD

_NORM = "model.norm.weight"
_FP32 = 4  # bytes of a number


class _Place(NamedTuple):
    """A trained weight. names: the stored tensors whose rows it stacks. rows: of each one. shape: of all together."""

    names: tuple[str, ...]
    rows: tuple[int, ...]
    shape: tuple[int, ...]


class FullModel(NativeTrainable):
    """A network whose weights are trained. Implements engines.training_protocol.TrainableModel.

    masters: all trained matrices, then all trained norms and biases, each a flat fp32 tensor. network: over copies of
    them in the base network's dtype.
    """

    def __init__(self, base: Base, network: Network, settings: WeightSettings, state_bytes: int) -> None:
        """state_bytes: bytes that the trainer holds for each trained number besides the number itself, its gradient
        among them. Raises Refused where memory cannot hold the weights and that."""
        super().__init__(base, network, settings)
        self._every = settings.layers is None
        places = list(_places(network, self.first, every=self._every))
        _check_memory(network, places, _FP32 + state_bytes + network.dtype.itemsize)
        # Weight decay applies to matrices, not to norms and biases, as is usual.
        kinds = [[place for place in places if (len(place.shape) > 1) is matrix] for matrix in (True, False)]
        sizes = [[math.prod(place.shape) for place in kind] for kind in kinds]
        self.masters = [torch.empty(sum(each)) for each in sizes]
        self._copies = [torch.empty_like(master, dtype=network.dtype) for master in self.masters]
        self._gradients = [torch.empty_like(master) for master in self.masters]
        self._values: dict[str, Tensor] = {}  # a stored tensor's name -> its part of the masters
        leaves: dict[str, Tensor] = {}  # a weight's first name -> its copy
        stored = read_weights(base.folder)
        for kind, each, master, copy, gradient in zip(
            kinds, sizes, self.masters, self._copies, self._gradients, strict=True
        ):
            views = zip(kind, *(flat.split(each) for flat in (master, copy, gradient)), strict=True)
            for place, value, own, into in views:
                for name, part in zip(place.names, value.view(place.shape).split(place.rows), strict=True):
                    self._values[name] = part.copy_(stored.pop(name))
                leaf = own.view(place.shape).detach().requires_grad_()
                leaf.register_post_accumulate_grad_hook(_moving(into.view(place.shape), master))
                leaves[place.names[0]] = leaf
        self.network = _rebuilt(network, leaves, self.first)
        self.parameters_changed()

    def parameter_groups(self) -> list[ParameterGroup]:
        """Matrices, to which weight decay applies; norms and biases, to which it does not."""
        matrices, vectors = self.masters
        return [ParameterGroup([matrices]), ParameterGroup([vectors], weight_decay=False)]

    def linear(self) -> Linear:
        """The network's linear layers; autograd gives the gradients of the trained ones' weights."""

        def apply(number: int, group: str, x: Tensor) -> Tensor:
            product = self.network.layers[number].linear[group]
            return frozen(product, x) if number < self.first else F.linear(x, product.weight, product.bias)

        return apply

    def collect_gradients(self) -> None:
        """Put the gradients, which the backward passes have summed in fp32 weight by weight, on the master weights."""
        for master, gradient in zip(self.masters, self._gradients, strict=True):
            master.grad = gradient

    @torch.no_grad()
    def parameters_changed(self) -> None:
        """Round the master weights into the copies."""
        for master, copy in zip(self.masters, self._copies, strict=True):
            copy.copy_(master)

    def save(self, folder: Path) -> None:
        """Write model.safetensors into an existing folder: the base's weights with the trained ones in their place.

        Raises TunesmithError where no weight differs from the base's after rounding.
        """
        save_model(self._values.items(), self._base, folder, self.network.repeated)

    def kept_numbers(self) -> int:
        """Numbers that trained linear layers keep of each token: their inputs, of which the network keeps only the
        attention's output."""
        each = (2 * self.network.shape.width + layer.linear["down"].into for layer in self.network.layers[self.first :])
        return sum(each)

    def trained_flops(self, batch: Batch) -> float:
        """2 for the gradient of each trained weight and token; of the head's, for each label."""
        sizes = [product.numel() for layer in self.network.layers[self.first :] for product in layer.linear.values()]
        head = 2.0 * self.network.head.numel() * batch.labels.numel() if self._every else 0.0
        return 2.0 * sum(sizes) * batch.tokens + head


def _moving(into: Tensor, master: Tensor) -> Callable[[Tensor], None]:
    """A hook that adds a copy's gradient to the fp32 sum of the step's batches, and frees it. The first batch of a step
    is the one before which the master has no gradient."""

    def move(leaf: Tensor) -> None:
        gradient, leaf.grad = leaf.grad, None
        assert gradient is not None
        if master.grad is None:
            into.copy_(gradient)
        else:
            into.add_(gradient)

    return move


def _places(network: Network, first: int, *, every: bool) -> Iterator[_Place]:
    """The trained weights: those of layers from first on, or every weight of the network."""
    if every:
        table = (network.shape.vocabulary, network.shape.width)
        for name in (EMBEDDING,) if network.tied else (EMBEDDING, HEAD):
            yield _Place((name,), table[:1], table)
        yield _vector(_NORM, network.final_norm)
    for number, layer in enumerate(network.layers):
        if number < first:
            continue
        prefix = f"model.layers.{number}."
        for field, name in _norms(layer).items():
            yield _vector(prefix + name, getattr(layer, field))
        for group, parts in GROUPS.items():
            product = layer.linear[group]
            kinds: dict[str, tuple[int, ...]] = {"weight": (product.out, product.into)}
            for kind, shape in (kinds if product.bias is None else kinds | {"bias": (product.out,)}).items():
                yield _Place(tuple(f"{prefix}{part}.{kind}" for part in parts), network.parts(group), shape)


def _norms(layer: Layer) -> dict[str, str]:
    """Field of a layer -> the name of its tensor, for the norms that it has."""
    names = norm_names(after=layer.after_attention is not None)
    return {field: name for field, name in names.items() if getattr(layer, field) is not None}


def _vector(name: str, weight: Tensor) -> _Place:
    return _Place((name,), tuple(weight.shape), tuple(weight.shape))


def _rebuilt(network: Network, leaves: dict[str, Tensor], first: int) -> Network:
    """The network over the trained copies. Frozen weights stay as they are."""

    def layer(number: int, old: Layer) -> Layer:
        if number < first:
            return old
        prefix = f"model.layers.{number}."
        linear = {}
        for group, parts in GROUPS.items():
            weight, bias = leaves[f"{prefix}{parts[0]}.weight"], leaves.get(f"{prefix}{parts[0]}.bias")
            linear[group] = PackedLinear(weight, bias, plain=True)
        norms: dict[str, Any] = {field: leaves[prefix + name] for field, name in _norms(old).items()}
        return replace(old, linear=linear, **norms)

    layers = tuple(layer(number, old) for number, old in enumerate(network.layers))
    if EMBEDDING not in leaves:
        return replace(network, layers=layers)
    embedding = leaves[EMBEDDING]
    head = PackedLinear(embedding if network.tied else leaves[HEAD], plain=True)
    return replace(network, layers=layers, embedding=embedding, head=head, final_norm=leaves[_NORM])


def _numbers(places: Iterable[_Place]) -> int:
    return sum(math.prod(place.shape) for place in places)


def _check_memory(network: Network, places: Sequence[_Place], number_bytes: int) -> None:
    """Raises Refused where the trained numbers and what belongs to them cannot fit; names how many layers would."""
    needed, free = number_bytes * _numbers(places), memory.available_memory()
    if needed <= free:
        return
    last = network.shape.layers - 1
    layer_bytes = number_bytes * _numbers(_places(network, last, every=False))
    fitting = min(free // layer_bytes, last)
    smaller = f"set train.layers to {fitting} or fewer, or " if fitting else "set "
    raise Refused(
        f"training these weights in full takes {needed / 1e9:.1f} GB of memory besides the activations, but only "
        f"{free / 1e9:.1f} GB are free",
        where="train.method",
        fix=f"{smaller}train.method to lora",
    )
