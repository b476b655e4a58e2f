"""A device that is no GPU and no processor, to show on any machine that nothing is left on the processor.

Its tensors hold their numbers in ordinary memory and are computed by PyTorch's own CPU kernels, but their device is
"standin": an operation on tensors of both devices raises, as it would on a GPU (where some such mixtures are allowed,
they are refused here), numbers have no address that compiled kernels could read, and random numbers cannot be drawn
there by a generator of the processor's. What is counted is how often the processor waits for the device.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import return_and_correct_aliasing
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

_setup_privateuseone_for_python_backend("standin")
DEVICE = torch.device("standin", 0)

aten = torch.ops.aten
_COPIES = {aten.copy_.default, aten._to_copy.default, aten._copy_from.default}
_waits = 0


def waits() -> int:
    """How often numbers were brought back to the processor so far."""
    return _waits


class There(Tensor):
    """A tensor on the device; held: its numbers."""

    held: Tensor

    @staticmethod
    def __new__(cls, held: Tensor) -> There:
        made: There = torch.Tensor._make_wrapper_subclass(
            cls,
            held.size(),
            strides=held.stride(),
            storage_offset=held.storage_offset(),
            dtype=held.dtype,
            layout=held.layout,
            device=DEVICE,
            requires_grad=False,
        )
        made.held = held
        return made

    def __repr__(self, **_: Any) -> str:
        return f"There({self.held!r})"

    def data_ptr(self) -> int:
        """No address: compiled kernels would read there."""
        raise RuntimeError("a compiled kernel was given a tensor of the device")

    def tolist(self) -> Any:
        """The numbers, brought back."""
        return self.cpu().tolist()

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        with torch.inference_mode(False):  # whose views of other tensors a wrapper cannot be
            return _computed(func, args, kwargs or {})

    __torch_function__ = torch._C._disabled_torch_function_impl


def _computed(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    global _waits
    tensors = [each for each in tree_leaves((args, kwargs)) if isinstance(each, Tensor)]
    away = [each for each in tensors if not isinstance(each, There)]
    if func not in _COPIES:
        _check_together(func, args, away, any(isinstance(each, There) for each in tensors))
    if any(isinstance(each, torch.Generator) and each.device.type == "cpu" for each in tree_leaves((args, kwargs))):
        raise RuntimeError(f"{func}: a generator of the processor's cannot draw on the device")
    wanted = kwargs.get("device")
    there = wanted is None or torch.device(wanted).type == DEVICE.type
    if func is aten.copy_.default and not isinstance(args[0], There):
        there = False
    if not there or func is aten._local_scalar_dense.default:
        _waits += 1
    held_args, held_kwargs = tree_map(_held, (args, kwargs))
    if wanted is not None:
        held_kwargs["device"] = torch.device("cpu")
    held_kwargs.pop("pin_memory", None)
    found = func(*held_args, **held_kwargs)
    if func is aten.copy_.default:
        return args[0]
    if not there:
        return found
    found = tree_map(lambda each: There(each) if isinstance(each, Tensor) else each, found)
    if any(isinstance(each, There) for each in tensors):
        found = return_and_correct_aliasing(func, args, kwargs, found)
    return found


def _check_together(func: Any, args: tuple[Any, ...], away: list[Tensor], some_there: bool) -> None:
    """A GPU takes a single number of the processor's beside its own tensors, as an operand, and nothing else."""
    if not some_there:
        return
    listed = [each for argument in args if isinstance(argument, list | tuple) for each in tree_leaves(argument)]
    written = func._schema.name.endswith("_") and args and any(args[0] is each for each in away)
    if written or any(each.dim() > 0 or any(each is other for other in listed) for each in away):
        shapes = ", ".join(f"{list(each.shape)}" for each in away)
        raise RuntimeError(f"{func}: expected all tensors on one device, found {shapes} on the processor")


def _held(each: Any) -> Any:
    return each.held if isinstance(each, There) else each


def _factory(overload: Any) -> Callable[..., Any]:
    def make(*args: Any, **kwargs: Any) -> Any:
        with torch.inference_mode(False):
            return _computed(overload, args, {**kwargs, "device": DEVICE})

    return make


def _copy_from(source: Tensor, target: Tensor, non_blocking: bool = False) -> Tensor:
    _held(target).copy_(_held(source), non_blocking)
    return target


_library = torch.library.Library("aten", "IMPL")
for _overload in (
    aten.empty.memory_format,
    aten.empty_strided.default,
    aten.arange.default,
    aten.arange.start,
    aten.arange.start_step,
):
    _library.impl(_overload, _factory(_overload), "PrivateUse1")
_library.impl(aten._copy_from.default, _copy_from, "PrivateUse1")
