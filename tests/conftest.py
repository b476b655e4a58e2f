"""What all tests share."""

from __future__ import annotations

import os

from hypothesis import settings

pytest_plugins = ["tests.attack_table"]

# Tiny models gain nothing from a second thread, and spinning threads of several test processes would fight for cores.
os.environ.setdefault("TUNESMITH_THREADS", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["HF_HUB_OFFLINE"] = "1"

# How long an example takes says more of the machine than of the code.
settings.register_profile("default", deadline=None)
settings.load_profile("default")
