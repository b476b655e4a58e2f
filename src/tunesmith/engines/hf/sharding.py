"""What is done with a model's layers one by one: sharding them over the ranks by torch's fully_shard (FSDP2), and
computing them again in the backward pass.

Every rank holds its rows of each parameter, of the frozen base's too. A layer's parameters are brought together while
it computes and dropped after it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from tunesmith.core.errors import TunesmithError, UsageError

if TYPE_CHECKING:
    from tunesmith.engines.ranks import Ranks


def shard(module: Any, ranks: Ranks, device: torch.device) -> None:
    """Shard the decoder's layers one by one, then what is left of the module: embeddings, norms, head.

    Each copy of the module is sharded over as many neighbouring ranks (HSDP); the gradients of all copies are added.
    From then on every rank has to call the module equally often.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard

    if not hasattr(FSDPModule, "set_reduce_scatter_unused_params"):
        raise UsageError(
            "this version of torch cannot reduce gradients of which some ranks have none",
            fix="pip install --upgrade torch; 2.13 was tested",
        )
    shape = (ranks.size,) if ranks.copies == 1 else (ranks.copies, ranks.size // ranks.copies)
    mesh = init_device_mesh(device.type, shape, mesh_dim_names=("copy", "shard")[-len(shape) :])
    summed_in_fp32 = MixedPrecisionPolicy(reduce_dtype=torch.float32)
    for part in (*layers(module), module):
        fully_shard(part, mesh=mesh, mp_policy=summed_in_fp32)
    for each in module.modules():
        if isinstance(each, FSDPModule):
            # The gradients of the ranks are added: each rank divides by the labels of all of them. gloo can only add.
            each.set_gradient_divide_factor(1.0)
            each.set_force_sum_reduction_for_comms(True)
    # A rank whose tokens reach no part of an adapter takes part in its reduction nevertheless.
    module.set_reduce_scatter_unused_params(True)


@contextmanager
def replaced(forwards: Mapping[nn.Module, Callable[..., Any]]) -> Iterator[None]:
    """Have modules compute with other forwards meanwhile."""
    before = {each: vars(each).get("forward") for each in forwards}  # accelerate replaces it on some devices
    for each, forward in forwards.items():
        each.forward = forward
    try:
        yield
    finally:
        for each, own in before.items():
            del each.forward
            if own is not None:
                each.forward = own


def layers(module: Any, *, whole: bool = False) -> list[nn.Module]:
    """The decoder's layers: the outermost modules that transformers says must stay in one piece.

    To be called before the module is sharded, which renames their classes. A family may name none. whole: then the
    module is its only layer; otherwise raises TunesmithError, because it would save no memory.
    """
    names = set(module._no_split_modules or ())
    outermost: dict[str, nn.Module] = {}
    for name, each in module.named_modules():
        if type(each).__name__ in names and not any(name.startswith(f"{outer}.") for outer in outermost):
            outermost[name] = each
    if not outermost and whole:
        return [module]
    if not outermost:
        raise TunesmithError(
            f"transformers does not say which parts of {type(module).__name__} are its layers",
            where="base",
            fix="train on one rank, and without recompute",
        )
    return list(outermost.values())
