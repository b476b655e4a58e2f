"""What tests of compiled kernels need."""

from __future__ import annotations

import pytest

from tests.programs import program
from tunesmith.engines.native import kernels


@pytest.fixture
def compiled_kernels() -> None:
    """A C++ compiler. A source that does not compile would leave everything to the portable path."""
    program("c++")
    assert kernels.library() is not None, "the kernels do not compile"
