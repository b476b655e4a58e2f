"""A store in a bucket: the local cache, create-only writes, files in parts, and what is said where the bucket fails."""

import os
import time
from collections.abc import Callable
from datetime import timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from tests.attack_table import Happened
from tests.http_server import answering
from tests.store.test_blobs import finished
from tunesmith.core.digests import digest_bytes
from tunesmith.core.errors import Refused, TunesmithError, UsageError
from tunesmith.core.text.names import VersionRef
from tunesmith.project import open_store
from tunesmith.services.home import examine
from tunesmith.store.blobs.local import LocalBlobs
from tunesmith.store.store import RELEASE, Store

s3 = pytest.importorskip("tunesmith.store.blobs.s3", reason="obstore is not installed", exc_type=TunesmithError)
Opened = Callable[..., s3.S3Blobs]


def key_of(data: bytes) -> str:
    name = digest_bytes(data).removeprefix("sha256:")
    return f"blobs/{name[:2]}/{name}"


def files_in(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file()]


def test_an_object_named_by_its_content_is_written_once(bucket: Opened, tmp_path: Path) -> None:
    blobs, key, other = bucket(tmp_path / "cache"), key_of(b"one"), bucket(tmp_path / "other")
    blobs.put(key, b"one")
    other.put(key, b"two")
    source = tmp_path / "source"
    source.write_bytes(b"three")
    other.put_file(key, source)
    assert b"".join(blobs.pieces(key)) == b"one"
    assert other.get(key) == b"one"  # what did not match its name never entered the cache


def test_a_large_file_goes_in_parts_and_comes_back_whole(bucket: Opened, tmp_path: Path) -> None:
    data, source = os.urandom(17 << 20), tmp_path / "source"
    source.write_bytes(data)
    blobs, key = bucket(tmp_path / "cache"), key_of(data)
    blobs.put_file(key, source)
    (stored,) = blobs._list("blobs/")
    assert stored["e_tag"].strip('"').endswith("-3")  # S3's mark of an object in three parts
    other = bucket(tmp_path / "other")
    assert digest_bytes(other.path(key).read_bytes()) == digest_bytes(data)
    source.write_bytes(data)
    blobs.put_file(key, source)
    assert blobs._list("blobs/") == [stored]  # not uploaded again


def test_a_damaged_copy_is_fetched_again_and_pieces_read_the_bucket(bucket: Opened, tmp_path: Path) -> None:
    key = key_of(b"one")
    bucket(tmp_path / "cache").put(key, b"one")
    for damage in (b"two", b"", b"one more"):
        blobs = bucket(tmp_path / "cache")
        path = blobs.path(key)
        path.chmod(0o600)
        path.write_bytes(damage)
        assert blobs.get(key) == b"one"  # this process had verified the file that was there before
        path.chmod(0o600)
        path.write_bytes(damage)
        assert bucket(tmp_path / "cache").path(key).read_bytes() == b"one"
    blobs._store.put(key, b"two")
    assert blobs.get(key) == b"one"
    assert b"".join(blobs.pieces(key)) == b"two"


@pytest.mark.attack("signing", "an object of the bucket is changed")
def test_a_changed_object_is_refused(bucket: Opened, tmp_path: Path, happened: Happened) -> None:
    blobs, key = bucket(tmp_path / "cache"), key_of(b"one")
    blobs._store.put(key, b"two")
    for read in (blobs.get, blobs.path):
        with pytest.raises(Refused, match="do not have that digest") as caught:
            read(key)
        assert str(caught.value.where).startswith("s3://")
        happened("refused")
    assert not files_in(tmp_path / "cache")


def test_the_cache_keeps_to_its_limit(bucket: Opened, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tunesmith.store.blobs.cache._IN_USE", 0.0)
    blobs, names = bucket(tmp_path / "cache", 3000), [bytes([letter]) * 1000 for letter in range(9)]
    for data in names:
        blobs.put(key_of(data), data)
        blobs.path(key_of(names[0]))
        time.sleep(0.01)
    left = {path.read_bytes()[0] for path in files_in(tmp_path / "cache")}
    assert left == {0, 7, 8}  # the one that was used again and again, and the newest
    assert all(blobs.get(key_of(data)) == data for data in names)


def test_private_objects_never_reach_the_disk(bucket: Opened, tmp_path: Path) -> None:
    blobs = bucket(tmp_path / "cache")
    blobs.put("cases/one.json", b"what a person wrote", private=True)
    assert blobs.get("cases/one.json") == b"what a person wrote"
    assert not files_in(tmp_path)


def test_a_version_folder_is_read_as_it_is_now(bucket: Opened, tmp_path: Path) -> None:
    here, there = (Store(tmp_path / name, blobs=bucket(tmp_path / name / "cache")) for name in ("here", "there"))
    ref = VersionRef("intents", 1)
    for number, files in enumerate(((RELEASE, "model.sig"), (RELEASE, "other.sig"))):
        here.put_version(ref, finished(tmp_path / f"new{number}", *files))
        folder = there.version_folder(ref)
        assert folder.name == "v1"
        assert sorted(path.name for path in folder.iterdir()) == sorted(files)
        assert there.version_folder(ref) == folder
        (folder / RELEASE).chmod(0o600)
        (folder / RELEASE).write_bytes(b"damaged")
        assert (there.version_folder(ref) / RELEASE).read_bytes() == RELEASE.encode()
    here.drop_version(ref)
    assert not there.version_folder(ref).exists()


def test_which_blobs_a_store_opens(bucket: Opened, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "copy" / "records").mkdir(parents=True)
    project = tmp_path / "project"
    project.mkdir()
    lines = ["name: tiny", "base: model", "data: {sources: [{path: rows.jsonl, licence: CC0-1.0}]}"]
    (project / "tunesmith.yaml").write_text("\n".join([*lines, "candidates: {plain: {}}"]))
    for url, said in ((bucket(project / "cache").where(""), ""), ("s3://nobody-made-it/x", "there is no bucket")):
        monkeypatch.setenv("TUNESMITH_BLOBS_URL", url)
        assert isinstance(open_store(tmp_path / "copy").blobs, LocalBlobs)
        assert isinstance(open_store(project).blobs, s3.S3Blobs)
        (found,) = (check for check in examine(project).checks if check.name == "store")
        assert found.ok == (not said)
        assert (said or url) in found.detail
    for url in ("s3:/bucket", "https://bucket/x", "s3://", "s3://Bucket/x", "s3://bucket/x?y=1"):
        monkeypatch.setenv("TUNESMITH_BLOBS_URL", url)
        with pytest.raises(UsageError, match="is not a place for blobs"):
            Store(tmp_path)


class _Denies(BaseHTTPRequestHandler):
    """Answers every request as S3 does where the key is wrong."""

    def do_GET(self) -> None:
        body = b"<Error><Code>SignatureDoesNotMatch</Code><Message>no</Message></Error>"
        self.send_response(403)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


@pytest.mark.parametrize(
    ("endpoint", "said", "fix"),
    [
        ("", "there is no bucket nobody-made-it", "create it"),
        ("denying", r"denies access \(SignatureDoesNotMatch\)", "s3:PutObject"),
        ("http://127.0.0.1:9", "cannot be used", "network"),
    ],
)
@pytest.mark.usefixtures("bucket")
def test_a_bucket_that_cannot_be_used(
    endpoint: str, said: str, fix: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with answering(ThreadingHTTPServer(("127.0.0.1", 0), _Denies)) as denying:
        if endpoint:
            monkeypatch.setenv("AWS_ENDPOINT_URL", denying if endpoint == "denying" else endpoint)
        monkeypatch.setattr(s3, "_RETRY", timedelta())
        blobs = s3.S3Blobs("s3://nobody-made-it/prefix", tmp_path, 1000)
        uses = (blobs.exists, blobs.get, blobs.path, lambda key: [*blobs.keys(key)], lambda key: blobs.put(key, b""))
        for use in uses:
            with pytest.raises(TunesmithError, match=said) as caught:
                use(key_of(b""))
            assert fix in str(caught.value.fix)
            assert str(caught.value.where).startswith("s3://nobody-made-it/prefix")
