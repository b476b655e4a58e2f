"""Imports transformers, PEFT and bitsandbytes so that none of them downloads code.

They take seconds to import, so this happens only when a model is loaded or an adapter is needed.
"""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from importlib.util import find_spec
from types import ModuleType


@cache
def transformers() -> ModuleType:
    """The transformers package, without progress bars and warnings, and without compiled code from the hub."""
    os.environ.setdefault("USE_HUB_KERNELS", "0")  # else it downloads code if the package `kernels` is installed
    import transformers
    from transformers.utils import logging as messages

    messages.disable_progress_bar()
    messages.set_verbosity_error()
    return transformers


@cache
def peft() -> ModuleType:
    """The PEFT package. It imports bitsandbytes itself if that is installed."""
    if find_spec("bitsandbytes") is not None:
        bitsandbytes()
    import peft

    return peft


@cache
def bitsandbytes() -> ModuleType:
    """The bitsandbytes package."""
    with _without_downloads():
        import bitsandbytes
    return bitsandbytes


@contextmanager
def _without_downloads() -> Iterator[None]:
    """Hide the package `kernels` from bitsandbytes, which would download code with it while it is imported, and warns
    if it is missing. That code serves products in bf16, which are not used here."""
    log = logging.getLogger("bitsandbytes")
    level, kernels = log.level, sys.modules.get("kernels")
    log.setLevel(logging.ERROR)
    sys.modules["kernels"] = None  # type: ignore[assignment]
    try:
        yield
    finally:
        log.setLevel(level)
        del sys.modules["kernels"]
        if kernels is not None:
            sys.modules["kernels"] = kernels
