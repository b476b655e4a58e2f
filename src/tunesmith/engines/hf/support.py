"""Which weight settings the hf engine has. Imports no torch, so that settings can be checked before any work."""

from __future__ import annotations

from importlib.util import find_spec

from tunesmith.core.errors import Refused, UsageError
from tunesmith.engines.device import gpu_present
from tunesmith.engines.settings import WeightSettings


def check_supported(settings: WeightSettings, where: str = "train", *, ranks: int = 1, gpu: bool | None = None) -> None:
    """Raises Refused for settings that this engine does not have, UsageError if a package that they need is missing.

    where: the settings' place in the project file. ranks: how many processes train together. gpu: whether they compute
    on GPUs; by default, whether this process does.
    """
    gpu = gpu_present() if gpu is None else gpu
    four = settings.quantize is not None
    flash = settings.attention == "flash_attention_2"
    for given, key, what, fix in (
        (four and ranks > 1, "quantize", "a base in 4 bits is not sharded: its packed numbers do not fall apart "
         "by rows",
         "leave quantize out, or train in one process, without torchrun"),
        (settings.start == "pissa" and settings.precision == "bf16", "precision", "start: pissa takes its start out of "
         "the base's weights, and bf16 would round what is left of them", "leave precision or start out"),
        (flash and (settings.precision == "fp32" or not gpu), "attention", "attention: flash_attention_2 "
         "computes on a GPU and in bf16 only", "leave attention out"),
        (settings.kernels is not None and not gpu, "kernels", "kernels: liger computes on a GPU only",
         "leave kernels out"),
    ):  # fmt: skip
        if given:
            raise Refused(what, where=f"{where}.{key}", fix=fix)
    # Without flash_attn, transformers would download code for it.
    for given, key, package, install in (
        (flash, "attention", "flash_attn", "pip install flash-attn"),
        (four, "quantize", "bitsandbytes", "pip install 'tunesmith[qlora]'"),
        (settings.kernels is not None, "kernels", "liger_kernel", "pip install 'tunesmith[liger]'"),
    ):
        if given and find_spec(package) is None:
            what = f"{key}: {getattr(settings, key)} needs {package}, which is not installed"
            raise UsageError(what, where=f"{where}.{key}", fix=install)
