"""Pruning deletes what no policy keeps and nothing needs; a hold keeps what a version was made from."""

from __future__ import annotations

import os
import random
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import select, update

from tests.acting import do
from tests.commands import call, printed
from tests.fabricate import APPROVER, OPERATOR, OWNER, STEWARD, Chain, Scene, approve, build_scene, put_chain
from tests.forked import run_elsewhere, run_forked
from tests.killed import Home, kill_each
from tests.monitoring.test_erasure import ANNA, JOB, erase, home, plan, plant, scene_in
from tunesmith.core.clock import stamp
from tunesmith.core.digests import digest_bytes
from tunesmith.core.errors import Refused
from tunesmith.core.system.scratch import SCRATCH
from tunesmith.monitoring import pruning
from tunesmith.monitoring.pruning import Pruned, prune, usage
from tunesmith.monitoring.recall import Cause, recall
from tunesmith.monitoring.settings import KeepSettings
from tunesmith.monitoring.traces import work_folders
from tunesmith.registry.verification import verify_version
from tunesmith.services import storage
from tunesmith.services.audit import show_audit, verify_audit
from tunesmith.store.blobs.local import LocalBlobs
from tunesmith.store.locks import LockHeld
from tunesmith.store.records import Record
from tunesmith.store.store import Store, blob_key, record_key
from tunesmith.store.tables import JobRow, RecordRow

__all__ = ["home"]
STRAY = b"no record names this"


@pytest.fixture(autouse=True)
def _owner(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TUNESMITH_USER", OWNER)


@pytest.fixture
def scene(tmp_path: Path) -> Scene:
    return build_scene(tmp_path / "store")


@contextmanager
def later(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """What was written so far is older than a day."""
    with monkeypatch.context() as patch:
        patch.setattr(pruning, "FRESH", -60.0)
        yield


def trained(scene: Scene, seeds: range) -> list[Chain]:
    """Chains whose trainings were made on so many days, one after the other."""
    made = []
    for seed in seeds:
        chain = put_chain(scene.store, seed=seed, base=scene.base, dataset=scene.dataset)
        with scene.store.writing() as session:
            at = f"2026-01-{seed:02}T00:00:00+00:00"
            session.execute(update(RecordRow).where(RecordRow.digest == chain.training).values(created_at=at))
        made.append(chain)
    return made


def unused_work(store: Store) -> Path:
    """A file in a work folder that nobody used for years."""
    file = store.local("work", "train-1", "checkpoints", "step-1")
    file.parent.mkdir(parents=True)
    file.write_bytes(b"x" * 1000)
    for path in (file, file.parent, file.parent.parent):
        os.utime(path, (0, 0))
    return file


def pruned(store: Store, trainings: int | None = None, **more: Any) -> Pruned:
    return prune(store, KeepSettings(trainings=trainings, **more), actor=OPERATOR)


def complete(store: Store) -> None:
    """Every record that is there has its parents and blobs, the index has it, and every blob is named."""
    records = {f"sha256:{Path(key).stem}": store.blobs.get(key) for key in store.blobs.keys("records/")}
    with store.reading() as session:
        assert records.keys() == {store.left_of(each, record_key) for each in session.scalars(select(RecordRow.digest))}
    named = set()
    for digest in records:
        record = store.record(digest)
        assert all(store.has_record(parent) for parent in record.parents.values())
        named |= {blob_key(store.left_of(blob, blob_key)) for blob in record.blobs.values()}
    assert named == set(store.blobs.keys("blobs/"))


def test_old_trainings_go_with_what_was_made_from_them(home: Home, monkeypatch: pytest.MonkeyPatch) -> None:
    scene = build_scene(home.root, store=home.open())
    store = scene.store
    versions = [scene.version(50), scene.version(51, approved=False)]
    chains = trained(scene, range(1, 6))
    store.put_bytes(STRAY)
    work = unused_work(store)
    (left := store.root / f"{SCRATCH}left").write_text("half")  # by a process that was killed
    sizes = {one.place: (one.count, one.bytes) for one in usage(store).places}
    assert sizes["trainings of tuned"][0] == 7
    assert sizes["blobs that no record names"][1] >= len(STRAY)
    assert sizes["work on this machine: train"] == (1, 1000)
    assert ("database" in sizes) == isinstance(store.blobs, LocalBlobs)
    # What is young, and what a running job may use, stays.
    assert pruned(store, 2).places == ()
    assert not left.exists()
    with later(monkeypatch):
        with store.writing() as session:
            session.add(JobRow(id=2, project="p", kind="run", state="running", created_by="x", result={}, **JOB))
        waits = pruned(store, 2)
        assert (waits.in_use, waits.trainings) == (("job 2 (run)",), ())
        assert not store.blobs.exists(blob_key(digest_bytes(STRAY)))
        with store.writing() as session:
            session.get_one(JobRow, 2).state = "failed"
        with store.lock("copying", "backing up the store"), pytest.raises(LockHeld, match="backing up"):
            pruned(store, 2)
        shown = prune(store, KeepSettings(trainings=2, work="30d"), actor=OPERATOR, dry_run=True)
        assert (work.exists(), all(store.has_record(str(each.training)) for each in chains)) == (True, True)
        done = pruned(store, 2, work="30d")
        assert shown.model_dump(exclude={"done"}) == done.model_dump(exclude={"done"})
        # The versions' trainings were made after these five, so of the five none is among the newest two.
        assert list(done.trainings) == [each.training for each in chains]
        entry = show_audit(store, action="store.prune", limit=1).entries[0]
        assert (entry.actor, entry.detail["bytes"], entry.detail["trainings"]) == (
            OPERATOR,
            done.bytes,
            [*done.trainings],
        )
        assert done.bytes > 1000 + 5 * 500
        assert pruned(store, 2, work="30d").places == ()
    for version in versions:
        assert verify_version(store, version.label).problems == []
    assert (verify_audit(store).problems, work.exists()) == ((), False)
    complete(store)
    with pytest.raises(Refused, match="may not"):
        prune(store, KeepSettings(), actor=APPROVER)
    # The same may be made again, and nothing is made from what is gone.
    candidate = Record(kind="verdict", parents={"evaluation": chains[0].evaluation, "candidate": chains[0].candidate})
    with pytest.raises(Refused, match="parent record"):
        store.put_record(candidate)
    assert put_chain(store, seed=1, base=scene.base, dataset=scene.dataset) == chains[0]
    with store.writing() as session, pytest.raises(Refused, match="was pruned meanwhile"):
        store.index_record(Record(kind="signoff", parents={"dataset": scene.dataset}, body={"never": "kept"}), session)


def prune_all(store: Store) -> Pruned:
    pruning.FRESH = -60.0
    return pruned(store, 2, work="30d")


def goes_on(store: Store) -> None:
    """What the next prune finds of a killed one, and does."""
    prune_all(store)
    assert prune_all(store).places == ()
    assert verify_version(store, "home@v1").problems == []
    assert verify_audit(store).problems == ()
    complete(store)
    with store.reading() as session:
        kinds = list(session.scalars(select(RecordRow.kind)))
    assert (kinds.count("training"), kinds.count("version"), kinds.count("dataset")) == (2, 1, 1)
    assert not work_folders(store)


def kill_all(home: Home) -> None:
    def make() -> None:
        scene = build_scene(home.root, store=home.open())
        scene.version(50)
        trained(scene, range(1, 9))
        unused_work(scene.store)
        scene.store.put_bytes(STRAY)

    assert run_forked(make) == 0
    points = kill_each(home, prune_all, goes_on, samples=3)
    assert points >= 50, points
    print(f"{home.url.partition(':')[0]} has {points} points")


@pytest.mark.attack("crash", "kill -9 of a prune at its writes", "the next one goes on; what stays verifies")
def test_a_killed_prune_goes_on(home: Home) -> None:
    assert run_elsewhere(kill_all, home, seconds=3600) == 0


def test_what_was_made_while_files_go_stays(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run makes the same training again, after the index forgot it and before its files are deleted."""
    store, delete = scene.store, pruning._delete
    chain, _ = trained(scene, range(1, 3))

    def made_again(*given: Any) -> None:
        assert put_chain(store, seed=1, base=scene.base, dataset=scene.dataset) == chain
        delete(*given)

    monkeypatch.setattr(pruning, "_delete", made_again)
    with later(monkeypatch):
        assert pruned(store, 1).trainings == (chain.training,)
    complete(store)


@pytest.mark.parametrize("seed", range(2))
def test_what_a_version_reaches_stays(scene: Scene, monkeypatch: pytest.MonkeyPatch, seed: int) -> None:
    store, draw = scene.store, random.Random(seed)
    versions = []
    for number in range(1, 9):
        if draw.random() < 0.5:
            trained(scene, range(number, number + 1))
            continue
        version = scene.version(number, approved=False, name=draw.choice(("home", "other")))
        fate = draw.choice(("approve", "refuse", "recall", "wait"))
        if fate in ("approve", "refuse"):
            approve(store, version, approver=APPROVER, decision=fate, reason="so")
        if fate == "recall":
            recall(store, Cause(kind="version", value=version.digest), reason="so", actor=STEWARD)
        versions.append(version)
    with later(monkeypatch):
        pruned(store, draw.choice((1, 2)))
    for version in versions:
        assert verify_version(store, version.label).problems == []
    assert verify_audit(store).ok
    complete(store)


def test_a_hold_blocks_an_erasure_until_it_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = tmp_path / "store"
    anna = scene_in(Store(root, url=f"sqlite:///{root / 'tunesmith.db'}"))
    store = anna.store
    versions = plant(anna)
    said = f"home@v2 is held by {STEWARD} ({stamp()[:10]}): a lawsuit"
    plan(store, ANNA, reason="she asked", actor=STEWARD)
    assert call(root, "hold", "home@v2", "--reason", "a lawsuit", "--as", STEWARD)["held"] is True
    assert said in printed(root, "show", "home@v2")
    for refused in (lambda: plan(store, ANNA, reason="she asked", actor=STEWARD), lambda: erase(store, 1)):
        with pytest.raises(Refused, match=f"{re.escape(said)}; nothing that it was made from is erased"):
            refused()
    assert list(store.blobs.keys("erasures/")) == []
    with pytest.raises(Refused, match="may not"):
        do(store, storage.hold, actor=APPROVER, version="home@v2", reason="over", end=True)
    do(store, storage.hold, actor=STEWARD, version="home@v2", reason="over", end=True)
    with pytest.raises(Refused, match="home@v2 is not held"):
        do(store, storage.hold, actor=STEWARD, version="home@v2", reason="over", end=True)
    assert "a lawsuit" not in printed(root, "show", "home@v2")
    assert erase(store, 1).state == "done"
    # What erasures left is kept, and goes with its training.
    trained(anna, range(5, 8))
    with later(monkeypatch):
        assert len(pruned(store, 1).trainings) == 3
    assert [verify_version(store, each.label).problems for each in versions] == [[], []]
    assert verify_audit(store).ok
    complete(store)
