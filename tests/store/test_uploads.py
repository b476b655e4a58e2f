"""Files that clients upload: kept apart from the blobs, by tenant, and gone when they are deleted."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tunesmith.core.errors import Refused
from tunesmith.core.scope import Scope
from tunesmith.store import uploads
from tunesmith.store.identities import add_user, ensure_owner
from tunesmith.store.store import Store
from tunesmith.store.uploads import FileGone, StoredFile

ACME = Scope("acme")


def kept(store: Store, data: bytes = b"{}\n", scope: Scope = ACME, **more: str) -> StoredFile:
    owner = ensure_owner(store).name
    with store.scratch() as folder:
        (folder / "x").write_bytes(data)
        given = {"name": "rows.JSONL", "purpose": "fine-tune", "actor": owner, **more}
        return uploads.put(store, folder / "x", scope=scope, **given)  # type: ignore[arg-type]


def test_files_are_kept_listed_and_deleted(store: Store) -> None:
    first, second, other = kept(store), kept(store, purpose="fine-tune-results"), kept(store, scope=Scope("globex"))
    assert uploads.find(store, first.file, ACME) == first
    assert uploads.find(store, first.file, Scope("globex")) is None
    assert uploads.list_files(store, Scope(), most=9, oldest_first=True) == [first, second, other]
    assert uploads.list_files(store, ACME, most=9, oldest_first=False) == [second, first]
    assert uploads.list_files(store, ACME, most=9, oldest_first=False, after=second.file) == [first]
    assert uploads.list_files(store, ACME, most=9, oldest_first=True, purpose="fine-tune-results") == [second]
    assert uploads.local_path(store, first).suffix == ".jsonl"
    assert kept(store, b"other", file=first.file) == first, "an id has one file"
    owner = ensure_owner(store).name
    with pytest.raises(FileGone):
        uploads.delete(store, first.file, actor=owner, scope=Scope("globex"))
    uploads.delete(store, first.file, actor=owner, scope=ACME)
    with pytest.raises(FileGone, match="missing"):
        list(uploads.pieces(store, first))
    with pytest.raises(FileGone):
        uploads.list_files(store, ACME, most=9, oldest_first=True, after=first.file)
    assert list(uploads.pieces(store, second)) == [b"{}\n"]


def test_who_may_not_leaves_nothing(store: Store) -> None:
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
    store.blobs.delete(f"files/{own.file}.jsonl")
    store.blobs.put(f"files/{own.file}.jsonl", b"others")
    with pytest.raises(FileGone, match="damaged"):
        uploads.local_path(store, own)


def test_files_in_a_bucket(bucket: Callable[..., Any], store: Store, tmp_path: Path) -> None:
    shared = Store(store.root, blobs=bucket(tmp_path / "cache"))
    own, cached = kept(shared), tmp_path / "cache"
    assert uploads.local_path(shared, own).read_bytes() == b"{}\n"
    uploads.delete(shared, own.file, actor=ensure_owner(shared).name, scope=ACME)
    assert list(shared.blobs.keys("files/")) == []
    assert not [path for path in cached.rglob("*") if path.is_file()], "a deleted file stays in no cache"
