"""Withdrawals that are planned beside each other, stopped, forged, or lost with an older database."""

from __future__ import annotations

import json
import os
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.acting import do
from tests.attack_table import Happened
from tests.fabricate import OWNER, STEWARD, Scene, build_scene, example, put_dataset
from tests.killed import EVERY
from tests.monitoring.test_erasure import ANNA, SECOND, erase, left, plan, plant, scene_in, signing
from tests.server.test_decisions import new_key
from tunesmith.core.clock import stamp
from tunesmith.core.digests import digest_bytes
from tunesmith.core.errors import Refused, UsageError
from tunesmith.data.dataset import SPLITS, load_dataset
from tunesmith.monitoring.erasure import list_erasures, resume
from tunesmith.monitoring.recall import Cause
from tunesmith.registry import erasures, holds
from tunesmith.registry.erasures import ErasureStatement, read_erasure, statement_of
from tunesmith.registry.signing.attestations import public_pem, seal
from tunesmith.registry.verification import verify_version
from tunesmith.registry.versions import resolve
from tunesmith.services import storage
from tunesmith.services.audit import verify_audit
from tunesmith.store.people.identities import add_user, trusted_keys
from tunesmith.store.people.trust import TrustedKey
from tunesmith.store.records import recalled
from tunesmith.store.store import Store
from tunesmith.store.tables import AuditRow

PEOPLE = 5


@pytest.fixture(autouse=True)
def owner(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TUNESMITH_USER", OWNER)


@pytest.fixture
def anna(tmp_path: Path) -> Scene:
    return scene_in(Store(tmp_path / "store", url=f"sqlite:///{tmp_path / 'store' / 'tunesmith.db'}"))


class Stopped(BaseException):
    pass


def stop_after(store: Store, calls: int) -> None:
    """End this process's work at the call after so many, at which an object is written or erased."""
    count = iter(range(1 << 30))
    for name in ("put", "erase"):

        def call(*given: Any, real: Callable[..., Any] = getattr(store.blobs, name), **named: Any) -> Any:
            if next(count) >= calls:
                raise Stopped
            return real(*given, **named)

        setattr(store.blobs, name, call)


@pytest.mark.attack("erasure", "sequences of erasures, planned beside each other and stopped")
@pytest.mark.parametrize("seed", range(200 if EVERY else 6))
def test_erasures_compose(tmp_path: Path, seed: int, happened: Happened) -> None:
    draw, root = random.Random(seed), tmp_path / "store"

    def opened() -> Store:
        return Store(root, url=f"sqlite:///{root / 'tunesmith.db'}")

    scene = build_scene(root, store=opened())
    store = scene.store
    add_user(store, SECOND, ["steward"], actor=OWNER)
    rows = [
        example(f"I am customer number {n} and live in Lindenallee {n}{k}.", f"answer {n}{k}", f"g{n}{k}", None,
                subject=f"S-{n}", source=f"calls-{n % 2}.jsonl")
        for n in range(PEOPLE) for k in range(3)
    ]  # fmt: skip
    lasting = [example(f"switch on the lamp in room number {n}", "on", f"l{n}", None) for n in range(6)]
    scene.dataset = put_dataset(store, [*rows[::2], *lasting[:4]], lasting[4:5], [*rows[1::2], *lasting[5:]])
    label, datasets = scene.version(1).label, [scene.dataset]
    asked: list[int] = []
    gone: set[str] = set()
    causes = [Cause(kind="subject", value=f"S-{n}") for n in range(PEOPLE)]
    causes += [Cause(kind="source", value="calls-1.jsonl"), Cause(kind="row", value=rows[0].id)]

    def confirmed(number: int) -> None:
        nonlocal store
        stop_after(store, draw.randrange(40))
        try:
            erase(store, number)
        except Stopped:
            happened("stopped, and went on")
        store.engine.dispose()
        store = opened()
        resume(store)
        if next(one for one in list_erasures(store).erasures if one.number == number).state == "planned":
            erase(store, number)
        named = next(one for one in list_erasures(store).erasures if one.number == number)
        assert named.state == "done"
        gone.update(named.rows)

    for _ in range(8):
        if (act := draw.choice(("plan", "plan", "confirm", "build"))) == "plan":
            try:
                asked.append(plan(store, draw.choice(causes), reason="asked", actor=STEWARD).number)
            except UsageError:
                happened("nothing left to erase")
        elif act == "build":
            datasets.append(put_dataset(store, [row for row in rows if row.id not in gone], (), lasting[:1]))
        elif asked:
            confirmed(asked.pop(draw.randrange(len(asked))))
    while asked:
        confirmed(asked.pop(draw.randrange(len(asked))))
    happened("composed")
    assert (verify_version(store, label).problems, verify_audit(store).problems) == ([], ())
    files = b"".join(
        path.read_bytes() for path in root.rglob("*") if path.is_file() and path.name != "tunesmith.db-wal"
    )
    for row in rows:
        assert (row.messages[0].content.encode() in files) is (row.id not in gone)
    kept = {row.id for split in SPLITS for row in load_dataset(store, datasets[0]).examples(split)}
    assert kept == {row.id for row in (*rows, *lasting)} - gone


def _changed(key: TrustedKey, **fields: Any) -> TrustedKey:
    return key.model_copy(update={"signed": (), **fields})


@pytest.mark.attack("erasure", "a statement signed by somebody who may not", "refused")
@pytest.mark.parametrize("who", [STEWARD, SECOND])
@pytest.mark.parametrize(
    "fields",
    [{"active": False}, {"roles": ("operator",)}, {"tenant": "acme"}, {"region": "eu"}, {"status": "revoked"},
     {"user": "somebody"}],
    ids=lambda fields: next(iter(fields)),
)  # fmt: skip
def test_a_withdrawal_takes_two_people_who_may(anna: Scene, who: str, fields: dict[str, Any]) -> None:
    store = anna.store
    plant(anna)
    plan(store, ANNA, reason="she asked", actor=STEWARD)
    erase(store, 1)
    raw, fresh = store.blobs.get("erasures/1.json"), [_changed(key) for key in trusted_keys(store)]
    assert read_erasure(raw, fresh, "erasures/1.json").statement.number == 1
    forged = [_changed(key, **fields) if key.user == who else key for key in fresh]
    with pytest.raises(Refused):
        read_erasure(raw, forged, "erasures/1.json")
    do(store, storage.hold, actor=who, version="home@v1", reason="a lawsuit")
    assert holds.read_hold(store.blobs.get("holds/1.json"), fresh, "holds/1.json")[0].held
    with pytest.raises(Refused):
        holds.read_hold(store.blobs.get("holds/1.json"), forged, "holds/1.json")


@pytest.mark.attack("erasure", "a statement that replaces what decides, or what nobody planned")
def test_an_erasure_changes_nothing_that_decides(anna: Scene, happened: Happened) -> None:
    store = anna.store
    version = plant(anna)[0]
    plan(store, ANNA, reason="she asked", actor=STEWARD)
    erase(store, 1)
    raw, trusted = store.blobs.get("erasures/1.json"), trusted_keys(store)
    signed = read_erasure(raw, trusted, "erasures/1.json").statement
    other = store.put_bytes(b"{}")

    def forged(**fields: Any) -> bytes:
        changed = {"number": 1, **signed.model_dump(mode="json"), **fields}
        return signing(store, SECOND)(statement_of(ErasureStatement.model_validate(changed)))

    one: dict[str, Any] = {"old": version.verdict, "new": other}
    for replaced in (
        {"kind": "record", "name": "version", "cut": ["/1"], **one},
        {"kind": "record", "name": "verdict", **one},
        {"kind": "record", "name": "verdict", "rows": ["x"], **one},
        {"kind": "blob", "name": "train.jsonl", "rows": ["nobody-planned"], **one},
        {"kind": "blob", "name": "train.jsonl", "cut": ["/1"], **one},
        {"kind": "blob", "name": "answers.jsonl", "rows": list(signed.rows[:1]), **one},
        {"kind": "blob", "name": "adapter_model.safetensors", **one},
    ):
        with pytest.raises(Refused, match="which no erasure may change so"):
            read_erasure(forged(replaced=[replaced]), trusted, "erasures/1.json")
        happened("refused")
    for fields in ({"rows": [*signed.rows, "more"]}, {"versions": {"home@v9": other}}, {"cause": "subject other"}):
        with pytest.raises(Refused):
            read_erasure(forged(**fields), trusted, "erasures/1.json")
        happened("refused")
    # Two who may sign a verdict that passes: it counts for no version that was not recalled with it.
    verdict = json.loads(store.record_bytes(version.verdict)[1])
    left = json.dumps(verdict, sort_keys=True, separators=(",", ":")).encode() + b" "
    store.blobs.put(f"records/{digest_bytes(left)[7:9]}/{digest_bytes(left)[7:]}.json", left)
    pair = {"kind": "record", "name": "verdict", "cut": ["/1"], "old": version.verdict, "new": digest_bytes(left)}
    erased = forged(replaced=[*signed.model_dump(mode="json")["replaced"], pair], recalled=[])
    os.chmod(store.root / "erasures" / "1.json", 0o600)
    store.blobs.put("erasures/1.json", erased)
    assert not verify_version(store, version.label).ok
    happened("refused")


@pytest.mark.attack("erasure", "a hold is ended by the planner, or lost with an older database", "held")
def test_a_hold_stays_until_who_may_end_it_does(anna: Scene) -> None:
    store = anna.store
    plant(anna)
    plan(store, ANNA, reason="she asked", actor=STEWARD)
    add_user(store, "adam", ["admin", "steward"], actor=OWNER)
    do(store, storage.hold, actor=SECOND, version="home@v1", reason="a lawsuit")
    with pytest.raises(Refused, match=f"home@v1 is held by {SECOND}"):
        erase(store, 1)
    with store.reading() as session:  # nothing was recalled before it was refused
        assert recalled(session, anna.dataset) is None
    ends = {"reason": "over", "version": "home@v1", "end": True}
    with pytest.raises(Refused, match=f"{STEWARD} may not end the hold of {SECOND}"):
        do(store, storage.hold, actor=STEWARD, **ends)
    with store.writing() as session:  # an older database does not know of the hold
        for row in session.query(AuditRow).where(AuditRow.action == holds.HOLD):
            session.delete(row)
    with store.reading() as session:
        assert [held.by for held in holds.held_versions(store, session).values()] == [SECOND]
    do(store, storage.hold, actor="adam", **ends)
    assert erase(store, 1).state == "done"


@pytest.mark.attack("erasure", "statements by keys that nobody enrolled, in the names of people who may", "refused")
def test_a_key_that_only_the_files_name_counts_for_nothing(anna: Scene, tmp_path: Path) -> None:
    store = anna.store
    plant(anna)
    do(store, storage.hold, actor=SECOND, version="home@v1", reason="a lawsuit")
    there = left(store)
    # Everything is signed as it should be, by keys that the list in the files says are theirs.
    made = {SECOND: new_key(tmp_path / "second.pem"), STEWARD: new_key(tmp_path / "steward.pem")}
    pems = {name: public_pem(key.public_key()) for name, key in made.items()}
    asked: Any = {"number": 1, "cause": ANNA.label, "reason": "asked", "planned_by": STEWARD}
    asked["plan"] = {"rows": [], "versions": [], "weights": "keep"}
    asked["plan"]["signature"] = seal(erasures.plan_statement(**asked), made[STEWARD]).decode()
    empty: Any = {"rows": [], "replaced": [], "deleted": ["files/file-1.jsonl"], "entries": {}, "versions": {}}
    forged = {**asked, **empty, "confirmed_by": SECOND, "at": stamp(), "recalled": [anna.dataset]}
    statement = statement_of(ErasureStatement.model_validate(forged))
    store.blobs.put("erasures/1.json", seal(statement, made[SECOND]))
    ends = {"number": 2, "version": "home@v1", "digest": resolve(store, "home@v1").digest, "held": False, "at": stamp()}
    ended = holds.HoldStatement.model_validate({**ends, "by": SECOND, "reason": "over", "set_by": SECOND}).statement
    store.blobs.put("holds/2.json", seal(ended, made[SECOND]))
    keys_file = store.root / "trust" / "keys.json"
    listed = json.loads(keys_file.read_bytes())
    for name, pem in pems.items():
        stands = {"label": "more", "public_key": pem, "fingerprint": digest_bytes(pem.encode())}
        listed.append({"user": name, "roles": ["steward"], "signed": [], **stands})
    store.blobs.put("trust/keys.json", json.dumps(listed).encode())
    resume(store)
    assert left(store) == there
    with store.reading() as session:
        assert recalled(session, anna.dataset) is None
        assert [held.by for held in holds.held_versions(store, session).values()] == [SECOND]
    assert len(verify_audit(store).problems) == 2


@pytest.mark.attack("erasure", "somebody else's hold is set again, to be ended as one's own", "refused")
def test_a_hold_is_not_taken_over(anna: Scene) -> None:
    store = anna.store
    plant(anna)
    do(store, storage.hold, actor=SECOND, version="home@v1", reason="a lawsuit")
    with pytest.raises(Refused, match=f"home@v1 is held by {SECOND}"):
        do(store, storage.hold, actor=STEWARD, version="home@v1", reason="mine")
