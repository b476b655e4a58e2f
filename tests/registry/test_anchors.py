"""Anchors of the audit log: an old store put back, a rewritten log, and anchors that were changed are noticed."""

import json
import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from tests.acting import do
from tests.attack_table import Happened
from tests.http_server import answering
from tests.programs import program
from tests.registry.test_history import rewrite
from tests.s3_server import s3_environment
from tunesmith.cli.main import app
from tunesmith.core.errors import Refused, TunesmithError, UsageError
from tunesmith.services import audit
from tunesmith.services.audit import Anchored, verify_audit
from tunesmith.store.people.identities import add_user, ensure_owner
from tunesmith.store.store import Store


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Store:
    monkeypatch.setenv("TUNESMITH_USER", "owner")
    return new_store(tmp_path / "store")


def new_store(root: Path) -> Store:
    (root / "records").mkdir(parents=True)
    store = Store(root, url=f"sqlite:///{root / 'tunesmith.db'}")
    ensure_owner(store)
    return store


def go_on(store: Store, *names: str) -> None:
    for name in names:
        add_user(store, name, ["engineer"], actor="owner")


def put_back(store: Store, copy: Path) -> Store:
    """The store's folder is replaced by an older copy."""
    store.engine.dispose()
    shutil.rmtree(store.root)
    shutil.copytree(copy, store.root)
    return Store(store.root, url=f"sqlite:///{store.root / 'tunesmith.db'}")


def copied(store: Store) -> Path:
    store.engine.dispose()
    target = store.root.with_name("copy")
    shutil.copytree(store.root, target)
    return target


def anchor_audit(store: Store, place: str, **more: Any) -> Anchored:
    return do(store, audit.anchor, place=place, **more)


def reasons(store: Store, *places: str | Path, **more: Any) -> str:
    found = verify_audit(store, anchors=[str(place) for place in places], **more)
    assert found.ok == (not found.problems)
    return "\n".join(problem.reason for problem in found.problems)


def test_an_anchor_names_the_newest_entry_and_the_log_names_the_anchor(store: Store, tmp_path: Path) -> None:
    place = tmp_path / "anchors.jsonl"
    first = anchor_audit(store, str(place))
    assert (first.written, first.head.seq, anchor_audit(store, str(place)).written) == (True, 1, False)
    go_on(store, "ann")
    assert anchor_audit(store, str(place)).head.seq == 3
    found = verify_audit(store, anchors=[str(place)])
    assert (found.ok, found.anchors, found.notes) == (True, 2, ())
    for words in (["anchor", str(place)], ["verify", "--anchor", str(place)]):
        assert CliRunner().invoke(app, ["audit", *words, "-C", str(store.root)]).exit_code == 0
    assert [json.loads(line)["seq"] for line in place.read_text().splitlines()] == [1, 3]


@pytest.mark.attack("audit", "an old copy of the store is put back")
@pytest.mark.parametrize("used", [False, True])
def test_an_old_store_put_back_is_noticed(store: Store, tmp_path: Path, used: bool, happened: Happened) -> None:
    place = tmp_path / "anchors.jsonl"
    copy = copied(store)
    go_on(store, "ann", "bea")
    anchor_audit(store, str(place))
    head = verify_audit(store).head
    old = put_back(store, copy)
    if used:
        go_on(old, "eve", "eva", "evi", "evo")
    assert verify_audit(old).ok  # by itself the old log is whole
    said = "an old copy was put back and used" if used else "an old copy of the store was put back"
    assert said in reasons(old, place)
    by_head = verify_audit(old, heads=[f"{head.seq}:{head.digest}"])
    assert said in by_head.problems[-1].reason
    happened("noticed by the file and by --head", 2)
    with pytest.raises(Refused, match="old copy"):
        anchor_audit(old, str(place))
    happened("anchor refused")
    result = CliRunner().invoke(app, ["audit", "verify", "--anchor", str(place), "-C", str(store.root)])
    assert (result.exit_code, said in result.output) == (3, True)
    happened("exit code 3")


@pytest.mark.attack("audit", "the whole log is rewritten after an anchor", "noticed")
def test_a_rewritten_log_is_noticed(store: Store, tmp_path: Path) -> None:
    place = tmp_path / "anchors.jsonl"
    go_on(store, "ann")
    anchor_audit(store, str(place))
    rewrite(store, {})
    assert verify_audit(store).ok
    found = reasons(store, place)
    assert "is not the one that the anchor of" in found
    assert "is of another store" in found


@pytest.mark.attack("audit", "another store's anchor is given", "noticed, and not added to")
def test_the_anchor_of_another_store(store: Store, tmp_path: Path) -> None:
    other, place = new_store(tmp_path / "other"), str(tmp_path / "anchors.jsonl")
    anchor_audit(other, place)
    assert "is of another store" in reasons(store, place)
    with pytest.raises(Refused, match="another store"):
        anchor_audit(store, place)


@pytest.mark.attack("audit", "anchors are edited, cut, removed or swapped", "noticed")
@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda text: text.replace('"seq":3', '"seq":2'), "is not the one that the anchor"),
        (lambda text: text[:-10], "line 2 of .*: it was cut off or edited"),
        (lambda text: text.splitlines(keepends=True)[0], "the anchor that entry 4 says was written here is missing"),
        (lambda _text: "", "there is no anchor here"),
        (lambda text: text + "[]\n", "line 3 of .* is not an anchor"),
        (lambda text: text + '{"store":1}\n' + "x" * 200_000, "line 3 of .* is not an anchor"),
        (lambda text: text.replace('"at":"2', '"at":"\\u001b[2J2', 1), "line 1 of .* is not an anchor"),
        (lambda text: text.replace('"seq":3', '"seq":3.0'), "line 2 of .* is not an anchor"),
        (lambda text: text.replace('"digest":"sha256:', '"digest":"sha256:0', 1), "line 1 of .* is not an anchor"),
    ],
)
def test_changed_anchors_are_noticed(store: Store, tmp_path: Path, change: Any, says: str) -> None:
    place = tmp_path / "anchors.jsonl"
    anchor_audit(store, str(place))
    go_on(store, "ann")
    anchor_audit(store, str(place))
    place.write_text(change(place.read_text()))
    assert re.search(says, reasons(store, place))
    with pytest.raises(Refused):
        anchor_audit(store, str(place))


def test_places_that_cannot_be_used(store: Store, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(store.root / "inside.jsonl")
    (tmp_path / "away").symlink_to(tmp_path / "no disk.jsonl")
    os.mkfifo(tmp_path / "fifo")
    for place, error, says in (
        (store.root / "anchors.jsonl", UsageError, "inside the store"),
        (tmp_path / "link", UsageError, "inside the store"),
        (tmp_path / "away", UsageError, "a link to nothing"),
        (tmp_path / "fifo", UsageError, "not a regular file"),
        (tmp_path, TunesmithError, "Is a directory"),
        (tmp_path / "no" / "folder.jsonl", TunesmithError, "cannot be read or written"),
        ("https://example.org/a", UsageError, "in a file or under s3://"),
        ("s3://", UsageError, "names no bucket"),
        ("", UsageError, "in a file"),
    ):
        with pytest.raises(error, match=says):
            anchor_audit(store, str(place))
    with pytest.raises(UsageError, match="go together"):
        anchor_audit(store, str(tmp_path / "a"), time_stamp="http://127.0.0.1:1")
    (tmp_path / "roots.pem").write_text("none")
    for roots in (tmp_path / "roots.pem", tmp_path / "missing.pem"):
        with pytest.raises(UsageError, match="no certificates"):
            verify_audit(store, anchors=[], tsa_roots=roots)


# Time stamps


def openssl(folder: Path, *arguments: str) -> None:
    subprocess.run(["openssl", *arguments], cwd=folder, check=True, capture_output=True)


def authority(folder: Path, name: str) -> Path:
    """Keys and configuration of a time-stamping authority; returns its folder."""
    home = folder / name
    home.mkdir()
    (home / "serial").write_text("01")
    (home / "tsa.cnf").write_text(
        "[tsa]\ndefault_tsa=here\n[here]\nserial=serial\ncrypto_device=builtin\nsigner_cert=tsa.pem\n"
        "signer_key=tsa.key\nsigner_digest=sha256\ndefault_policy=1.2.3.4.1\n"
        "digests=sha256,sha512\nordering=no\ntsa_name=no\ness_cert_id_chain=no\ness_cert_id_alg=sha256\n"
        "[ext]\nextendedKeyUsage=critical,timeStamping\nkeyUsage=critical,digitalSignature\n"
        "basicConstraints=critical,CA:FALSE\n"
    )
    new = ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"]
    openssl(
        home, "req", "-x509", *new, "-keyout", "root.key", "-out", "root.pem", "-subj", f"/CN={name}", "-days", "30"
    )
    openssl(home, "req", "-new", *new, "-keyout", "tsa.key", "-out", "tsa.csr", "-subj", f"/CN={name} stamps")
    openssl(
        home, "x509", "-req", "-in", "tsa.csr", "-CA", "root.pem", "-CAkey", "root.key", "-CAcreateserial",
        "-out", "tsa.pem", "-days", "30", "-extfile", "tsa.cnf", "-extensions", "ext",
    )  # fmt: skip
    return home


@pytest.fixture(scope="module")
def authorities(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, Path, Path]]:
    """(URL of a server, home of its authority, home of an authority that nobody trusts); /other is the latter."""
    program("openssl")
    folder = tmp_path_factory.mktemp("tsa")
    good, other = authority(folder, "good"), authority(folder, "other")

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            query = self.rfile.read(int(self.headers["content-length"]))
            home = other if self.path == "/other" else good
            (home / "query").write_bytes(query)
            if self.path == "/stale" and (home / "reply").exists():
                pass  # a reply to an earlier request
            elif self.path == "/garbage":
                (home / "reply").write_bytes(b"garbage")
            else:
                openssl(home, "ts", "-reply", "-config", "tsa.cnf", "-queryfile", "query", "-out", "reply")
            reply = (home / "reply").read_bytes()
            self.send_response(500 if self.path == "/broken" else 200)
            self.send_header("content-length", str(len(reply)))
            self.end_headers()
            self.wfile.write(reply)

    with answering(ThreadingHTTPServer(("127.0.0.1", 0), Handler)) as url:
        yield url, good, other


@pytest.mark.attack("audit", "a time-stamped anchor is forged or edited")
def test_a_time_stamp_is_checked_whenever_the_anchor_is(
    store: Store, tmp_path: Path, authorities: tuple[str, Path, Path], happened: Happened
) -> None:
    url, good, other = authorities
    place, copy = tmp_path / "anchors.jsonl", copied(store)
    go_on(store, "ann")
    done = anchor_audit(store, str(place), time_stamp=url, tsa_roots=good / "root.pem")
    assert done.stamped_at is not None
    assert reasons(store, place, tsa_roots=good / "root.pem") == ""
    assert "1 time stamps" in verify_audit(store, anchors=[str(place)]).notes[0]
    assert "is not valid" in reasons(store, place, tsa_roots=other / "root.pem")
    whole = place.read_text()
    document = json.loads(whole)
    plain = {key: value for key, value in document.items() if key != "time_stamp"}
    for forged, says in (
        ({**document, "at": "2030-01-01T00:00:00Z"}, "Mismatch between messages"),
        ({**document, "seq": 1}, "Mismatch between messages"),
        (plain, "has no time stamp"),
        ({**document, "time_stamp": "AAAA"}, "is not valid"),
        ({**document, "time_stamp": "no base64!"}, "is not valid"),
        ({**document, "time_stamp": document["time_stamp"][:400]}, "is not valid"),
    ):
        place.write_text(json.dumps(forged) + "\n")
        assert says in reasons(store, place, tsa_roots=good / "root.pem")
        happened("noticed")
    place.write_text(whole)
    old = put_back(store, copy)
    assert "an old copy of the store was put back" in reasons(old, place, tsa_roots=good / "root.pem")
    happened("old copy noticed")


@pytest.mark.attack("audit", "an authority answers with something else")
def test_answers_of_an_authority_that_are_no_time_stamp(
    store: Store, tmp_path: Path, authorities: tuple[str, Path, Path], happened: Happened
) -> None:
    url, good, _other = authorities
    place, roots = tmp_path / "anchors.jsonl", good / "root.pem"
    anchor_audit(store, str(tmp_path / "earlier.jsonl"), time_stamp=url, tsa_roots=roots)
    go_on(store, "ann")
    for path, error, says in (
        ("/stale", Refused, "does not verify"),
        ("/other", Refused, "does not verify"),
        ("/garbage", Refused, "does not verify"),
        ("/broken", TunesmithError, "did not answer"),
    ):
        with pytest.raises(error, match=says):
            anchor_audit(store, str(place), time_stamp=url + path, tsa_roots=roots)
        assert not place.exists()
        happened("refused, nothing written")


# A bucket with Object Lock


@pytest.fixture
def client(s3: str, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A client of the server, with the buckets `locked` and `plain`."""
    s3fs = pytest.importorskip("s3fs", reason="s3fs is not installed (extra: s3)")
    import boto3

    for name, value in s3_environment(s3).items():
        monkeypatch.setenv(name, value)
    s3fs.S3FileSystem.clear_instance_cache()
    client = boto3.client("s3")
    if "locked" not in {bucket["Name"] for bucket in client.list_buckets()["Buckets"]}:
        client.create_bucket(Bucket="locked", ObjectLockEnabledForBucket=True)
        client.create_bucket(Bucket="plain")
    return client


@pytest.mark.slow
@pytest.mark.attack("audit", "anchors in a bucket are deleted or overwritten")
def test_anchors_in_a_bucket_survive_deleting_and_overwriting(store: Store, client: Any, happened: Happened) -> None:
    place, copy = "s3://locked/one/", copied(store)
    go_on(store, "ann")
    done = anchor_audit(store, place, keep_days=30)
    assert (done.place, done.kept_until is not None, reasons(store, place)) == ("s3://locked/one", True, "")
    (version,) = client.list_object_versions(Bucket="locked", Prefix="one/")["Versions"]
    locked = {"Bucket": "locked", "Key": version["Key"], "VersionId": version["VersionId"]}
    assert client.head_object(**locked)["ObjectLockMode"] == "COMPLIANCE"
    with pytest.raises(client.exceptions.ClientError, match="AccessDenied"):
        client.delete_object(**locked)
    happened("the bucket refused to delete it")
    client.put_object(Bucket="locked", Key=version["Key"], Body=b"{}")
    assert "is not an anchor" in reasons(store, place)
    happened("overwriting noticed")
    client.delete_object(Bucket="locked", Key=version["Key"])
    assert "was deleted before its retention ended" in reasons(store, place)
    happened("delete marker noticed")
    old = put_back(store, copy)
    assert "an old copy of the store was put back" in reasons(old, place)
    happened("old copy noticed, by the locked version")


@pytest.mark.slow
def test_buckets_that_cannot_be_used(store: Store, client: Any) -> None:
    with pytest.raises(Refused, match="no Object Lock"):
        anchor_audit(store, "s3://plain/one")
    with pytest.raises(TunesmithError, match="cannot be used"):
        anchor_audit(store, "s3://missing/one")
    assert "there is no anchor here" in reasons(store, "s3://locked/none")
    anchor_audit(store, "s3://locked/two")
    go_on(store, "ann")
    anchor_audit(store, "s3://locked/two")
    assert verify_audit(store, anchors=["s3://locked/two/"]).anchors == 2
