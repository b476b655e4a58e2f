"""Locks between processes and threads, and what happens when their owner is killed."""

import os
import signal
import subprocess
import sys
import time
from unittest import mock

import psutil
import pytest
from sqlalchemy import update

from tunesmith.core.errors import TunesmithError
from tunesmith.store import database, locks
from tunesmith.store.store import Store
from tunesmith.store.tables import LockRow

HOLD = """
import sys, time
from pathlib import Path
from tunesmith.store.store import Store
with Store(Path(sys.argv[1])).lock("stage", "the training"):
    print("held", flush=True)
    time.sleep(600)
"""


def row(store: Store) -> LockRow | None:
    with store.reading() as session:
        return session.get(LockRow, "stage")


def change(store: Store, **values: object) -> None:
    with store.writing() as session:
        session.execute(update(LockRow).values(**values))


def test_a_held_lock_is_refused_with_its_purpose(store: Store) -> None:
    with store.lock("stage", "the training"):
        with pytest.raises(TunesmithError, match="the training") as caught, store.lock("stage", "another"):
            pass
        assert str(os.getpid()) in str(caught.value)
        with store.lock("other", "something else"):
            pass
    with store.lock("stage", "the next one"):
        change(store, host="elsewhere")
        with pytest.raises(TunesmithError, match="on elsewhere"), store.lock("stage", "mine"):
            pass
        change(store, until=time.time() - 1)
        with store.lock("stage", "after its lease"):
            pass
    with store.lock("stage", "the last one"):
        change(store, started=1.0)
        with store.lock("stage", "another process has this number now"):
            pass
    assert row(store) is None


def test_a_killed_owner_loses_the_lock_at_once(store: Store) -> None:
    store.engine.connect().close()
    process = subprocess.Popen([sys.executable, "-c", HOLD, str(store.root)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    with pytest.raises(TunesmithError, match="another process"), store.lock("stage", "mine"):
        pass
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdout.close()
    with store.lock("stage", "mine"):
        found = row(store)
        assert found is not None
        assert found.pid == os.getpid()


def test_a_clock_that_is_corrected_gives_a_lock_to_nobody(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    with store.lock("stage", "the training"):
        moved = psutil.Process().create_time() + 5
        monkeypatch.setattr(psutil.Process, "create_time", lambda _process: moved)
        with pytest.raises(locks.LockHeld), store.lock("stage", "mine"):
            pass


def test_the_former_owner_does_not_release_the_next_ones_lock(store: Store) -> None:
    with store.lock("stage", "the training"):
        change(store, owner="somebody else")
    assert row(store) is not None


def test_a_lease_is_renewed_while_its_owner_works(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(locks, "LEASE_SECONDS", 0.3)
    with store.lock("stage", "the training"):
        first = row(store)
        assert first is not None
        deadline = time.time() + 120
        while (now := row(store)) is not None and now.until <= first.until:
            assert time.time() < deadline
            time.sleep(0.05)


def test_a_lock_that_could_not_be_given_back(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    full = mock.Mock(side_effect=TunesmithError("the disk is full"))
    with pytest.raises(TunesmithError, match="full"), store.lock("a", "first"):
        monkeypatch.setattr(database, "writing", full)
    monkeypatch.undo()
    with store.lock("a", "second"), pytest.raises(locks.LockHeld), store.lock("a", "third"):
        pass
