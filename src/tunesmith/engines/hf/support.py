"""Which weight settings the hf engine has. Imports no torch, so that settings can be checked before any work."""

from __future__ import annotations

from importlib.util import find_spec

from tunesmith.core.errors import Refused, UsageError
from tunesmith.engines.device import gpu_present
from tunesmith.engines.settings import WeightSettings


def check_supported(settings: WeightSettings, where: str = "train", *, ranks: int = 1) -> None:
    """Raises Refused for settings that this engine does not have, UsageError if bitsandbytes is needed but missing.

    where: the settings' place in the project file. ranks: how many processes train together.
    """
    if settings.method == "full" and ranks > 1:
        raise Refused(
            "method: full runs in one process only: several ranks train adapters",
            where=f"{where}.method",
            fix="leave method out, or start the command without torchrun",
        )
    if settings.method == "full":
        raise Refused(
            "method: full works only for families that the native engine runs, and on that engine; here transformers' "
            "modules would train, on which adapters alone are trained",
            where=f"{where}.method",
            fix="leave method out, or write engine: {train: native}, with a base of one of those families",
        )
    if settings.quantize is not None and ranks > 1:
        raise Refused(
            "a base in 4 bits is not sharded: its packed numbers do not fall apart by rows",
            where=f"{where}.quantize",
            fix="leave quantize out, or train in one process, without torchrun",
        )
    if settings.start == "pissa" and settings.precision == "bf16":
        raise Refused(
            "start: pissa takes its start out of the base's weights, and bf16 would round what is left of them",
            where=f"{where}.precision",
            fix="leave precision or start out",
        )
    if settings.attention == "flash_attention_2":
        _check_flash_attention(settings, where)
    if settings.quantize is not None and find_spec("bitsandbytes") is None:
        raise UsageError(
            "quantize: 4bit needs bitsandbytes, which is not installed",
            where=f"{where}.quantize",
            fix="pip install 'tunesmith[qlora]'",
        )


def _check_flash_attention(settings: WeightSettings, where: str) -> None:
    """Where the package is missing, transformers would download code for it."""
    if not gpu_present() or settings.precision == "fp32":
        raise Refused(
            "attention: flash_attention_2 computes on a GPU and in bf16 only",
            where=f"{where}.attention",
            fix="leave attention out",
        )
    if find_spec("flash_attn") is None:
        raise UsageError(
            "attention: flash_attention_2 needs flash-attn, which is not installed",
            where=f"{where}.attention",
            fix="pip install flash-attn",
        )
