"""What the native engine trains. Imports no torch, so that settings can be checked before any work."""

from __future__ import annotations

from tunesmith.core.errors import Refused
from tunesmith.engines.settings import WeightSettings
from tunesmith.models.families import NATIVE_FAMILIES, is_native


def lacks(family: str, weights: WeightSettings, *, ranks: int = 1, where: str = "train") -> str | None:
    """Why this engine does not train a base of a family with these settings; None if it does.

    ranks: how many processes train together. where: the weights' place in the project file.
    """
    needs = {
        f"does not compute the family {family!r}, but {', '.join(NATIVE_FAMILIES)}": not is_native(family),
        f"does not train on a base in 4 bits, which {where}.quantize asks for": weights.quantize is not None,
        f"keeps the base in bf16, and {where}.precision asks for fp32": weights.precision == "fp32",
        f"has its own attention, and {where}.attention names another": weights.attention is not None,
        f"has its own kernels, and {where}.kernels names others": weights.kernels is not None,
        f"does not compute layers again, which {where}.recompute asks for": weights.recompute,
        f"trains no magnitudes, which {where}.dora asks for": weights.dora,
        f"starts no adapter at singular vectors, which {where}.start asks for": weights.start == "pissa",
        "trains in one process, and several are to train together": ranks > 1,
    }
    return next((reason for reason, given in needs.items() if given), None)


def refuse(reason: str) -> Refused:
    """The error for what this engine does not train."""
    return Refused(
        f"the native engine {reason}", where="engine.train", fix="write train: hf, or leave engine.train out"
    )
