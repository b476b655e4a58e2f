"""What every BlobStore does, and how the Store uses one: in a local folder, and on an S3 server."""

from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from tunesmith.core.digests import digest_bytes
from tunesmith.core.errors import Refused
from tunesmith.core.text.names import VersionRef
from tunesmith.store.blobs import BlobStore
from tunesmith.store.blobs.local import LocalBlobs
from tunesmith.store.records import Record
from tunesmith.store.store import RELEASE, Store

DIGEST = digest_bytes(b"")


@pytest.fixture(params=["local", "s3"])
def blobs(request: pytest.FixtureRequest, tmp_path: Path) -> BlobStore:
    if request.param == "local":
        return LocalBlobs(tmp_path / "blobs")
    return request.getfixturevalue("bucket")(tmp_path / "cache")


def test_objects_are_written_read_listed_and_deleted(blobs: BlobStore, tmp_path: Path) -> None:
    for content in (b"one", b"two"):
        blobs.put("records/ab/x.json", content)
        assert blobs.get("records/ab/x.json") == content
        assert blobs.path("records/ab/x.json").read_bytes() == content
    source = tmp_path / "source"
    source.write_bytes(b"weights")
    blobs.put_file("versions/a/v1/model.safetensors", source)
    assert not source.exists()
    assert b"".join(blobs.pieces("versions/a/v1/model.safetensors")) == b"weights"
    assert [path.name for path in blobs.folder("versions/a/v1/").iterdir()] == ["model.safetensors"]
    for key in ("b/2", "b/1", "b/c/3", "bb/4"):
        blobs.put(key, b"")
    assert list(blobs.keys("b/")) == ["b/1", "b/2", "b/c/3"]
    assert list(blobs.keys("nothing/")) == []
    assert blobs.get("b/1") == b""
    assert not blobs.exists("b")
    for _ in range(2):  # twice is no error
        blobs.delete("b/1")
        assert not blobs.exists("b/1")
    assert blobs.exists("b/2")
    with pytest.raises(FileNotFoundError):
        blobs.get("b/1")
    blobs.put("cases/x.json", b"text", private=True)
    assert blobs.path("cases/x.json").stat().st_mode & 0o077 == 0


@pytest.fixture
def store(store: Store, blobs: BlobStore) -> Store:
    """The store of the other tests, over each BlobStore."""
    return Store(store.root, blobs=blobs)


def test_bytes_and_files_get_the_same_digest_and_changed_ones_are_refused(store: Store, tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.write_bytes(b"x" * 3_000_000)
    digest = store.put_file(source)
    assert digest == store.put_bytes(source.read_bytes()) == digest_bytes(source.read_bytes())
    assert source.is_file()
    assert not list(store.local("work").iterdir())
    assert store.read_blob(digest) == source.read_bytes()
    (key,) = store.blobs.keys("blobs/")
    store.blobs.delete(key)  # first, since a bucket does not write over an object whose key names its content
    store.blobs.put(key, b"two")
    with pytest.raises(Refused, match="do not have that digest"):
        store.read_blob(digest)
    store.blobs.delete(key)
    with pytest.raises(Refused, match="is missing"):
        store.read_blob(digest)


def finished(folder: Path, *names: str) -> Path:
    folder.mkdir()
    for name in names:
        (folder / name).write_bytes(name.encode())
    return folder


def test_a_version_folder_is_complete_once_its_release_is_there(store: Store, tmp_path: Path) -> None:
    ref = VersionRef("intents", 1)
    store.blobs.put("versions/intents/v1/adapter.safetensors", b"from a process that was killed")
    for key in ("versions/A b/v1/", "versions/a/v0/", "versions/a/v01/", "versions/a/", "versions/a/v1/deep/"):
        store.blobs.put(key + RELEASE, b"{}")
    assert store.version_folders() == [], "none that the store made"
    store.put_version(ref, finished(tmp_path / "new", RELEASE, "model.sig"))
    assert store.version_folders() == store.version_folders("intents") == [ref]
    assert store.version_folders("other") == []
    assert sorted(path.name for path in store.version_folder(ref).iterdir()) == ["model.sig", RELEASE]
    store.drop_version(ref)
    assert store.version_folders() == []


def test_records_are_found_by_their_digests_and_parents(store: Store) -> None:
    first = store.put_record(Record(kind="base", body={"family": "llama"}))
    second = store.put_record(Record(kind="search", parents={"base": first}))
    assert store.record(second).parents == {"base": first}
    assert store.find_record(second[7:19]) == second
    assert store.children(first) == [("base", "search", second)]
    assert Record(kind="evaluation", parents={"answers:a": DIGEST, "risk:swap:a": DIGEST}).parents


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"kind": "guess"}, "'guess' is not a kind of record"),
        ({"kind": "base", "parents": {"dataset": DIGEST}}, "no parent in the role 'dataset'"),
        ({"kind": "evaluation", "parents": {"candidate:a": DIGEST}}, "no parent in the role 'candidate:a'"),
        ({"kind": "verdict", "blobs": {"x.jsonl": DIGEST}}, "no file 'x.jsonl'"),
    ],
)
def test_records_of_unknown_shape_are_refused(wrong: dict[str, Any], said: str) -> None:
    with pytest.raises(ValidationError, match=said):
        Record.model_validate(wrong)
