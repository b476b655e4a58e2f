"""Compiles this folder's C++ files for this machine, once, and loads them as one library.

The library is kept in the cache ($TUNESMITH_CACHE, else ~/.cache/tunesmith) under a digest of the sources, the compiler
and the processor. Without a C++ compiler, or with TUNESMITH_KERNELS=portable, there is no library, and network/ops.py
does the same arithmetic in PyTorch.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
from functools import cache
from pathlib import Path
from typing import Any

from tunesmith.core.errors import UsageError
from tunesmith.core.system.scratch import scratch_folder

_SOURCES = sorted(Path(__file__).parent.glob("*.cpp"))
_HEADERS = sorted(Path(__file__).parent.glob("*.h"))
_FLAGS = [
    "-O3",
    "-march=native",
    "-std=c++17",
    "-shared",
    "-fPIC",
    "-fopenmp",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-ffp-contract=fast",
] + (["-mprefer-vector-width=512"] if platform.machine() == "x86_64" else [])


INT64, FLOAT, POINTER = ctypes.c_int64, ctypes.c_float, ctypes.c_void_p


def fields(*typed: tuple[Any, str]) -> list[tuple[str, Any]]:
    """The fields of a C structure: of each type the names, with spaces between them."""
    return [(name, kind) for kind, names in typed for name in names.split()]


class TokenLayout(ctypes.Structure):
    """Layout of kernels.h."""

    _fields_ = fields((INT64, "tokens prefix rows longest kv group size"), (POINTER, "row_of place_of starts"))


class RowPages(ctypes.Structure):
    """Pages of kernels.h."""

    _fields_ = fields((INT64, "rows kv group size page most longest stride"), (POINTER, "table length"))


def library() -> Any:
    """The loaded library; None on the portable path."""
    return _loaded()[1]


def identity() -> str:
    """Which kernels compute: "portable", or a digest. A training is resumed only with the same ones."""
    return _loaded()[0]


def slowness() -> str | None:
    """Why everything takes several times as long, and what to do; None with kernels, and where none were wanted."""
    if library() is not None or os.environ.get("TUNESMITH_KERNELS") == "portable":
        return None
    compiler = _compiler()
    reason = "no C++ compiler was found" if compiler is None else f"{compiler} could not compile the kernels"
    return (
        f"{reason}: training and answering will be several times slower. To install a compiler: `apt install g++` "
        "(Debian, Ubuntu), `dnf install gcc-c++` (Fedora) or `xcode-select --install` (macOS)"
    )


@cache
def _loaded() -> tuple[str, Any]:
    path = _built()
    if path is None:
        return "portable", None
    import torch  # noqa: F401 - loads torch's OpenMP runtime first: two runtimes would compete for the cores

    try:
        return path.stem, ctypes.CDLL(str(path))
    except OSError:
        return "portable", None  # a cache on a noexec file system, or a damaged file


def _built() -> Path | None:
    wanted = os.environ.get("TUNESMITH_KERNELS", "native")
    if wanted not in ("native", "portable"):
        raise UsageError(f"there are no {wanted!r} kernels", where="TUNESMITH_KERNELS", fix="set native or portable")
    compiler = _compiler()
    if wanted == "portable" or compiler is None:
        return None
    from tunesmith.core.system.files import cache_folder

    try:
        text = b"".join(path.read_bytes() for path in (*_HEADERS, *_SOURCES)) + repr(_FLAGS).encode()
        version = subprocess.run([compiler, "--version"], capture_output=True, check=True, timeout=60).stdout
        path = cache_folder() / "kernels" / f"{hashlib.sha256(text + version + _processor()).hexdigest()[:16]}.so"
        if not path.is_file():
            path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            with scratch_folder(path.parent) as scratch:
                made = scratch / path.name
                command = [compiler, *_FLAGS, *map(str, _SOURCES), "-o", str(made)]
                subprocess.run(command, capture_output=True, check=True, timeout=300)
                os.replace(made, path)
        return path
    except (OSError, subprocess.SubprocessError):
        return None  # a compiler without OpenMP or headers, or a cache that is not writable


def _compiler() -> str | None:
    return os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++")


def _processor() -> bytes:
    """What -march=native depends on. Machines that share a cache must not use each other's libraries."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor().encode()
    return "".join(sorted({line for line in lines if line.startswith(("flags", "Features", "model"))})).encode()
