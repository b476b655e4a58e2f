"""What tests of compiled kernels need."""

from collections.abc import Callable, Iterator

import pytest

from tests.programs import program
from tunesmith.engines.native import kernels
from tunesmith.engines.native.network import products


@pytest.fixture
def compiled_kernels() -> None:
    """A C++ compiler. A source that does not compile would leave everything to the portable path."""
    program("c++")
    assert kernels.library() is not None, "the kernels do not compile"


@pytest.fixture
def portable(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[], None]]:
    """A function from whose call on PyTorch computes, as on a machine without a compiler."""

    def without_kernels() -> None:
        monkeypatch.setattr(kernels, "library", lambda: None)
        products._tile_library.cache_clear()

    yield without_kernels
    products._tile_library.cache_clear()
