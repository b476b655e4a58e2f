"""A disk that is full: the error says where and what to do, nothing half written stays, and the command works later."""

import errno
import json
import os
import random
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.fabricate import OWNER, STEWARD, build_scene
from tests.killed import Home
from tests.monitoring import test_erasure as erasing
from tests.tiny import write_model
from tunesmith.core.errors import TunesmithError
from tunesmith.core.system.files import copy_durably, disk_full, is_disk_full, write_atomic
from tunesmith.core.system.scratch import SCRATCH
from tunesmith.data.dataset import load_dataset
from tunesmith.project import Project
from tunesmith.registry.signing.keys import ensure_key
from tunesmith.registry.verification import verify_version
from tunesmith.registry.versions import list_versions
from tunesmith.services.datasets import build
from tunesmith.store import audit, database
from tunesmith.store.people.identities import add_user
from tunesmith.store.store import Store

Leave = Callable[[int], None]


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A small file system of its own."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=24m", "none", str(folder)]
    if os.getuid() != 0 or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("only root can mount a small file system")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


@pytest.fixture
def leave(disk: Path) -> Leave:
    """Fills the disk up to so many free bytes."""

    def fill(free: int) -> None:
        filler = disk / "filler"
        filler.unlink(missing_ok=True)
        have = shutil.disk_usage(disk).free
        with filler.open("wb") as stream:
            os.posix_fallocate(stream.fileno(), 0, max(1, have - free))

    return fill


def sound(store: Store) -> None:
    """The audit log verifies, and nothing half written is there."""
    with database.reading(store.engine) as session:
        assert audit.verify(session) == []
    assert [path for path in store.root.rglob("*") if path.name.startswith((SCRATCH, "rows.db"))] == []


def told(error: TunesmithError, disk: Path) -> None:
    """It says where, how much was free, and what to do."""
    assert "disk is full" in error.what
    assert "MB are free" in error.what
    assert str(disk) in (error.where or "")
    assert "free space" in (error.fix or "")


@pytest.mark.attack("crash", "a full disk at many points of a build")
def test_a_build_on_a_full_disk(disk: Path, leave: Leave, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TUNESMITH_CACHE", str(tmp_path / "cache"))
    write_model(tmp_path / "model")
    draw = random.Random(0)
    words = ["".join(draw.choices("abcdefghijklmnop", k=7)) for _ in range(3000)]
    rows = [{"prompt": " ".join(draw.choices(words, k=12)), "completion": draw.choice(words)} for _ in range(2000)]
    (disk / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = {"sources": [{"path": "rows.jsonl", "licence": "MIT"}], "privacy": {"entities": []}}
    settings = {"name": "demo", "base": str(tmp_path / "model"), "data": data, "candidates": {"zero": {"prompt": "p"}}}
    (disk / "p").write_text("answer")
    (disk / "tunesmith.yaml").write_text(json.dumps(settings))
    store = Project.load(disk).store
    store.engine.dispose()
    refused = 0
    for free in (0, 60_000, 150_000, 300_000, 600_000, 1_000_000):
        leave(free)
        try:
            build(Project.load(disk))
        except TunesmithError as error:
            told(error, disk)
            refused += 1
        else:
            break
        (disk / "filler").unlink()
        sound(store)
        assert store.records_of("dataset") == []
    assert refused >= 3
    assert build(Project.load(disk)).rows.kept > 0


@pytest.mark.attack("crash", "a full disk while users, versions and approvals are kept")
def test_changes_on_a_full_disk(disk: Path, leave: Leave, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TUNESMITH_USER", OWNER)
    scene = build_scene(disk / "store")
    refused = 0
    for number, free in enumerate(range(0, 120_000, 20_000)):
        for change in (
            lambda number=number: add_user(scene.store, f"user{number}", ["operator"], actor=OWNER),
            lambda number=number: scene.version(number),
        ):
            leave(free)
            try:
                change()
            except TunesmithError as error:
                told(error, disk)
                refused += 1
            (disk / "filler").unlink()
            sound(scene.store)
    for version in list_versions(scene.store):
        assert verify_version(scene.store, version.label).ok
    assert refused >= 4


@pytest.mark.attack("crash", "writes that find no room", "refused")
@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EFBIG])
def test_a_write_without_room(number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fsync(_handle: int) -> None:
        raise OSError(number, os.strerror(number))

    (tmp_path / "old").write_text("old")
    monkeypatch.setattr(os, "fsync", fsync)
    for write in (
        lambda: write_atomic(tmp_path / "old", b"new"),
        lambda: copy_durably(tmp_path / "old", tmp_path / "copy"),
    ):
        with pytest.raises(TunesmithError) as refused:
            write()
        told(refused.value, tmp_path)
    assert (tmp_path / "old").read_text() == "old"
    assert is_disk_full(RuntimeError(f"Error while serializing: I/O error: {os.strerror(errno.ENOSPC)} (os error 28)"))
    assert is_disk_full(ValueError("x")) is False
    assert disk_full(tmp_path / "not" / "there").where == str(tmp_path / "not" / "there")


@pytest.mark.attack("crash", "a full disk at many points of an erasure")
def test_an_erasure_on_a_full_disk_goes_on_afterwards(
    disk: Path, leave: Leave, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TUNESMITH_USER", OWNER)
    store = Home.local(disk / "store").open()
    version = erasing.plant(erasing.scene_in(store))[0]
    erasing.plan(store, erasing.ANNA, reason="she asked", actor=STEWARD)
    ensure_key(store, erasing.SECOND)
    refused = 0
    for free in (0, 8_000, 20_000, 50_000, 100_000, 200_000, 400_000, 800_000):
        leave(free)
        try:
            state = erasing.erase(store, 1).state
        except TunesmithError as error:
            told(error, disk)
            refused += 1
            continue
        break
    assert (refused > 2, state) == (True, "done"), refused
    (disk / "filler").unlink()
    assert erasing.left(store) == []
    assert verify_version(store, version.label).problems == []
    assert len(load_dataset(store, store.records_of("dataset")[-1]).examples("train")) == 25
    sound(store)
