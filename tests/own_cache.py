"""A cache folder for one test, in which the native engine's kernels are compiled already."""

import shutil
from pathlib import Path

from tunesmith.engines.native import kernels


def own_cache(folder: Path) -> str:
    """The folder, for TUNESMITH_CACHE. Otherwise each process compiles the kernels, for 8 s of processor time."""
    (folder / "kernels").mkdir(parents=True)
    library = kernels._built()
    if library is not None:
        shutil.copy2(library, folder / "kernels")
    return str(folder)
