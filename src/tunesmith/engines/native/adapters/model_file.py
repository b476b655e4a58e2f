"""What a training's folder makes of the base's network: an adapter in its layers, or a network of its own."""

from __future__ import annotations

from pathlib import Path

from tunesmith.engines.native.adapters.adapter import adapted_linear, read_adapter
from tunesmith.engines.native.network.network import Linear, Network, frozen_linear
from tunesmith.engines.native.network.weights import load_network
from tunesmith.engines.weights.whole_model import read_model_file
from tunesmith.models.base import Base
from tunesmith.models.weight_files import has_whole_model


def tuned(folder: Path, network: Network, base: Base) -> tuple[Network, Linear]:
    """The network and linear layers that a training's folder describes: the base's with an adapter, or a new network.

    Raises Refused where the files belong to another base.
    """
    if not has_whole_model(folder):
        return network, adapted_linear(network, read_adapter(folder, network, base))
    own = load_network(base.folder, network.dtype, read_model_file(folder, base, network.repeated))
    return own, frozen_linear(own)
