"""kill -9 at the worst moments of a registration, in a process of its own; the next call carries on."""

from __future__ import annotations

import signal
import subprocess
import sys
import textwrap

import pytest

from tests.fabricate import Chain, approve
from tunesmith.registry.approvals import require_approved
from tunesmith.registry.history import verify_log
from tunesmith.registry.signing import keys
from tunesmith.registry.versions import list_versions, register, verify_version
from tunesmith.store.store import Store

SCRIPT = """
    import os, signal, sys
    from pathlib import Path
    from tunesmith.registry import versions
    from tunesmith.store import audit, database
    from tunesmith.store.store import Store

    def die(*_, **__):
        os.kill(os.getpid(), signal.SIGKILL)

    def after(module, name):
        real = getattr(module, name)
        def then_die(*given, **named):
            real(*given, **named)
            die()
        setattr(module, name, then_die)

    moment = sys.argv[3]
    if moment == "signed aside":
        after(versions, "sync_files")
    elif moment == "in place":
        after(os, "rename")
    elif moment == "before commit":
        audit.append = die
    elif moment == "committed":
        audit.write_head = die
    versions.register(Store(Path(sys.argv[1])), name="intents", verdict=sys.argv[2], actor="olive")
"""


@pytest.mark.parametrize(
    ("moment", "times"), [("signed aside", 3), ("in place", 1), ("before commit", 3), ("committed", 1)]
)
def test_a_registration_killed_anywhere_is_carried_on(store: Store, chain: Chain, moment: str, times: int) -> None:
    keys.ensure_key(store, "olive")  # its own entry of the log is not the one to be killed at
    command = [sys.executable, "-c", textwrap.dedent(SCRIPT), str(store.root), chain.verdict, moment]
    for _ in range(times):
        done = subprocess.run(command, capture_output=True, text=True, timeout=60)
        assert done.returncode == -signal.SIGKILL, done.stderr
    assert len(list_versions(store)) == (1 if moment == "committed" else 0)
    version = register(store, name="intents", verdict=chain.verdict, actor="olive")
    assert version.label == "intents@v1"
    assert list_versions(store) == [version]
    assert verify_version(store.root, version.label).ok
    assert list((store.root / "work").iterdir()) == []
    approve(store, version, approver="ann")
    assert require_approved(store, version).approver == "ann"
    assert verify_log(store) == []
