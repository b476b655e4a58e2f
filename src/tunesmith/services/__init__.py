"""What the command line, HTTP and Python share: one function for each action, with a typed result.

One module for each noun. `result.document()` is what `--json` prints and what HTTP routes answer. As an attribute of
this package, such as `services.rollouts`, a module loads when it is first used.
"""

from __future__ import annotations

import importlib
from types import ModuleType
from typing import TYPE_CHECKING

if not TYPE_CHECKING:  # a checker knows the modules that are imported somewhere

    def __getattr__(name: str) -> ModuleType:
        if name.startswith("_"):
            raise AttributeError(name)
        return importlib.import_module(f"{__name__}.{name}")
