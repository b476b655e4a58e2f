"""Backup, restore and migrate: what was copied verifies, what is damaged or in the way is refused, nothing is half."""

import io
import json
import shutil
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import select

from tests.fabricate import APPROVER, OWNER, Scene
from tests.postgresql_server import empty_database
from tests.s3_server import new_bucket, s3_environment
from tunesmith.core.digests import digest_bytes
from tunesmith.core.errors import Refused, UsageError
from tunesmith.core.text.names import Scope
from tunesmith.registry.history import verify_log
from tunesmith.registry.registration import register
from tunesmith.registry.verification import verify_version
from tunesmith.registry.versions import list_versions
from tunesmith.services.audit import backup, migrate, restore
from tunesmith.store import copying, uploads
from tunesmith.store.blobs.local import LocalBlobs
from tunesmith.store.copying import keys_of
from tunesmith.store.store import MARKER, Store
from tunesmith.store.tables import AuditRow, FileRow


def rows_of(store: Store) -> dict[str, list[Any]]:
    """All rows but those of the copy's own audit entry."""
    found = {}
    with store.engine.connect() as connection:
        for table in copying._tables():
            if table.name != "audit_head":
                rows = [tuple(row) for row in connection.execute(select(table).order_by(*table.primary_key))]
                found[table.name] = [row for row in rows if "store.backup" not in row and "store.restore" not in row]
    return found


def contents(store: Store) -> dict[str, bytes]:
    return {key: b"".join(store.blobs.pieces(key)) for key in keys_of(store.blobs)}


def whole(store: Store) -> None:
    """Everything verifies, and work goes on: another version can be registered."""
    assert verify_log(store) == []
    versions = list_versions(store)
    assert [version.label for version in versions] == [f"home@v{number}" for number in (1, 2, 3, 4)]
    assert verify_version(store, "home@v2").ok
    assert register(store, name="other", verdict=versions[0].verdict, actor=OWNER).label == "other@v1"
    assert verify_log(store) == []


@pytest.fixture
def file(scene: Scene, tmp_path: Path) -> Path:
    scene.store.blobs.put("cases/one.json", b"{}", private=True)
    backup(scene.store, tmp_path / "backup.tar")
    return tmp_path / "backup.tar"


@pytest.fixture
def target(tmp_path: Path) -> Store:
    """An empty store."""
    return Store(tmp_path / "new", url=f"sqlite:///{tmp_path / 'new.db'}")


def test_a_restored_store_is_the_one_that_was_backed_up(
    scene: Scene, file: Path, target: Store, tmp_path: Path
) -> None:
    with pytest.raises(Refused, match="may not"):
        backup(scene.store, tmp_path / "another.tar", actor=APPROVER)
    with pytest.raises(Refused, match="may not"):
        restore(target, file, actor=APPROVER)
    assert contents(target) == contents(scene.store)  # as where a restore is stopped before its end: it goes on
    assert not any(rows_of(target).values())
    found = restore(target, file)
    assert contents(target) == contents(scene.store)
    assert rows_of(target) == rows_of(scene.store)
    assert found.objects == len(contents(target))
    assert (target.blobs.path("cases/one.json").stat().st_mode & 0o077, file.stat().st_mode & 0o077) == (0, 0)
    shutil.copytree(scene.store.root / "keys", target.root / "keys")  # private keys are in no backup
    whole(target)
    with pytest.raises(Refused, match="rows already"):
        restore(target, file)
    target.blobs.put("blobs/ab/other", b"of another store")
    target.blobs.delete(MARKER)
    with pytest.raises(Refused, match=r"the store holds \d objects already"):
        restore(Store(target.root, url=f"sqlite:///{tmp_path / 'other.db'}"), file)
    with pytest.raises(UsageError, match="exists"):
        backup(scene.store, file)
    (tmp_path / "link.tar").symlink_to(tmp_path / "nothing.tar")
    with pytest.raises(UsageError, match="this is a link"):
        backup(scene.store, tmp_path / "link.tar")


def test_what_is_deleted_meanwhile_is_left_out(scene: Scene, target: Store, tmp_path: Path) -> None:
    class Goes(LocalBlobs):
        gone: tuple[str, ...] = ("cases/one.json", "files/file-a.jsonl")

        def pieces(self, key: str) -> Iterator[bytes]:
            if key in self.gone:
                self.delete(key)
            return super().pieces(key)

    blobs, file = Goes(scene.store.root), tmp_path / "backup.tar"
    store = Store(scene.store.root, url=scene.store.url, blobs=blobs)
    for key in (*blobs.gone, "cases/two.json"):
        blobs.put(key, b"{}", private=True)
    count = backup(store, file).objects
    assert restore(target, file).objects == count
    assert contents(target) == contents(scene.store)
    assert "cases/two.json" in contents(target)
    other = Store(tmp_path / "other", url=f"sqlite:///{tmp_path / 'other.db'}")
    other.engine_to_fill()
    for place in (blobs, other.blobs):  # the other one from a copy that was stopped
        place.put("files/file-a.jsonl", b"{}", private=True)
    everything = copying.Contents(keys_of(blobs), blobs.pieces, None, "id")
    assert copying.put_objects(other, everything) == (count, sum(map(len, contents(target).values())))
    assert contents(other) == contents(target)
    blobs.gone = (next(key for key in keys_of(blobs) if key.startswith("blobs/")),)
    for copy in (lambda: backup(store, tmp_path / "another.tar"), lambda: copying.put_objects(other, everything)):
        with pytest.raises(FileNotFoundError):
            copy()
    assert not (tmp_path / "another.tar").exists()


def test_a_migration_names_the_uploads_whose_bytes_are_gone(
    scene: Scene, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = scene.store
    kept: list[FileRow] = []
    for data in (b"{}\n", b"[]\n"):
        with store.scratch() as folder:
            (folder / "x").write_bytes(data)
            given = {"name": "rows.jsonl", "purpose": "fine-tune", "actor": OWNER, "scope": Scope("acme")}
            kept.append(uploads.put(store, folder / "x", **given))  # type: ignore[arg-type]
    (store.root / "files" / f"{kept[0].file}.jsonl").unlink()
    monkeypatch.setenv("TUNESMITH_DATABASE_URL", f"sqlite:///{tmp_path / 'new.db'}")
    found = migrate(store.root)
    assert found.missing == (kept[0].file,)
    there = Store(store.root)
    assert there.url != store.url
    with pytest.raises(uploads.FileGone, match="bytes are missing"):
        list(uploads.pieces(there, kept[0]))
    moved = uploads.find(there, kept[1].file, Scope("acme"))
    assert moved is not None
    assert list(uploads.pieces(there, moved)) == [b"[]\n"]
    with there.reading() as session:
        entry = session.scalars(select(AuditRow).order_by(AuditRow.seq.desc())).first()
        assert entry is not None
        assert (entry.action, entry.detail["missing"]) == ("store.migrate", [kept[0].file])
    assert verify_log(there) == []


def changed(file: Path, change: Callable[[str, bytes], bytes | None], added: str = "") -> None:
    """Rewrite a backup's members; None leaves one out."""
    with tarfile.open(file) as archive:
        members = [(one.name, archive.extractfile(one).read()) for one in archive.getmembers()]  # type: ignore[union-attr]
    with tarfile.open(file, "w") as archive:
        for name, data in [*members, *([(added, b"x")] if added else [])]:
            if (kept := change(name, data)) is not None:
                facts = tarfile.TarInfo(name)
                facts.size = len(kept)
                archive.addfile(facts, io.BytesIO(kept))


def with_key(name: str, data: bytes) -> bytes:
    """A manifest that names one more object, as a stranger could write it."""
    if name != "manifest.json":
        return data
    facts = json.loads(data)
    facts["members"]["objects/versions/../../evil"] = digest_bytes(b"x")
    return json.dumps(facts).encode()


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda file: file.write_bytes(file.read_bytes()[: file.stat().st_size // 2]), "backup cannot be used"),
        (lambda file: file.write_bytes(b"no archive"), "cannot be read"),
        (lambda file: changed(file, lambda name, data: None if "blobs/" in name else data), "missing or were added"),
        (lambda file: changed(file, lambda name, data: data + b"x" if "blobs/" in name else data), "is damaged"),
        (lambda file: changed(file, lambda name, data: None if "manifest" in name else data), "no whole backup"),
        (lambda file: changed(file, lambda _name, data: data.replace(b'"format"', b'"form"')), "no whole backup"),
        (lambda file: changed(file, with_key, added="objects/versions/../../evil"), "no store has"),
    ],
)
def test_a_damaged_backup_is_refused_before_anything_is_written(
    file: Path, damage: Callable[[Path], None], said: str, target: Store
) -> None:
    damage(file)
    with pytest.raises(Refused, match=said):
        restore(target, file)
    assert keys_of(target.blobs) == []
    assert not any(rows_of(target).values())


def test_a_damaged_object_is_not_backed_up(scene: Scene, tmp_path: Path) -> None:
    key = next(scene.store.blobs.keys("blobs/"))
    scene.store.blobs.put(key, b"changed")
    with pytest.raises(Refused, match="do not have the digest"):
        backup(scene.store, tmp_path / "backup.tar")
    assert not list(tmp_path.glob("backup*"))


@pytest.fixture
def team(postgresql: str, s3: str, monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """The environment that names an empty PostgreSQL database and an empty bucket."""
    empty_database(postgresql)
    for name, value in s3_environment(s3).items():
        monkeypatch.setenv(name, value)
    return {"TUNESMITH_DATABASE_URL": postgresql, "TUNESMITH_BLOBS_URL": f"s3://{new_bucket(s3)}/home"}


def test_a_store_moves_to_postgresql_and_a_bucket_and_back(
    scene: Scene, team: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("obstore", reason="obstore is not installed")
    root, before, rows = scene.store.root, contents(scene.store), rows_of(scene.store)
    with pytest.raises(UsageError, match="no place"):
        migrate(root)
    for name, value in team.items():
        monkeypatch.setenv(name, value)
    found = migrate(root)
    assert (found.objects, found.bytes) == (len(before), sum(map(len, before.values())))
    assert contents(scene.store) == before  # untouched
    assert rows_of(scene.store) == rows
    there = Store(root)
    assert there.engine.dialect.name == "postgresql"
    assert contents(there) == before
    whole(there)
    elsewhere = Store(tmp_path / "another machine")  # it needs nothing of the first one
    assert verify_version(elsewhere, "home@v2").ok
    assert [version.label for version in list_versions(elsewhere)][-1] == "other@v1"
    assert {path.name for path in elsewhere.root.iterdir()} <= {"bases", "cache", "keys", "work"}
    with pytest.raises(Refused, match="holds rows already"):
        migrate(root)
    backup(there, tmp_path / "team.tar")
    back = Store(tmp_path / "back", url=f"sqlite:///{tmp_path / 'back.db'}", blobs=LocalBlobs(tmp_path / "back"))
    restore(back, tmp_path / "team.tar")
    assert contents(back) == contents(there)
    assert verify_log(back) == []
    there.engine.dispose()
    with back.reading() as session:
        newest = list(session.scalars(select(AuditRow.action).order_by(AuditRow.seq)))[-2:]
    assert newest == ["version.register", "store.restore"]
