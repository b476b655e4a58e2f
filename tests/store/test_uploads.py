"""Files that clients upload: kept apart from the blobs, by tenant, and gone when they are deleted."""

import socket
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import select
from sqlalchemy.exc import IntegrityError

from tunesmith.core.errors import Refused
from tunesmith.core.text.names import Scope
from tunesmith.store import uploads
from tunesmith.store.people.identities import add_user, ensure_owner
from tunesmith.store.store import Store
from tunesmith.store.tables import FileRow, LockRow
from tunesmith.store.uploads import FileGone

ACME = Scope("acme")


def kept(store: Store, data: bytes = b"{}\n", scope: Scope = ACME, **more: str) -> FileRow:
    owner = ensure_owner(store).name
    with store.scratch() as folder:
        (folder / "x").write_bytes(data)
        given = {"name": "rows.JSONL", "purpose": "fine-tune", "actor": owner, **more}
        return uploads.put(store, folder / "x", scope=scope, **given)  # type: ignore[arg-type]


def test_files_are_kept_listed_and_deleted(store: Store) -> None:
    first, second, other = kept(store), kept(store, purpose="fine-tune-results"), kept(store, scope=Scope("globex"))

    def listed(scope: Scope, *, oldest_first: bool = True, **chosen: str) -> list[str]:
        return [each.file for each in uploads.list_files(store, scope, most=9, oldest_first=oldest_first, **chosen)]

    found = uploads.find(store, first.file, ACME)
    assert found is not None
    assert (found.digest, found.name, found.size) == (first.digest, "rows.JSONL", 3)
    assert uploads.find(store, first.file, Scope("globex")) is None
    assert listed(Scope()) == [first.file, second.file, other.file]
    assert listed(ACME, oldest_first=False) == [second.file, first.file]
    assert listed(ACME, oldest_first=False, after=second.file) == [first.file]
    assert listed(ACME, purpose="fine-tune-results") == [second.file]
    with uploads.local_file(store, first) as path:
        assert path.suffix == ".jsonl"
    assert kept(store, b"other", file=first.file).digest == first.digest, "an id has one file"
    owner = ensure_owner(store).name
    with pytest.raises(FileGone):
        uploads.delete(store, first.file, actor=owner, scope=Scope("globex"))
    uploads.delete(store, first.file, actor=owner, scope=ACME)
    with pytest.raises(FileGone, match="missing"):
        list(uploads.pieces(store, first))
    assert listed(ACME, after=first.file) == [second.file], "its place stays"
    for after, scope in ((first.file, Scope("globex")), ("file-0", ACME)):
        with pytest.raises(FileGone):
            listed(scope, after=after)
    assert list(uploads.pieces(store, second)) == [b"{}\n"]


@pytest.mark.parametrize("name", ["a" * 300 + ".jsonl", "a" * 250 + ".jsonl", "a." + "b" * 300, "a" * 300])
def test_a_file_with_a_long_name_is_read_and_deleted(store: Store, name: str) -> None:
    before = list(store.blobs.keys("files/"))
    file = uploads.find(store, kept(store, name=name).file, ACME)
    assert file is not None
    assert len(file.name) <= 256
    assert file.name.endswith(".jsonl") == name.endswith(".jsonl")
    assert list(uploads.pieces(store, file)) == [b"{}\n"]
    uploads.delete(store, file.file, actor=ensure_owner(store).name, scope=ACME)
    assert list(store.blobs.keys("files/")) == before


def test_who_may_not_leaves_nothing(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    owner = ensure_owner(store).name
    add_user(store, "otto", ["operator"], actor=owner)
    add_user(store, "gil", ["engineer"], actor=owner, scope=Scope("globex"))
    for actor in ("otto", "gil"):
        with pytest.raises(Refused):
            kept(store, actor=actor)
    assert list(store.blobs.keys("files/")) == []
    own = kept(store)
    with pytest.raises(Refused):
        uploads.delete(store, own.file, actor="gil", scope=ACME)
    with monkeypatch.context() as patch:  # a worker had looked before the other one kept the file
        patch.setattr(uploads, "find", lambda *_: None)
        with pytest.raises(IntegrityError):
            kept(store, file=own.file)
    assert list(uploads.pieces(store, own)) == [b"{}\n"]
    store.blobs.delete(f"files/{own.file}.jsonl")
    store.blobs.put(f"files/{own.file}.jsonl", b"others")
    with pytest.raises(FileGone, match="damaged"), uploads.local_file(store, own):
        pass


def left(store: Store, file: str, host: str, until: float) -> None:
    """What an upload leaves that is killed before the database knows its file."""
    store.blobs.put(f"files/{file}.jsonl", b"{}\n")
    row = LockRow(name=f"files/{file}.jsonl", owner=file, purpose="x", host=host, pid=1 << 30, started=0.0, until=until)
    with store.writing() as session:
        session.add(row)


def test_bytes_that_a_killed_upload_left_are_removed(store: Store) -> None:
    known, here = kept(store), socket.gethostname()
    left(store, known.file, here, 0.0)  # killed after the database knew it
    left(store, "file-a", here, time.time() + 60)
    left(store, "file-b", "another", time.time() - 1)
    left(store, "file-c", "another", time.time() + 60)  # may still be at work
    uploads.remove_leftovers(store)
    uploads.remove_leftovers(store)
    assert set(store.blobs.keys("files/")) == {f"files/{known.file}.jsonl", "files/file-c.jsonl"}
    with store.reading() as session:
        assert list(session.scalars(select(LockRow.owner))) == ["file-c"]
    with store.lock("files/file-d.jsonl", "an upload of this process"):
        store.blobs.put("files/file-d.jsonl", b"{}\n")
        kept(store)
        assert store.blobs.exists("files/file-d.jsonl")


def test_files_in_a_bucket(bucket: Callable[..., Any], store: Store, tmp_path: Path) -> None:
    shared = Store(store.root, blobs=bucket(tmp_path / "cache"))
    assert shared.engine  # a store begins with its database
    left(shared, "file-a", socket.gethostname(), 0.0)
    own, cached = kept(shared), tmp_path / "cache"
    with uploads.local_file(shared, own) as path:
        assert (path.read_bytes(), path.suffix) == (b"{}\n", ".jsonl")
        uploads.delete(shared, own.file, actor=ensure_owner(shared).name, scope=ACME)
        assert path.read_bytes() == b"{}\n", "it stays for whoever reads it"
    assert list(shared.blobs.keys("files/")) == []
    assert not path.exists()
    left_over = [each for folder in (cached, shared.local("work")) for each in folder.rglob("*") if each.is_file()]
    assert not left_over, "a file that was read stays in no cache"
