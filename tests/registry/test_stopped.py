"""A registration that is killed at its steps, several times in a row: the next call carries on.

Every single write of every change is in tests/attacks/test_kill_points.py.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from typing import Any

import pytest

from tests.fabricate import Chain, approve
from tests.forked import run_forked
from tunesmith.registry import registration
from tunesmith.registry.approvals import require_approved
from tunesmith.registry.history import verify_log
from tunesmith.registry.registration import register
from tunesmith.registry.signing import keys
from tunesmith.registry.verification import verify_version
from tunesmith.registry.versions import Version, list_versions
from tunesmith.store import audit
from tunesmith.store.blobs.local import LocalBlobs
from tunesmith.store.people import identities
from tunesmith.store.store import Store

pytestmark = pytest.mark.slow


def die(*_: Any, **__: Any) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def die_after(module: Any, name: str) -> None:
    real = getattr(module, name)

    def then_die(*given: Any, **named: Any) -> None:
        real(*given, **named)
        die()

    setattr(module, name, then_die)


def killed(store: Store, prepare: Callable[[], None], work: Callable[[Store], object]) -> bool:
    """Whether a forked child that does prepare() and then the work was killed; it has everything imported already."""

    def both() -> None:
        prepare()
        work(Store(store.root))

    store.engine.dispose()
    status = run_forked(both)
    assert status == 0 or os.WTERMSIG(status) == signal.SIGKILL
    return status != 0


def registered(store: Store, chain: Chain) -> Version:
    return register(store, name="intents", verdict=chain.verdict, actor="olive")


def check_registered(store: Store, chain: Chain) -> Version:
    version = registered(store, chain)
    assert version.label == "intents@v1"
    assert list_versions(store) == [version]
    assert verify_version(store, version.label).ok
    Store(store.root).engine.dispose()  # opening it, as each command does, removes what the killed process left
    assert list((store.root / "work").iterdir()) == []
    return version


def check_whole(store: Store, chain: Chain) -> None:
    version = check_registered(store, chain)
    approve(store, version, approver="ann")
    assert require_approved(store, version).approver == "ann"
    assert verify_log(store) == []


@pytest.mark.parametrize(
    ("moment", "times"),
    [("signed aside", 3), ("partly in place", 3), ("in place", 1), ("before commit", 3), ("committed", 1)],
)
def test_a_killed_registration_is_carried_on(store: Store, chain: Chain, moment: str, times: int) -> None:
    keys.ensure_key(store, "olive")  # it has an audit entry, at which the child must not be killed
    prepare = {
        "signed aside": lambda: die_after(registration, "sync_files"),
        "partly in place": lambda: die_after(LocalBlobs, "put_file"),
        "in place": lambda: die_after(Store, "put_version"),
        "before commit": lambda: setattr(audit, "append", die),
        "committed": lambda: setattr(identities, "publish_trust", die),
    }[moment]
    for _ in range(times):
        assert killed(store, prepare, lambda own: registered(own, chain))
    assert bool(store.version_folders("intents")) == (moment not in ("signed aside", "partly in place"))
    assert len(list_versions(store)) == (1 if moment == "committed" else 0)
    check_whole(store, chain)
