"""Child processes that end with their parent."""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal


def end_with_parent(parent: int) -> None:
    """Have Linux kill this process when its parent ends, however that ends. parent: its process number.

    Ends this process at once where the parent is gone already. On other systems only that.
    """
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
    if os.getppid() != parent:
        os._exit(1)
