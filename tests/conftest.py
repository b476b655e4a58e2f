"""What all tests share."""

from __future__ import annotations

import os

# Tiny models gain nothing from a second thread, and spinning threads of several test processes would fight for cores.
os.environ.setdefault("TUNESMITH_THREADS", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["HF_HUB_OFFLINE"] = "1"
