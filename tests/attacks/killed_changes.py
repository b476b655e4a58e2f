"""Kills changes of the store at the writes that others can see. test_kill_points.py runs it.

The store must then be as before the change or as after it, and go on. Children are forked, so this is done in a process
of one thread: in a process with more, a child can wait for a lock that no thread of its own holds.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from sqlalchemy import select

from tests.attacks.kill_points import Moment, Operation, record, run_killed
from tests.fabricate import APPROVER, OWNER, STEWARD, build_scene, put_chain
from tests.statements import share_compiled
from tunesmith.core.errors import TunesmithError
from tunesmith.core.scope import Scope
from tunesmith.jobs import leases, queue
from tunesmith.monitoring.recall import Cause, recall
from tunesmith.registry.approvals import prepare_approval, sign, submit_approval
from tunesmith.registry.history import verify_log
from tunesmith.registry.registration import register
from tunesmith.registry.signing import keys
from tunesmith.registry.verification import verify_version
from tunesmith.rollout import commands
from tunesmith.rollout.settings import Step
from tunesmith.services.accounts import users
from tunesmith.store import database, uploads
from tunesmith.store.people import identities
from tunesmith.store.people.trust import TRUST_KEY, is_written, read_trust
from tunesmith.store.store import Store
from tunesmith.store.tables import (
    AliasRow,
    AuditRow,
    FileRow,
    JobEventRow,
    JobRow,
    KeyRow,
    RecallRow,
    RolloutRow,
    TokenRow,
    UserRow,
    VersionRow,
)

_ERROR = {"code": "internal", "what": "no"}


@dataclass(frozen=True)
class Made:
    """The store that each run copies, and the operations."""

    root: Path
    operations: Mapping[str, Operation]


def make(folder: Path) -> Made:
    """The store that each run copies, and the operations."""
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
        users.issue_token(store, APPROVER)
        steps = [Step(setWeight=10), Step(setWeight=100)]
        for name, version in (("home", first), ("other", scene.version(4, name="other"))):
            commands.start(store, name=name, version=version, steps=steps, actor=OWNER)
        undo = commands.start(store, name="other", version=scene.version(5, name="other"), steps=steps, actor=OWNER)
        commands.promote(store, undo.id, actor=OWNER)
        live = commands.start(store, name="home", version=third, steps=steps, actor=OWNER)
        verdict = put_chain(store, seed=7, base=scene.base, dataset=scene.dataset).verdict
        request = prepare_approval(store, unapproved, "ivy")
        envelope = sign(request, keys.load_signing_key(store, identities.get_user(store, "ivy")))
        queued = queue.add(store, "run", {}, project="home", actor=OWNER)
        queue.add(store, "run", {}, project="other", actor=OWNER)
        lease = leases.claim(store, "w", ["run"], project="other")
        assert lease is not None
        queue.add(store, "run", {}, project="third", actor=OWNER)
        assert leases.claim(store, "w", ["run"], project="third", seconds=-1.0) is not None
        file = keep(store, "file-kept")
        pem = folder / "public.pem"
        public = ec.generate_private_key(ec.SECP256R1()).public_key()
        pem.write_bytes(public.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo))
        store.engine.dispose()
    operations: dict[str, Operation] = {
        "register, with a first key": lambda s: register(s, name="home", verdict=verdict, actor="eve"),
        "approve": lambda s: submit_approval(s, envelope),
        "start: champion at once": lambda s: commands.start(s, name="fresh", version=waiting, steps=steps, actor=OWNER),
        "promote": lambda s: commands.promote(s, live.id, actor=OWNER),
        "abort": lambda s: commands.abort(s, live.id, actor=OWNER, reason="no"),
        "roll back a live rollout": lambda s: commands.rollback(s, name="home", actor=OWNER, reason="no"),
        "roll back a promotion": lambda s: commands.rollback(s, name="other", actor=OWNER, reason="no"),
        "recall": lambda s: recall(s, Cause(kind="version", value=third.digest), reason="no", actor=STEWARD),
        "users add, with a key": lambda s: users.add_user(s, "zoe", ["approver"], public_key=pem),
        "users roles": lambda s: users.set_roles(s, "ivy", ["steward"]),
        "users deactivate": lambda s: users.deactivate(s, APPROVER),
        "users token": lambda s: users.issue_token(s, "eve"),
        "users revoke-token": lambda s: users.revoke_token(s, APPROVER, "first"),
        "keys create": lambda s: users.create_key(s, "ivy", label="second", actor="ivy"),
        "keys enrol": lambda s: users.enrol_key(s, "ivy", pem, label="card", actor="ivy"),
        "keys retire": lambda s: users.retire_key(s, APPROVER, "key-1", actor=APPROVER),
        "keys revoke": lambda s: users.revoke_key(s, APPROVER, "key-1", since="10"),
        "jobs add": lambda s: queue.add(s, "run", {}, project="home", actor=OWNER, key="k"),
        "jobs cancel": lambda s: queue.cancel(s, queued.id, actor=OWNER),
        "jobs claim": lambda s: leases.claim(s, "w", ["run"], project="home"),
        "jobs finish": lambda s: leases.finish(s, lease, {"n": 1}),
        "jobs cancel, while it runs": lambda s: queue.cancel(s, lease.job, actor=OWNER),
        "jobs take back": lambda s: leases.claim(s, "w", ["run"], project="third"),
        "jobs begin": lambda s: leases.begin(s, "w", "run", {}, project="home", actor=OWNER),
        "jobs renew": lambda s: leases.renew(s, lease, {"step": "training"}),
        "jobs log": lambda s: leases.log(s, lease, "line"),
        "jobs fail": lambda s: leases.fail(s, lease, _ERROR, retry=False),
        "jobs try again": lambda s: leases.fail(s, lease, _ERROR, retry=True),
        "jobs stop": lambda s: leases.stop(s, lease, "told to"),
        "files put": lambda s: keep(s, "file-new"),
        "files delete": lambda s: uploads.delete(s, file.file, actor=OWNER, scope=Scope()),
    }
    return Made(folder / "made", operations)


def keep(store: Store, file: str) -> uploads.StoredFile:
    """Keep an uploaded file under an id."""
    with store.scratch() as folder:
        path = folder / "rows"
        path.write_bytes(b"{}\n" * 100)
        return uploads.put(store, path, name="rows.jsonl", purpose="fine-tune", actor=OWNER, scope=Scope(), file=file)


def snapshot(store: Store) -> Any:
    """What the store says, without what differs from run to run."""
    shown: tuple[tuple[Any, ...], ...] = (
        (VersionRow.name, VersionRow.number),
        (AliasRow.name, AliasRow.alias, AliasRow.version, AliasRow.revision),
        (RolloutRow.id, RolloutRow.status, RolloutRow.step, RolloutRow.weight, RolloutRow.revision),
        (RecallRow.digest, RecallRow.cause),
        (KeyRow.user, KeyRow.label, KeyRow.status, KeyRow.until),
        (JobRow.id, JobRow.state, JobRow.wanted, JobRow.attempts, JobRow.fence),
        (JobRow.id, JobRow.progress, JobRow.result, JobRow.error),
        (FileRow.file, FileRow.size, FileRow.digest),
        (JobEventRow.job, JobEventRow.number, JobEventRow.message),
        (UserRow.name, UserRow.roles, UserRow.active),
        (TokenRow.user, TokenRow.name, TokenRow.revoked.is_not(None)),
    )
    with database.reading(store.engine) as session:
        log = session.execute(select(AuditRow.actor, AuditRow.action).order_by(AuditRow.seq))
        return [list(map(repr, log)), *(sorted(map(repr, session.execute(select(*each)))) for each in shown)]


def check_killed(store: Store, states: list[Any], *, writes_files: bool) -> None:
    """Raise AssertionError unless a killed change left one of these states, whole."""
    assert snapshot(store) in states, "half a state"
    assert verify_log(store) == []
    check_trust(store)
    uploads.remove_leftovers(store)
    known = {f"files/{each.file}.jsonl" for each in listed(store)}
    assert set(store.blobs.keys("files/")) <= known, "bytes that no client can delete"
    if writes_files:  # a version is verified from files alone
        newest = max(ref.number for ref in store.version_folders("home"))
        found = verify_version(store, f"home@v{newest}")
        assert found.ok, found.problems


def listed(store: Store) -> list[uploads.StoredFile]:
    return uploads.list_files(store, Scope(), most=100, oldest_first=True)


def check_trust(store: Store) -> None:
    """The list of keys must not trust more than the database does."""
    now = {key.fingerprint: key for key in identities.trusted_keys(store)}
    for listed in read_trust(store.blobs.path(TRUST_KEY)):
        key = now[listed.fingerprint]
        assert listed.active <= key.active
        assert set(listed.roles) <= set(key.roles)
        assert key.status == "active" or listed.status != "active"


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


def states_of(made: Made, folder: Path, operation: Operation, points: list[str]) -> list[Any]:
    """The states before the operation and after each of its transactions."""
    states = []
    for number in (None, *(number for number, what in enumerate(points) if what == "commit")):
        root = folder / f"state-{number}"
        shutil.copytree(made.root, root)
        if number is not None:
            run_killed(root, operation, number, "after")
        store = Store(root, url=f"sqlite:///{root / 'tunesmith.db'}")
        state = snapshot(store)
        store.engine.dispose()
        if not states or state != states[-1]:
            states.append(state)
    return states


def run_all(made: Made, name: str) -> int:
    """Kill an operation before each of its points and after the last one; returns how often."""
    operation = made.operations[name]
    folder = made.root.parent / name.replace(" ", "-")
    folder.mkdir()
    whole = folder / "whole"
    shutil.copytree(made.root, whole)
    points = record(whole, operation)
    states = states_of(made, folder, operation, points)
    assert len(states) > 1, f"{name} commits nothing that is looked at"
    writes_files = any(what != "commit" for what in points)
    moments: list[tuple[int, Moment]] = [(number, "before") for number in range(len(points))]
    moments.append((len(points) - 1, "after"))  # after any other point is before the next one
    for number, moment in moments:
        root = folder / f"{number}-{moment}"
        shutil.copytree(made.root, root)
        run_killed(root, operation, number, moment)
        store = Store(root, url=f"sqlite:///{root / 'tunesmith.db'}")
        try:
            check_killed(store, states, writes_files=writes_files)
            check_goes_on(store, operation, states)
        except BaseException as error:
            raise AssertionError(f"{name}, killed {moment} {points[number]} (number {number}): {error}") from error
        store.engine.dispose()
        shutil.rmtree(root)
    return len(moments)


def kill_all(folder: Path) -> None:
    """Kill every operation. Writes to folder/killed.json: name -> how often."""
    with pytest.MonkeyPatch.context() as patch:
        share_compiled(patch)
        made = make(folder)
        killed = {name: run_all(made, name) for name in made.operations}
        (folder / "killed.json").write_text(json.dumps(killed))
