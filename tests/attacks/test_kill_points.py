"""A change is killed at each of its writes that others can see. The store is then as before it or as after it, and goes
on."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from sqlalchemy import select

from tests.acting import do
from tests.fabricate import APPROVER, OWNER, STEWARD, build_scene, put_chain
from tests.forked import run_elsewhere
from tests.killed import Home, Operation, record
from tests.statements import share_compiled
from tunesmith.core.errors import TunesmithError
from tunesmith.core.text.names import Scope
from tunesmith.monitoring.recall import Cause, recall
from tunesmith.registry.approvals import prepare_approval, submit_approval
from tunesmith.registry.history import verify_log
from tunesmith.registry.registration import register
from tunesmith.registry.signing import keys
from tunesmith.registry.signing.attestations import public_pem, seal
from tunesmith.registry.verification import verify_version
from tunesmith.rollout import commands
from tunesmith.rollout.settings import Step
from tunesmith.services import users
from tunesmith.services import users as service
from tunesmith.store import database, tables, uploads
from tunesmith.store.people import identities
from tunesmith.store.people.trust import TRUST_KEY, is_written, read_trust
from tunesmith.store.store import Store

pytestmark = pytest.mark.slow


def make(folder: Path) -> dict[str, Operation]:
    """Fill the store that each run copies, folder/made; returns the operations on it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TUNESMITH_USER", OWNER)
        patch.delenv("TUNESMITH_KEYS", raising=False)
        scene = build_scene(folder / "made")
        store = scene.store
        for name, role in (("eve", "engineer"), ("ivy", "approver")):
            identities.add_user(store, name, [role], actor=OWNER)
        first, third = scene.version(1), scene.version(3)
        waiting = scene.version(None, name="fresh")
        unapproved = scene.version(None, name="new", approved=False)
        keys.create_key(store, "ivy", actor="ivy")
        do(store, users.issue_token, user=APPROVER, name="first")
        steps = [Step(setWeight=10), Step(setWeight=100)]
        for name, version in (("home", first), ("other", scene.version(4, name="other"))):
            commands.start(store, name=name, version=version, steps=steps, actor=OWNER)
        undo = commands.start(store, name="other", version=scene.version(5, name="other"), steps=steps, actor=OWNER)
        commands.promote(store, undo.id, actor=OWNER)
        live = commands.start(store, name="home", version=third, steps=steps, actor=OWNER)
        verdict = put_chain(store, seed=7, base=scene.base, dataset=scene.dataset).verdict
        request = prepare_approval(store, unapproved, "ivy")
        envelope = seal(request, keys.load_signing_key(store, identities.get_user(store, "ivy")))
        file = keep(store, "file-kept")
        pem = public_pem(ec.generate_private_key(ec.SECP256R1()).public_key())
        store.engine.dispose()
    return {
        "register, with a first key": lambda s: register(s, name="home", verdict=verdict, actor="eve"),
        "approve": lambda s: submit_approval(s, envelope),
        "start: champion at once": lambda s: commands.start(s, name="fresh", version=waiting, steps=steps, actor=OWNER),
        "promote": lambda s: commands.promote(s, live.id, actor=OWNER),
        "abort": lambda s: commands.abort(s, live.id, actor=OWNER, reason="no"),
        "roll back a promotion": lambda s: commands.rollback(s, name="other", actor=OWNER, reason="no"),
        "recall": lambda s: recall(s, Cause(kind="version", value=third.digest), reason="no", actor=STEWARD),
        "users add, with a key": lambda s: do(s, users.add_with_key, name="zoe", roles=["approver"], public_key=pem),
        "users roles": lambda s: do(s, users.set_roles, user="ivy", roles=["steward"]),
        "users deactivate": lambda s: do(s, users.deactivate, user=APPROVER),
        "users token": lambda s: do(s, users.issue_token, user="eve", name="first"),
        "users revoke-token": lambda s: do(s, users.revoke_token, user=APPROVER, name="first"),
        "keys create": lambda s: do(s, service.create_key, actor="ivy", label="second"),
        "keys enrol": lambda s: do(s, service.enrol_key, actor="ivy", user="ivy", public_key=pem, label="card"),
        "keys retire": lambda s: do(s, service.retire_key, actor=APPROVER, user=APPROVER, label="key-1"),
        "keys revoke": lambda s: do(s, service.revoke_key, user=APPROVER, label="key-1", since="10"),
        "files put": lambda s: keep(s, "file-new"),
        "files delete": lambda s: uploads.delete(s, file.file, actor=OWNER, scope=Scope()),
    }


def keep(store: Store, file: str) -> tables.FileRow:
    """Keep an uploaded file under an id."""
    with store.scratch() as folder:
        path = folder / "rows"
        path.write_bytes(b"{}\n" * 100)
        return uploads.put(store, path, name="rows.jsonl", purpose="fine-tune", actor=OWNER, scope=Scope(), file=file)


def snapshot(store: Store) -> Any:
    """What the store says, without what differs from run to run."""
    shown: tuple[tuple[Any, ...], ...] = (
        (tables.VersionRow.name, tables.VersionRow.number),
        (tables.AliasRow.name, tables.AliasRow.alias, tables.AliasRow.version, tables.AliasRow.revision),
        tuple(getattr(tables.RolloutRow, each) for each in ("id", "status", "step", "weight", "revision")),
        (tables.RecallRow.digest, tables.RecallRow.cause),
        (tables.KeyRow.user, tables.KeyRow.label, tables.KeyRow.status, tables.KeyRow.until),
        (tables.FileRow.file, tables.FileRow.size, tables.FileRow.digest),
        (tables.UserRow.name, tables.UserRow.roles, tables.UserRow.active),
        (tables.TokenRow.user, tables.TokenRow.name, tables.TokenRow.revoked.is_not(None)),
    )
    with database.reading(store.engine) as session:
        log = session.execute(select(tables.AuditRow.actor, tables.AuditRow.action).order_by(tables.AuditRow.seq))
        return [list(map(repr, log)), *(sorted(map(repr, session.execute(select(*each)))) for each in shown)]


def check_killed(store: Store, states: list[Any], *, writes_files: bool) -> None:
    """Raise AssertionError unless a killed change left one of these states, whole."""
    assert snapshot(store) in states, "half a state"
    assert verify_log(store) == []
    # The list of keys must not trust more than the database does.
    now = {key.fingerprint: key for key in identities.trusted_keys(store)}
    for trusted in read_trust(store.blobs.path(TRUST_KEY)):
        key = now[trusted.fingerprint]
        assert trusted.active <= key.active
        assert set(trusted.roles) <= set(key.roles)
        assert key.status == "active" or trusted.status != "active"
    uploads.remove_leftovers(store)
    known = {f"files/{each.file}.jsonl" for each in listed(store)}
    assert set(store.blobs.keys("files/")) <= known, "bytes that no client can delete"
    if writes_files:  # a version is verified from files alone
        newest = max(ref.number for ref in store.version_folders("home"))
        found = verify_version(store, f"home@v{newest}")
        assert found.ok, found.problems


def listed(store: Store) -> list[tables.FileRow]:
    return uploads.list_files(store, Scope(), most=100, oldest_first=True)


def check_goes_on(store: Store, operation: Operation, states: list[Any]) -> None:
    """Run the operation again: it must complete, or refuse because it is complete already."""
    complete = snapshot(store) == states[-1]
    identities.ensure_owner(store)  # what every command begins with
    assert is_written(store.blobs, identities.trusted_keys(store))
    try:
        operation(store)
    except TunesmithError:
        assert complete
    if not complete:
        assert snapshot(store) == states[-1]
    for each in listed(store):
        assert list(uploads.pieces(store, each))
    assert verify_log(store) == []
    assert is_written(store.blobs, identities.trusted_keys(store))


def run_all(made: Path, name: str, operation: Operation) -> int:
    """Kill an operation before each of its points, and run it whole; returns how often."""
    folder = made.parent / name.replace(" ", "-")

    def run(place: str, number: int | None = None) -> tuple[Store, list[str]]:
        root = folder / place
        shutil.copytree(made, root)
        home = Home.local(root)
        points = record(home, operation, number)
        return home.open(), points

    whole, points = run("whole")
    stores = [*(run(f"{number}", number)[0] for number in range(len(points))), whole]
    # The states before it and after each of its transactions.
    after = [number + 1 for number, what in enumerate(points) if what == "commit"]
    states = [snapshot(stores[number]) for number in (0, *after)]
    assert states[0] == snapshot(Home.local(made).open())
    assert states[0] != states[-1], f"{name} commits nothing that is looked at"
    writes_files = any(what != "commit" for what in points)
    for number, store in enumerate(stores):
        try:
            check_killed(store, states, writes_files=writes_files)
            check_goes_on(store, operation, states)
        except BaseException as error:
            raise AssertionError(f"{name}, killed at {[*points, 'its end'][number]} ({number}): {error}") from error
        store.engine.dispose()
    shutil.rmtree(folder)
    return len(stores)


def kill_all(folder: Path) -> None:
    """Kill every operation. Writes to folder/killed.json: name -> how often."""
    with pytest.MonkeyPatch.context() as patch:
        share_compiled(patch)
        killed = {name: run_all(folder / "made", name, operation) for name, operation in make(folder).items()}
        (folder / "killed.json").write_text(json.dumps(killed))


@pytest.mark.attack("crash", "kill -9 at every write of a change", "whole, and the next command ran")
def test_a_change_killed_at_any_write_leaves_a_whole_state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TUNESMITH_USER", OWNER)
    assert run_elsewhere(kill_all, tmp_path, seconds=900) == 0
    found = json.loads((tmp_path / "killed.json").read_text())
    assert sum(found.values()) >= 90, found
    one_commit = {name for name, count in found.items() if count == 2}
    assert one_commit == {"start: champion at once", "promote", "abort", "roll back a promotion", "recall"}
