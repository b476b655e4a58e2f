"""Which weight settings the hf engine has. Imports no torch, so that settings can be checked before any work."""

from __future__ import annotations

from importlib.util import find_spec

from tunesmith.core.errors import Refused, UsageError
from tunesmith.engines.settings import WeightSettings


def check_supported(settings: WeightSettings, where: str = "train") -> None:
    """Raises Refused for settings that this engine does not have, UsageError if bitsandbytes is needed but missing.

    where: the settings' place in the project file.
    """
    if settings.method == "full":
        raise Refused(
            "method: full works only for families that the native engine runs; this base is run by transformers' "
            "modules, on which adapters alone are trained",
            where=f"{where}.method",
            fix="leave method out, or use a base of one of those families",
        )
    if settings.quantize is not None and find_spec("bitsandbytes") is None:
        raise UsageError(
            "quantize: 4bit needs bitsandbytes, which is not installed",
            where=f"{where}.quantize",
            fix="pip install 'tunesmith[qlora]'",
        )
