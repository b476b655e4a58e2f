"""Full fine-tuning: every weight of the base, or all of its last layers' weights.

fp32 master weights and gradients, copies in the network's dtype to compute with (see lora.py for why): with AdamW's two
moments 18 bytes a weight where it computes in bf16. Weights are multiplied as they lie: laying them out for their
products anew after each step costs what it saves. The file that comes of it is models.whole's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from tunesmith.core.errors import Refused
from tunesmith.engines.native import runtime
from tunesmith.engines.native.adapters.lora import frozen
from tunesmith.engines.native.adapters.loss import cross_entropy
from tunesmith.engines.native.adapters.whole import encode_whole
from tunesmith.engines.native.network.network import GROUPS, Layer, Linear, Network
from tunesmith.engines.native.network.products import PackedLinear
from tunesmith.engines.native.network.weights import norm_names, read_weights
from tunesmith.models.base import Base
from tunesmith.models.weight_files import EMBEDDING, HEAD
from tunesmith.training.settings import TrainSettings

_NORM = "model.norm.weight"
_STATES = 4 * 4  # bytes a trained weight: the master, its gradient, AdamW's two moments
_BEST = 4  # and the weights of the lowest validation loss so far


class _Place(NamedTuple):
    """A weight that is trained: the stored tensors whose rows it stacks, by name, and its shape. decays: it is a
    matrix, and AdamW's weight decay is for it; norms and biases are left out, as is usual."""

    names: tuple[str, ...]
    rows: tuple[int, ...]
    shape: tuple[int, ...]
    decays: bool


class Full:
    """Masters of every trained weight, and a network of their copies.

    masters: all matrices, then all norms and biases, each a flat fp32 tensor.
    """

    def __init__(self, network: Network, settings: TrainSettings, base: Path) -> None:
        whole = settings.layers is None
        self._first = 0 if settings.layers is None else max(0, network.shape.layers - settings.layers)
        places = list(_places(network, self._first, whole))
        _check_room(network, places, settings)
        kinds = [[place for place in places if place.decays is decays] for decays in (True, False)]
        sizes = [[_size(place) for place in kind] for kind in kinds]
        self.masters = [torch.empty(sum(each)) for each in sizes]
        self._copies = [torch.empty_like(master, dtype=network.dtype) for master in self.masters]
        self._gradients = [torch.empty_like(master) for master in self.masters]
        self._values: dict[str, Tensor] = {}  # a stored tensor's name -> its master
        leaves: dict[str, Tensor] = {}  # a weight's first name -> its copy
        stored = read_weights(base)
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
        self.network = _rebuilt(network, leaves, self._first)
        self.refresh_copies()

    @property
    def parameters(self) -> int:
        """Trained numbers."""
        return sum(map(len, self.masters))

    def groups(self) -> list[dict[str, Any]]:
        """AdamW's groups: norms and biases do not decay."""
        matrices, vectors = self.masters
        return [
            {"params": [matrices], "multiple": 1.0},
            {"params": [vectors], "multiple": 1.0, "weight_decay": 0.0},
        ]

    def linear(self) -> Linear:
        """The network's linear layers; gradients of the trained ones' weights come with autograd."""

        def apply(number: int, group: str, x: Tensor) -> Tensor:
            product = self.network.layers[number].linear[group]
            return frozen(product, x) if number < self._first else F.linear(x, product.weight, product.bias)

        return apply

    def loss(self, hidden: Tensor, labels: Tensor, share: Tensor) -> Tensor:
        """The loss of labels under normed hidden states; the head learns where embeddings do."""
        head = self.network.head
        learns = self.network.embedding.requires_grad
        weight = head.weight if learns else None
        return cross_entropy(hidden, head, labels, share, weight, self.network.shape.logit_cap)

    def take_gradients(self) -> None:
        """Give the masters the gradients that the backward pass has summed up in fp32, weight by weight."""
        for master, gradient in zip(self.masters, self._gradients, strict=True):
            master.grad = gradient

    @torch.no_grad()
    def refresh_copies(self) -> None:
        """Round the masters into the copies."""
        for master, copy in zip(self.masters, self._copies, strict=True):
            copy.copy_(master)

    def files(self, base: Base) -> dict[str, bytes]:
        """All of the base's weights, the trained ones in their place."""
        return encode_whole(self._values, base, self.network.tied)


def _moving(into: Tensor, master: Tensor) -> Callable[[Tensor], None]:
    """Moves a copy's gradient on, to what the step's earlier parts left there: the first part has none before it."""

    def move(leaf: Tensor) -> None:
        gradient, leaf.grad = leaf.grad, None
        assert gradient is not None
        if master.grad is None:
            into.copy_(gradient)
        else:
            into.add_(gradient)

    return move


def _places(network: Network, first: int, whole: bool) -> Iterator[_Place]:
    shape = network.shape
    if whole:
        table = (shape.vocabulary, shape.width)
        yield _matrix(EMBEDDING, table)
        if not network.tied:
            yield _matrix(HEAD, table)
        yield _vector(_NORM, network.final_norm)
    for number, layer in enumerate(network.layers):
        if number < first:
            continue
        prefix = f"model.layers.{number}."
        for name, norm in _norms(layer):
            yield _vector(prefix + name, norm)
        for group, parts in GROUPS.items():
            product, rows = layer.linear[group], network.parts(group)
            names = tuple(f"{prefix}{part}.weight" for part in parts)
            yield _Place(names, rows, (product.out, product.into), decays=True)
            if product.bias is not None:
                yield _Place(tuple(f"{prefix}{part}.bias" for part in parts), rows, (product.out,), decays=False)


_HEAD_NORMS = {"q_norm": "self_attn.q_norm.weight", "k_norm": "self_attn.k_norm.weight"}


def _norms(layer: Layer) -> list[tuple[str, Tensor]]:
    names = norm_names(after=layer.after_attention is not None) | _HEAD_NORMS
    found = [(name, getattr(layer, field)) for field, name in names.items()]
    return [(name, norm) for name, norm in found if norm is not None]


def _matrix(name: str, shape: tuple[int, int]) -> _Place:
    return _Place((name,), shape[:1], shape, decays=True)


def _vector(name: str, weight: Tensor) -> _Place:
    return _Place((name,), tuple(weight.shape), tuple(weight.shape), decays=False)


def _size(place: _Place) -> int:
    return int(torch.Size(place.shape).numel())


def _rebuilt(network: Network, leaves: dict[str, Tensor], first: int) -> Network:
    """The network over the trained copies; what is frozen stays as it is."""

    def layer(number: int, old: Layer) -> Layer:
        if number < first:
            return old
        prefix = f"model.layers.{number}."
        linear = {}
        for group, parts in GROUPS.items():
            weight, bias = leaves[f"{prefix}{parts[0]}.weight"], leaves.get(f"{prefix}{parts[0]}.bias")
            linear[group] = PackedLinear(weight, bias, plain=True)
        names = norm_names(after=old.after_attention is not None) | _HEAD_NORMS
        norms: dict[str, Any] = {field: leaves.get(prefix + name) for field, name in names.items()}
        return replace(old, linear=linear, **norms)

    layers = tuple(layer(number, old) for number, old in enumerate(network.layers))
    if EMBEDDING not in leaves:
        return replace(network, layers=layers)
    embedding = leaves[EMBEDDING]
    head = PackedLinear(embedding if network.tied else leaves[HEAD], plain=True)
    return replace(network, layers=layers, embedding=embedding, head=head, final_norm=leaves[_NORM])


def _check_room(network: Network, places: Sequence[_Place], settings: TrainSettings) -> None:
    """Raises Refused where the masters and what goes with them cannot fit; says how many layers would."""
    each = _STATES + (_BEST if settings.keep == "best" else 0) + network.embedding.element_size()
    needed, free = each * sum(map(_size, places)), runtime.available_memory()
    if needed <= free:
        return
    last = network.shape.layers - 1
    a_layer = each * sum(map(_size, _places(network, last, whole=False)))
    fitting = min(free // a_layer, last)
    smaller = f"set train.layers to {fitting} or fewer, or " if fitting else "set "
    raise Refused(
        f"training these weights in full takes {needed / 1e9:.1f} GB of memory beside the activations, "
        f"{free / 1e9:.1f} GB are free",
        where="train.method",
        fix=f"{smaller}train.method to lora",
    )
