"""What training on a 4-bit base needs, asked before any work. Cheap to import."""

from __future__ import annotations

from importlib.util import find_spec

from tunesmith.core.errors import Refused, UsageError
from tunesmith.models.families import FAMILIES, ours


def check_four_bits(family: str, processes: int, where: str = "train.quantize") -> None:
    """Raises UsageError where bitsandbytes is not installed, Refused for a base or a run that cannot have it."""
    if find_spec("bitsandbytes") is None:
        raise UsageError(
            "quantize: 4bit needs bitsandbytes, which is not installed",
            where=where,
            fix='pip install "tunesmith[qlora]", or leave quantize out',
        )
    if not ours(family):
        raise Refused(
            f"a base of family {family} runs in transformers' own modules, which are not quantised here",
            where=where,
            fix=f"leave quantize out, or take a base of one of {', '.join(FAMILIES)}",
        )
    if processes > 1:
        raise Refused(
            "a training on a 4-bit base is not shared among processes",
            where=where,
            fix="train it in one, or leave quantize out",
        )
