"""A person asks, a steward plans, a second person confirms: the bytes are gone, and what stays verifies."""

from __future__ import annotations

import json
import shutil
import uuid
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import text

from tests.acting import do
from tests.fabricate import APPROVER, OWNER, STEWARD, Scene, build_scene, example, put_dataset
from tests.forked import run_elsewhere, run_forked
from tests.killed import EVERY, Home, kill_each
from tests.postgresql_server import empty_database
from tests.s3_server import new_bucket, s3_environment
from tunesmith.core.access import Labels
from tunesmith.core.clock import stamp
from tunesmith.core.digests import canonical, digest_bytes
from tunesmith.core.errors import Refused, UsageError
from tunesmith.core.messages import Message
from tunesmith.core.reading.strict_json import JsonObject
from tunesmith.data.building.signoff import verify_dataset
from tunesmith.data.dataset import SPLITS, load_dataset
from tunesmith.data.documents import PASSAGES, Passage
from tunesmith.data.review.queue import NewItem, add_items
from tunesmith.monitoring import erasure
from tunesmith.monitoring.cases import Case, put_case
from tunesmith.monitoring.erasure import Plan, confirm, list_erasures, resume
from tunesmith.monitoring.recall import Cause, recall_status
from tunesmith.registry.signing import keys
from tunesmith.registry.signing.attestations import seal
from tunesmith.registry.verification import verify_version
from tunesmith.registry.versions import Version
from tunesmith.services import erasure as services
from tunesmith.services.audit import backup, restore, verify_audit
from tunesmith.store.blobs.local import LocalBlobs
from tunesmith.store.copying import keys_of
from tunesmith.store.locks import LockHeld
from tunesmith.store.people.identities import acting, add_user, set_roles
from tunesmith.store.records import Record, recalled
from tunesmith.store.store import ERASURES, Store
from tunesmith.store.tables import FileRow, HeldRow, JobEventRow, JobRow, Table

SECOND = "stella"
SAID = "My name is Ànna Bergström and I live at Rosenweg 12."
ANSWERED = "Dear Anna Bergstrom, your parcel waits at the counter."
SHORT = "call Rosenweg12"
PLANTED = ("rosenweg", "bergstr", "parcel waits at")
JOB: dict[str, Any] = {"most_attempts": 1, "due": 0.0, "created": 0.0, "progress": {}, "error": {}, "arguments": {}}
JUNK, UNKNOWN = "not an envelope: NotJson", "signed by a key that is not trusted here"
ANNA = Cause(kind="subject", value="C-1042")


def rows() -> list[Any]:
    """60 rows, of which five are Anna's, and one repeats what she said."""
    own = [
        example(f"{SAID} Order {n}.", ANSWERED, f"a{n}", None, subject="C-1042", source="calls.jsonl") for n in range(4)
    ]
    own.append(example(SHORT, "ok", "a9", None, subject="C-1042", source="calls.jsonl"))
    others = [example(f"switch on lamp {n}", "on", f"g{n}", None, source="calls.jsonl") for n in range(40)]
    return own + others


def scene_in(store: Store) -> Scene:
    scene = build_scene(store.root, store=store)
    add_user(store, SECOND, ["steward"], actor=OWNER)
    made = rows()
    scene.dataset = put_dataset(store, [*made[:2], *made[4:30]], made[30:34], [*made[2:4], *made[34:]])
    return scene


@pytest.fixture(autouse=True)
def owner(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TUNESMITH_USER", OWNER)


@pytest.fixture
def anna(tmp_path: Path) -> Scene:
    root = tmp_path / "store"
    return scene_in(Store(root, url=f"sqlite:///{root / 'tunesmith.db'}"))


@pytest.fixture(params=["folder", "bucket"])
def home(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Home:
    """A store on SQLite in a folder, and one on PostgreSQL with a bucket."""
    root = tmp_path / "store"
    if request.param == "folder":
        return Home.local(root)
    pytest.importorskip("obstore", reason="obstore is not installed")
    url, s3 = str(request.getfixturevalue("postgresql")), str(request.getfixturevalue("s3"))
    for name, value in s3_environment(s3).items():
        monkeypatch.setenv(name, value)
    empty_database(url)
    return Home(root, url, f"s3://{new_bucket(s3)}/p")


def plant(scene: Scene) -> list[Version]:
    """What a project and a server leave of Anna's rows."""
    store, made = scene.store, rows()
    versions = [scene.version(1), scene.version(2, shots=(made[0].messages, made[4].messages), retrieve=None)]
    flags = [{"id": made[4].id, "split": "train", "flag": "short", "detail": SHORT}]
    blob = store.put_bytes(b"".join(canonical(line) + b"\n" for line in flags))
    store.put_record(Record(kind="quality", parents={"dataset": scene.dataset}, blobs={"flags.jsonl": blob}, body={}))
    item = NewItem("row", made[4].id, {"short": SHORT}, scene.dataset, "train", made[4].messages)
    add_items(store, [item], wanted=1, actor=STEWARD)
    turns = (Message(role="user", content=f"Hello! {SAID}"),)
    put_case(
        store,
        Case(
            request="r1", messages=turns, expected=None, answer=ANSWERED, version=versions[0].digest, scores={}, by="x",
            at=stamp(), until="2999-01-01T00:00:00+00:00", tenant="", region="",
        ),
    )  # fmt: skip
    upload = json.dumps({"messages": [{"role": "user", "content": SAID}]}).encode()
    store.blobs.put("files/file-1.jsonl", upload)
    held: dict[str, Any] = {
        "digest": digest_bytes(b""),
        "at": 1.0,
        "deadline": 2.0,
        "until": 2e9,
        "at_deadline": "refuse",
    }
    with store.writing() as session:
        session.add_all([
            HeldRow(id="h1", name="home", version=versions[0].digest, caller="x", reasons=[], state="waiting",
                    texts={"messages": [{"content": SAID}]}, **held),
            JobRow(id=1, project="p", kind="run", state="failed", created_by="x", result={"why": [f"row {SAID!r}"]},
                   **JOB),
            JobEventRow(job=1, number=1, at=0.0, message=json.dumps(f"cannot tokenize\n{SAID}")),
            FileRow(file="file-1", created_by="x", name="a.jsonl", purpose="fine-tune", size=len(upload),
                    digest=digest_bytes(upload), created=0.0),
        ])  # fmt: skip
    work = store.local("work", "training-123", "rows.json")
    work.parent.mkdir(parents=True)
    work.write_text(SAID)
    return versions


def left(store: Store) -> list[str]:
    """The files, objects and tables that still hold a planted sentence."""
    files = {path.name: path.read_bytes() for path in sorted(store.root.rglob("*")) if path.is_file()}
    if not isinstance(store.blobs, LocalBlobs):
        files |= {key: store.blobs.get(key) for key in keys_of(store.blobs)}
        with store.engine.connect() as connection:
            for name in Table.metadata.tables:
                files[name] = repr(connection.execute(text(f"select * from {name}")).all()).encode()  # noqa: S608
    texts = {name: data.decode("utf-8", "ignore").lower() for name, data in files.items()}
    return [name for name, said in texts.items() if any(one in said for one in PLANTED)]


def signing(store: Store, actor: str) -> Callable[[JsonObject], bytes]:
    key = keys.load_signing_key(store, keys.ensure_key(store, actor))
    return lambda statement: seal(statement, key)


def plan(store: Store, cause: Cause, *, actor: str, **given: Any) -> Plan:
    return erasure.plan(store, cause, actor=actor, sign=signing(store, actor), **given)


def erase(store: Store, number: int, actor: str = SECOND) -> Plan:
    return confirm(store, number, actor=actor, sign=signing(store, actor))


def test_a_persons_texts_are_gone_and_what_stays_verifies(home: Home, caplog: pytest.LogCaptureFixture) -> None:
    anna = scene_in(home.open())
    store = anna.store
    versions = plant(anna)
    assert len(left(store)) > 8
    asked = plan(store, ANNA, reason="she asked", actor=STEWARD)
    assert (asked.state, len(asked.rows), asked.others) == ("planned", 5, ())
    assert asked.versions == tuple(version.label for version in versions)
    assert {each.place for each in asked.places} >= {
        "train.jsonl of records", "answers.jsonl of records", "flags.jsonl of records", "records: candidate",
        "kept requests", "uploaded files", "rows of the table held_answers", "rows of the table jobs",
    }  # fmt: skip
    with pytest.raises(Refused, match="planned erasure 1 and cannot confirm it"):
        erase(store, 1, STEWARD)
    done = erase(store, 1)
    assert (done.state, done.confirmed_by) == ("done", SECOND)
    assert left(store) == []
    for version in versions:
        found = verify_version(store, version.label)
        assert (found.problems, found.ok) == ([], True)
        assert any(f"erased on {stamp()[:10]} by {SECOND}" in note for note in found.notes)
    assert verify_audit(store).ok
    assert [row.subject for row in load_dataset(store, anna.dataset).examples("train")] == [None] * 25
    assert verify_dataset(store, anna.dataset).erased == ("test.jsonl", "train.jsonl")
    resume(store)
    assert caplog.text.count("is carried out") == 1


@pytest.mark.parametrize("keys_made", ["before", "since"])
def test_a_restored_backup_erases_again(
    anna: Scene, tmp_path: Path, caplog: pytest.LogCaptureFixture, keys_made: str
) -> None:
    store, file = anna.store, tmp_path / "before.tar"
    version = plant(anna)[0]
    for person in (STEWARD, SECOND) if keys_made == "before" else ():
        keys.ensure_key(store, person)
    backup(store, file, actor=OWNER)
    store.engine.dispose()
    shutil.copy(store.root / "tunesmith.db", tmp_path / "before.db")
    plan(store, ANNA, reason="she asked", actor=STEWARD)
    erase(store, 1)
    store.engine.dispose()
    # The whole store, into a place that holds the statements alone.
    again = Store(tmp_path / "again", url=f"sqlite:///{tmp_path / 'again' / 'tunesmith.db'}")
    shutil.copytree(store.root / "erasures", again.root / "erasures")
    restore(again, file, actor=OWNER)
    # The database alone, with a file that is no statement beside those that are.
    for more in ("", "-wal", "-shm"):
        (store.root / f"tunesmith.db{more}").unlink(missing_ok=True)
    shutil.copy(tmp_path / "before.db", store.root / "tunesmith.db")
    back = Store(store.root, url=store.url)
    back.blobs.put("erasures/notes.txt", b"junk")
    assert left(back) == ["tunesmith.db"]
    acting(back)  # as each command does, which writes the list of keys anew
    resume(back)
    for one in (again, back):
        if keys_made == "since":  # nobody can say whose these keys are, until they are enrolled again
            assert f"erasures/1.json is no erasure that counts, and nothing is done about it: {UNKNOWN}" in caplog.text
            assert any(UNKNOWN in problem.reason for problem in verify_audit(one).problems)
            for person in (STEWARD, SECOND):
                keys.enrol_public_key(one, person, (store.root / "trust" / f"{person}.pem").read_bytes(), actor=OWNER)
            resume(one)
        assert (left(one), verify_version(one, version.label, whole_store=False).ok) == ([], one is again)
        with one.reading() as session:
            assert recalled(session, anna.dataset) == "erasure 1: she asked"
    assert f"erasure 1, which {SECOND} confirmed, is carried out" in caplog.messages
    assert verify_audit(again).ok
    assert [problem.reason for problem in verify_audit(back).problems] == [f"erasures/notes.txt does not count: {JUNK}"]


def goes_on(store: Store) -> None:
    """What the next start finds of a killed erasure, and does: nothing left that should go, nothing lost that stays."""
    resume(store)
    if (state := list_erasures(store).erasures[0].state) != "done":
        assert (state, list(store.blobs.keys(ERASURES))) == ("planned", [])
        erase(store, 1)
    assert left(store) == []
    assert [verify_version(store, label).problems for label in ("home@v1", "home@v2")] == [[], []]
    assert verify_audit(store).ok
    dataset = load_dataset(store, store.records_of("dataset")[-1])
    assert [len(dataset.examples(split)) for split in SPLITS] == [25, 4, 11]


def kill_all(home: Home) -> None:
    def make() -> None:
        scene = scene_in(home.open())
        plant(scene)
        for number in range(24 if EVERY else 2):
            scene.store.blobs.put(f"files/file-{number}.jsonl", json.dumps({"text": f"{SAID} {number}"}).encode())
        plan(scene.store, ANNA, reason="she asked", actor=STEWARD, weights="erase")
        keys.ensure_key(scene.store, SECOND)

    assert run_forked(make) == 0
    points = kill_each(home, lambda store: erase(store, 1), goes_on, samples=4)
    assert points >= (100 if EVERY else 50), points
    print(f"{home.url.partition(':')[0]} has {points} points")


@pytest.mark.attack("crash", "kill -9 of an erasure at its writes", "it goes on")
def test_a_killed_erasure_goes_on(home: Home) -> None:
    assert run_elsewhere(kill_all, home, seconds=3600) == 0


@pytest.mark.slow
def test_a_bucket_that_refuses_to_delete_is_named_and_the_erasure_goes_on_later(
    s3: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    for name, value in s3_environment(s3).items():
        monkeypatch.setenv(name, value)
    boto3, bucket = pytest.importorskip("boto3"), f"locked{uuid.uuid4().hex}"
    client = boto3.client("s3")
    client.create_bucket(Bucket=bucket, ObjectLockEnabledForBucket=True)
    root = tmp_path / "store"
    anna = scene_in(Home(root, f"sqlite:///{root / 'tunesmith.db'}", f"s3://{bucket}/p").open())
    store, version = anna.store, plant(anna)[0]

    def versions() -> list[dict[str, str]]:
        pages = client.get_paginator("list_object_versions").paginate(Bucket=bucket)
        found = [{"Key": one["Key"], "VersionId": one["VersionId"]} for page in pages for one in page["Versions"]]
        return [{"Bucket": bucket, **one} for one in found]

    def lock(until: datetime) -> None:
        for one in versions():
            kept = {"Mode": "GOVERNANCE", "RetainUntilDate": until}
            client.put_object_retention(**one, Retention=kept, BypassGovernanceRetention=True)

    def texts() -> str:
        return "".join(client.get_object(**one)["Body"].read().decode("utf-8", "ignore") for one in versions()).lower()

    lock(datetime.now(UTC) + timedelta(days=1))
    plan(store, ANNA, reason="she asked", actor=STEWARD)
    asked = erase(store, 1)
    held = dict(asked.locked)
    resume(store)
    assert (asked.state, left(store), caplog.text.count("is carried out")) == ("locked", [], 1)
    assert any("files/file-1.jsonl" in where for where in held)
    assert stamp() < min(held.values()) <= max(held.values()) < stamp(timedelta(days=1))
    assert verify_version(store, version.label).problems == []

    assert PLANTED[0] in texts()
    lock(datetime.now(UTC) - timedelta(days=1))
    assert (erase(store, 1).state, [text for text in PLANTED if text in texts()]) == ("done", [])
    assert verify_audit(store).ok


def test_what_an_erasure_refuses(anna: Scene, caplog: pytest.LogCaptureFixture) -> None:
    store = anna.store
    plant(anna)
    with pytest.raises(UsageError, match="holds a row of subject nobody"):
        plan(store, Cause(kind="subject", value="nobody"), reason="asked", actor=STEWARD)
    with pytest.raises(UsageError, match="a recall of a base names no rows"):
        plan(store, Cause(kind="base", value=anna.base), reason="asked", actor=STEWARD)
    with pytest.raises(Refused, match="may not"):
        plan(store, ANNA, reason="asked", actor=APPROVER)
    with pytest.raises(UsageError, match="is nothing that can be recalled"):
        do(store, services.plan, actor=STEWARD, kind="recall", value="her", reason="asked")
    # What she said stands in another person's row: it is named, and stays.
    other = example(f"Somebody wrote: {SAID}", "spam", "o1", None, source="other.jsonl")
    theirs = put_dataset(store, [other])
    asked = plan(store, ANNA, reason="she asked", actor=STEWARD)
    assert (asked.others, asked.shared) == ((other.id,), 1)
    with store.writing() as session:
        session.add(JobRow(id=2, project="p", kind="run", state="running", created_by="x", result={}, **JOB))
    with pytest.raises(Refused, match=r"job 2 \(run\) may use what erasure 1 deletes"):
        erase(store, 1)
    with store.reading() as session:
        assert recalled(session, anna.dataset) == "erasure 1: she asked"
    with store.writing() as session:
        session.get_one(JobRow, 2).state = "failed"
    with store.lock("copying", "erasing"), pytest.raises(LockHeld):
        erase(store, 1)
    with store.lock("build-1", "stage data"), pytest.raises(Refused, match=r"\(stage data\) may use"):
        erase(store, 1)
    with store.lock("alone", "erasing"), pytest.raises(LockHeld, match="erasing"), store.lock("build-2", "stage data"):
        pytest.fail("a build reads what is erased")
    more = example(f"{SAID} Once more.", "ok", "a1", None, subject="C-1042")
    put_dataset(store, [more])
    with pytest.raises(Refused, match="1 rows or versions are reached that plan 1 does not name"):
        erase(store, 1)
    assert len(left(store)) > 8
    asks = {"kind": "recall", "value": "subject c-1042", "reason": "she asked", "weights": "erase"}
    number = do(store, services.plan, actor=STEWARD, **asks).number
    done = erase(store, number)
    assert (done.state, [one.id for one in load_dataset(store, theirs).examples("train")]) == ("done", [other.id])
    found = verify_version(store, "home@v1")
    assert found.ok
    assert any("its folder was erased on" in note for note in found.notes)
    assert recall_status(store, ANNA).gone
    with pytest.raises(UsageError, match="holds a row of subject c-1042 any more"):
        plan(store, ANNA, reason="again", actor=STEWARD)
    set_roles(store, SECOND, ["engineer"], actor=OWNER)  # what she confirmed stands
    assert verify_version(store, "home@v2").ok
    # A statement that nobody signed counts for nothing.
    (envelope,) = (store.root / "erasures").iterdir()
    envelope.chmod(0o600)
    envelope.write_bytes(envelope.read_bytes().replace(b"payload", b"Payload"))
    resume(store)
    assert "erasures/2.json is no erasure that counts, and nothing is done about it: not an envelope" in caplog.text
    assert not verify_version(store, "home@v2").ok
    assert not verify_audit(store).ok


@pytest.mark.parametrize(("kind", "value"), [("tenant", "acme"), ("source", "acme.jsonl")])
def test_a_tenants_or_sources_rows_and_passages_go_and_others_keep_theirs(anna: Scene, kind: Any, value: str) -> None:
    store = anna.store
    mine = [example(f"{SAID} {n}.", "ok", f"t{n}", None, tenant="acme", source="acme.jsonl") for n in range(3)]
    other = [example(f"lamp {n}", "on", f"x{n}", None, source="b.jsonl") for n in range(3)]
    dataset = put_dataset(store, [*mine[:2], *other], [], mine[2:])
    acme = Passage(id="p1", source="acme.jsonl", title="", text="Only for acme.", labels=Labels(tenant="acme"))
    theirs = acme.model_copy(update={"id": "p2", "source": "b.md", "labels": Labels()})
    blob = store.put_bytes(b"".join(canonical(each.model_dump(mode="json")) + b"\n" for each in (acme, theirs)))
    read = {"path": "acme.jsonl", "digest": digest_bytes(b""), "bytes": 1, "passages": 1}
    body = {"settings": {"asked_as": None, "licence": None}, "files": [read], "passages": 2, "removed": 0}
    body |= {"privacy": {"action": "keep", "found": {}}}
    documents = store.put_record(Record(kind="documents", blobs={PASSAGES: blob}, body=body))
    asked = plan(store, Cause(kind=kind, value=value), reason="asked", actor=STEWARD)
    assert set(asked.rows) == {"p1", *(row.id for row in mine)}
    assert erase(store, asked.number).state == "done"
    assert [row.id for row in load_dataset(store, dataset).examples("train")] == sorted(row.id for row in other)
    assert json.loads(store.read_blob(blob))["id"] == "p2"
    with store.reading() as session:
        assert {recalled(session, documents), recalled(session, dataset)} == {"erasure 1: asked"}
