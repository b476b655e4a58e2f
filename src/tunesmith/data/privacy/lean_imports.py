"""Imports presidio and spaCy without torch and transformers.

Both import them where they are installed, for models that the scan does not use. That takes seconds of processor time
in each process that scans rows.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.abc import MetaPathFinder
from importlib.metadata import entry_points
from types import ModuleType

_UNUSED = ("torch", "transformers")
_thread = threading.local()  # .hidden: packages that this thread cannot import now


@contextmanager
def without_torch() -> Iterator[None]:
    """Imports of this thread find no torch and no transformers meanwhile, unless they are loaded already.

    Nothing is hidden where a package besides presidio adds steps to spaCy, as spacy-transformers does: a model may need
    torch then.
    """
    if _FINDER not in sys.meta_path:  # it stays: other threads may be going through the list
        sys.meta_path.insert(0, _FINDER)
    steps = (each.module.partition(".")[0] for each in entry_points(group="spacy_factories"))
    # transformers that is loaded imports parts of itself, and of torch, when they are used.
    needed = "transformers" in sys.modules or set(steps) - {"presidio_analyzer"}
    _thread.hidden = () if needed else [name for name in _UNUSED if name not in sys.modules]
    try:
        yield
    finally:
        _thread.hidden = ()


class _Finder(MetaPathFinder):
    """Raises the error of a missing package for packages that are hidden from this thread."""

    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> None:
        if name.partition(".")[0] in getattr(_thread, "hidden", ()):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)


_FINDER = _Finder()
