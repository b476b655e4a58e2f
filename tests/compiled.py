"""What tests of compiled kernels need: a C++ compiler. Where CI is set, they fail without one."""

from __future__ import annotations

import os

import pytest

from tunesmith.engines.native import kernels

_TOLD = (
    "no C++ compiler: `apt install g++` (Debian, Ubuntu), `dnf install gcc-c++` (Fedora) or `xcode-select --install`"
)
needs_kernels = pytest.mark.skipif(kernels.library() is None and "CI" not in os.environ, reason=_TOLD)
