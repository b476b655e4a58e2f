"""Four eyes and an approver's signed no, by attack: the newest decision stands, nothing older brings a version back."""

from __future__ import annotations

import json
import os
import random
import secrets

import pytest
from sqlalchemy import delete, update

from tests.fabricate import Chain, approve, put_chain
from tunesmith.core.clock import stamp
from tunesmith.core.digests import canonical
from tunesmith.core.errors import Refused, UsageError
from tunesmith.core.scope import Scope
from tunesmith.registry.approvals import LASTS, prepare_approval, require_approved, sign, submit_approval
from tunesmith.registry.history import lost_signatures, verify_log
from tunesmith.registry.registration import register
from tunesmith.registry.serving import may_serve
from tunesmith.registry.signing import keys
from tunesmith.registry.signing.attestations import ENVELOPE, Approval, Decision, seal, statement_of
from tunesmith.registry.verification import verify_version
from tunesmith.registry.versions import Version
from tunesmith.services.releases import versions as service
from tunesmith.store import audit, database
from tunesmith.store.audit import Head
from tunesmith.store.people import identities, user_keys
from tunesmith.store.people.trust import signature_entry
from tunesmith.store.records import Record
from tunesmith.store.store import Store
from tunesmith.store.tables import AuditRow, KeyRow, RecallRow, UserRow


def put_approval(store: Store, version: Version, approval: Approval, envelope: bytes, *, logged: bool = True) -> str:
    """Slip an approval's record into the store as someone who can write it would."""
    record = Record(
        kind="approval",
        parents={"version": version.digest},
        blobs={ENVELOPE: store.put_bytes(envelope)},
        body=approval.model_dump(mode="json"),
    )
    if not logged:
        return store.put_record(record)
    key = identities.get_user(store, approval.approver).fingerprint or ""
    detail = signature_entry(key, record.digest)
    with store.change(approval.approver, "version.approve", version.digest, detail) as session:
        return store.put_record(record, session)


def approval_by(store: Store, user: str, **changes: object) -> Approval:
    with database.reading(store.engine) as session:
        stated = {"approver": user, "role": "approver", "decision": "approve", "reason": "", "override": None}
        times = {"at": stamp(), "until": stamp(LASTS), "nonce": secrets.token_hex(16)}
        return Approval.model_validate({**stated, **times, "audit": audit.newest(session), **changes})


def sealed(store: Store, user: str, statement: object) -> bytes:
    known = keys.ensure_key(store, user)
    return seal(statement, keys.load_signing_key(store, known))  # type: ignore[arg-type]


def approval_count(store: Store) -> int:
    with database.reading(store.engine) as session:
        return session.query(AuditRow).filter_by(action="version.approve").count()


def test_prepare_states_what_is_signed_and_changes_nothing(store: Store, version: Version) -> None:
    with database.reading(store.engine) as session:
        newest = audit.newest(session)
    request = prepare_approval(store, version, "ann", "  looks right ")
    predicate = request.statement["predicate"]
    assert request.statement["subject"] == [{"name": "intents@v1", "digest": {"sha256": version.digest[7:]}}]
    assert (predicate["approver"], predicate["reason"], predicate["override"]) == ("ann", "looks right", None)
    assert predicate["audit"] == newest.model_dump()
    statement = canonical(request.statement)
    assert request.payload == b"DSSEv1 28 application/vnd.in-toto+json %d %s" % (len(statement), statement)
    with database.reading(store.engine) as session:
        assert audit.newest(session) == newest
    assert not (store.root / "keys" / "ann.pem").exists()


@pytest.mark.attack("people", "a signed approval sent again, or signed without a nonce")
def test_a_signed_statement_is_recorded_once(store: Store, version: Version) -> None:
    key = keys.load_signing_key(store, keys.ensure_key(store, "ann"))
    requests = [prepare_approval(store, version, "ann", "why", "refuse") for _ in range(2)]
    nonces = {request.statement["predicate"]["nonce"] for request in requests}
    assert len(nonces) == 2
    signed = [sign(request, key) for request in requests]
    submit_approval(store, signed[0])
    approve(store, version, approver="ann")  # the refusal no longer stands
    for _ in range(2):
        with pytest.raises(Refused, match="was recorded before, on "):
            submit_approval(store, signed[0])
    with pytest.raises(Refused, match="approved the version after this was prepared"):
        submit_approval(store, signed[1])  # unused, but older than what it would overturn
    newest = require_approved(store, version)
    assert newest.nonce not in (None, *nonces)
    for nonce in ("", "A" * 32, "0" * 31, "0" * 33):
        statement = statement_of(version, approval_by(store, "ann", nonce=nonce))
        with pytest.raises(Refused, match="has no nonce"):
            submit_approval(store, seal(statement, key))
    assert approval_count(store) == 1
    assert verify_log(store) == []


def test_submit_checks_role_and_recall_again(store: Store, version: Version) -> None:
    key = keys.load_signing_key(store, keys.ensure_key(store, "ann"))
    envelope = sign(prepare_approval(store, version, "ann"), key)
    identities.set_roles(store, "ann", ["operator"], actor="olive")
    with pytest.raises(Refused, match="ann may not do this"):
        submit_approval(store, envelope)
    identities.set_roles(store, "ann", ["approver"], actor="olive")
    with database.writing(store.engine) as session:
        session.add(RecallRow(digest=version.digest, cause="x", reason="withdrawn", at=stamp()))
    with pytest.raises(Refused, match="recalled: withdrawn"):
        submit_approval(store, envelope)
    assert approval_count(store) == 0


def test_submit_refuses_a_statement_for_another_user(store: Store, version: Version) -> None:
    identities.add_user(store, "cat", ["approver"], actor="olive")
    statement = statement_of(version, approval_by(store, "ann"))
    with pytest.raises(Refused, match="the record says ann, the key is cat's"):
        submit_approval(store, sealed(store, "cat", statement))


def test_submit_refuses_an_unknown_audit_head(store: Store, version: Version) -> None:
    for head in (Head(seq=10_000, digest=version.digest), Head(seq=1, digest=version.digest)):
        statement = statement_of(version, approval_by(store, "ann", audit=head))
        with pytest.raises(Refused, match="prepared on another audit log"):
            submit_approval(store, sealed(store, "ann", statement))
    assert approval_count(store) == 0


@pytest.mark.parametrize(
    "statement", [{}, [], "text", {"subject": [{"digest": {"sha256": "0" * 64}}], "predicate": {}}]
)
def test_submit_refuses_what_is_not_an_approval(store: Store, version: Version, statement: object) -> None:
    with pytest.raises(Refused, match="not an approval"):
        submit_approval(store, sealed(store, "ann", statement))


def test_a_second_person_approves_and_once_is_enough(store: Store, version: Version) -> None:
    with pytest.raises(Refused, match="intents@v1 is not approved"):
        require_approved(store, version)
    digest = approve(store, version, approver="ann", reason="looks right")
    assert approve(store, version, approver="ann", reason="again") == digest
    assert approval_count(store) == 1
    assert require_approved(store, version).reason == "looks right"
    record = store.record(digest, kind="approval")
    envelope = json.loads(store.read_blob(record.blobs[ENVELOPE]))
    assert envelope["payloadType"] == "application/vnd.in-toto+json"
    assert verify_log(store) == []


def test_the_one_who_registered_cannot_approve(store: Store, version: Version) -> None:
    identities.set_roles(store, "olive", ["admin", "approver", "engineer"], actor="olive")
    with pytest.raises(Refused, match="olive registered intents@v1"):
        approve(store, version, approver="olive")
    statement = approval_by(store, "olive")
    signed = sealed(store, "olive", statement_of(version, statement))
    with pytest.raises(Refused, match="olive registered intents@v1"):
        submit_approval(store, signed)
    put_approval(store, version, statement, signed)
    with pytest.raises(Refused, match="olive registered intents@v1"):
        require_approved(store, version)


def test_without_the_role_nobody_approves(store: Store, version: Version) -> None:
    identities.add_user(store, "eve", ["engineer", "operator"], actor="olive")
    for user, reason in (("eve", "it takes approver"), ("nobody", "not a user")):
        with pytest.raises(Refused, match=reason):
            approve(store, version, approver=user)
    statement = approval_by(store, "eve")
    put_approval(store, version, statement, sealed(store, "eve", statement_of(version, statement)))
    with pytest.raises(Refused, match="eve may not approve"):
        require_approved(store, version)


def test_one_person_with_two_accounts_cannot_use_one_key(store: Store, version: Version) -> None:
    public = identities.get_user(store, "olive").keys[0].public_key
    with pytest.raises(Refused, match="this key is olive's"):
        keys.enrol_public_key(store, "ann", public.encode(), actor="ann")
    # Nor by writing the table of keys: the owner that the release states is compared.
    with database.writing(store.engine) as session:
        session.execute(update(KeyRow).values(user="ann"))
    os.link(store.root / "keys" / "olive.pem", store.root / "keys" / "ann.pem")
    with pytest.raises(Refused):
        approve(store, version, approver="ann")
    assert any("user ann differs" in problem and "keys" in problem for problem in verify_log(store))


def test_a_role_taken_away_takes_the_approval_with_it(store: Store, version: Version) -> None:
    approve(store, version, approver="ann")
    with store.change("olive", "test.promote", "intents", {}) as session:  # counts at once in its own transaction
        require_approved(store, version, session)
        session.execute(update(UserRow).where(UserRow.name == "ann").values(roles=["operator"]))
        session.expire_all()
        with pytest.raises(Refused):
            require_approved(store, version, session)
    with pytest.raises(Refused, match="ann may not approve"):
        require_approved(store, version)
    identities.set_roles(store, "ann", ["approver"], actor="olive")
    assert require_approved(store, version).approver == "ann"
    identities.deactivate(store, "ann", actor="olive")
    with pytest.raises(Refused, match="ann, who is deactivated"):
        require_approved(store, version)


def test_an_approver_of_another_tenant_does_not_count(store: Store, chain: Chain) -> None:
    version = register(store, name="intents", verdict=chain.verdict, actor="olive", scope=Scope("acme", "eu"))
    identities.add_user(store, "bob", ["approver"], actor="olive", scope=Scope("other"))
    identities.add_user(store, "cat", ["approver"], actor="olive", scope=Scope("acme", "eu"))
    with pytest.raises(Refused, match="may act only within"):
        approve(store, version, approver="bob")
    statement = approval_by(store, "bob")
    put_approval(store, version, statement, sealed(store, "bob", statement_of(version, statement)))
    with pytest.raises(Refused, match="bob does not speak for"):
        require_approved(store, version)
    approve(store, version, approver="cat")
    assert require_approved(store, version).approver == "cat"


def test_an_approval_of_one_digest_is_none_of_another(store: Store, version: Version) -> None:
    approve(store, version, approver="ann")
    other = register(store, name="intents", verdict=put_chain(store, seed=1).verdict, actor="olive")
    with pytest.raises(Refused, match="intents@v2 is not approved"):
        require_approved(store, other)
    with pytest.raises(Refused, match="not the version of that digest"):
        require_approved(store, other.model_copy(update={"digest": version.digest}))
    with pytest.raises(Refused, match="not the version of that digest"):
        require_approved(store, version.model_copy(update={"digest": other.digest}))


def test_a_replayed_approval_does_not_count(store: Store, version: Version) -> None:
    given = store.record(approve(store, version, approver="ann"))
    other = register(store, name="intents", verdict=put_chain(store, seed=1).verdict, actor="olive")
    body = Approval.model_validate(dict(given.body))
    put_approval(store, other, body, store.read_blob(given.blobs[ENVELOPE]))
    with pytest.raises(Refused, match="not about this version"):
        require_approved(store, other)
    notes = verify_version(store, other.label).notes
    assert any("does not count" in note for note in notes)


@pytest.mark.parametrize(
    "attack", ["reason", "decision", "label", "digest", "type", "unsigned", "other key", "spelling", "none"]
)
def test_a_doctored_approval_does_not_count(store: Store, version: Version, attack: str) -> None:
    approval = approval_by(store, "ann")
    statement = statement_of(version, approval)
    if attack == "reason":
        statement["predicate"]["reason"] = "another"
    elif attack == "decision":
        statement["predicate"]["decision"] = "reject"
    elif attack == "label":
        statement["subject"][0]["name"] = "intents@v2"
    elif attack == "digest":
        statement["subject"][0]["digest"]["sha256"] = "0" * 64
    elif attack == "type":
        statement["predicateType"] = "https://slsa.dev/provenance/v1"
    envelope = sealed(store, "olive" if attack == "other key" else "ann", statement)
    document = json.loads(envelope)
    if attack == "unsigned":
        document["signatures"] = []
    if attack == "other key":
        hint = (keys.ensure_key(store, "ann").fingerprint or "").removeprefix("sha256:")
        document["signatures"][0]["keyid"] = hint
    spelled = {"spelling": canonical(document) + b"\n", "none": b"[" * 100_000}.get(attack, canonical(document))
    put_approval(store, version, approval, spelled)
    with pytest.raises(Refused, match="intents@v1 is not approved: "):
        require_approved(store, version)


def test_an_approval_without_audit_entry_does_not_count(store: Store, version: Version) -> None:
    approval = approval_by(store, "ann")
    put_approval(store, version, approval, sealed(store, "ann", statement_of(version, approval)), logged=False)
    with pytest.raises(Refused, match="the audit log has no entry"):
        require_approved(store, version)
    approve(store, version, approver="ann")
    assert require_approved(store, version).approver == "ann"


def test_approving_an_overridden_version_needs_a_reason(store: Store) -> None:
    verdict = put_chain(store, verdict="fail").verdict
    version = register(store, name="intents", verdict=verdict, actor="olive", override="a drill")
    with pytest.raises(UsageError, match=r"were overridden \(a drill\): an approval of it needs a reason"):
        approve(store, version, approver="ann", reason=" ")
    unaware = approval_by(store, "ann", reason="fine")
    put_approval(store, version, unaware, sealed(store, "ann", statement_of(version, unaware)))
    with pytest.raises(Refused, match="not about this version, or not what the record says"):
        require_approved(store, version)
    approve(store, version, approver="ann", reason="only for the drill")
    assert require_approved(store, version).override == "a drill"


def test_what_does_not_verify_is_not_approved(store: Store, version: Version, chain: Chain) -> None:
    path = store.blob_path(store.record(chain.dataset).blobs["train.jsonl"])
    whole = path.read_bytes()
    path.chmod(0o644)
    path.write_bytes(whole + b"{}\n")
    with pytest.raises(Refused, match="does not verify: its bytes"):
        approve(store, version, approver="ann")
    path.write_bytes(whole)
    with database.writing(store.engine) as session:
        session.add(RecallRow(digest=chain.dataset, cause="row x", reason="withdrawn", at=stamp()))
    with pytest.raises(Refused, match="recalled"):
        approve(store, version, approver="ann")


def test_a_recall_or_damage_ends_an_approval(store: Store, version: Version) -> None:
    approve(store, version, approver="ann")
    with database.writing(store.engine) as session:
        session.add(RecallRow(digest=version.digest, cause="x", reason="withdrawn", at=stamp()))
    with pytest.raises(Refused, match="recalled"):
        require_approved(store, version)
    with database.writing(store.engine) as session:
        session.execute(delete(RecallRow))
    (store.root / "versions" / "intents" / "v1" / "model.sig").write_bytes(b"")
    with pytest.raises(Refused, match="not a signature"):
        require_approved(store, version)


# Refusals


def envelope(store: Store, version: Version, user: str, decision: Decision, reason: str = "why") -> bytes:
    known = keys.ensure_key(store, user)
    return sign(prepare_approval(store, version, user, reason, decision), keys.load_signing_key(store, known))


def decide(store: Store, version: Version, user: str, decision: Decision) -> None:
    submit_approval(store, envelope(store, version, user, decision))


def reason_of(store: Store, version: Version, override_by: str | None = None) -> str | None:
    """Why it may not serve, by the database; the files must say the same."""
    with database.reading(store.engine) as session:
        permission = may_serve(session, version, override_by=override_by)
        if override_by is None:
            try:
                require_approved(store, version, session)
            except Refused:
                assert not permission.granted
            else:
                assert permission.granted
    return permission.reason


def test_a_refusal_blocks_until_a_newer_approval(store: Store, version: Version) -> None:
    identities.add_user(store, "cat", ["approver"], actor="olive")
    approve(store, version, approver="ann")
    refused = service.refuse(store, version.label, reason=" names a customer ", actor="cat")
    assert (refused.approver, refused.reason) == ("cat", "names a customer")
    assert reason_of(store, version) == reason_of(store, version, override_by="olive") == "refused"
    with pytest.raises(Refused, match="intents@v1 was refused by cat: names a customer"):
        require_approved(store, version)
    notes = verify_version(store, version.label).notes
    assert [note.split(" on ")[0] for note in notes[-3:]] == [
        "approved by ann", "refused (names a customer) by cat", "no approval in this store counts",
    ]  # fmt: skip
    approve(store, version, approver="ann", reason="the name is made up")
    assert reason_of(store, version) is None
    assert "no approval" not in verify_version(store, version.label).notes[-1]
    assert verify_log(store) == []


def test_a_refusal_needs_a_reason_a_role_and_a_second_person(store: Store, version: Version) -> None:
    with pytest.raises(UsageError, match="needs a reason"):
        prepare_approval(store, version, "ann", "  ", "refuse")
    statement = statement_of(version, approval_by(store, "ann", decision="refuse"))
    with pytest.raises(UsageError, match="needs a reason"):
        submit_approval(store, sealed(store, "ann", statement))
    identities.add_user(store, "eve", ["engineer"], actor="olive")
    for user, problem in (("eve", "it takes approver"), ("olive", "olive may not do this")):
        with pytest.raises(Refused, match=problem):
            prepare_approval(store, version, user, "why", "refuse")
        statement = statement_of(version, approval_by(store, user, decision="refuse", reason="why"))
        with pytest.raises(Refused, match=problem):
            submit_approval(store, sealed(store, user, statement))
    identities.set_roles(store, "olive", ["admin", "approver", "engineer"], actor="olive")
    with pytest.raises(Refused, match="olive registered intents@v1"):
        prepare_approval(store, version, "olive", "why", "refuse")
    assert reason_of(store, version) == "not_approved"


def test_an_older_approval_cannot_be_brought_back(store: Store, version: Version) -> None:
    identities.add_user(store, "cat", ["approver"], actor="olive")
    used, kept = envelope(store, version, "ann", "approve"), envelope(store, version, "cat", "approve")
    submit_approval(store, used)
    decide(store, version, "ann", "refuse")
    for old, problem in (
        (used, "this signed statement was recorded before"),
        (kept, "ann refused the version after this was prepared: why"),
    ):
        with pytest.raises(Refused, match=problem):
            submit_approval(store, old)
    assert reason_of(store, version) == "refused"
    assert approval_count(store) == 1


def test_a_refusal_counts_when_its_approver_has_left_and_not_when_the_key_was_stolen(
    store: Store, version: Version
) -> None:
    identities.add_user(store, "cat", ["approver"], actor="olive")
    approve(store, version, approver="cat")
    before = verify_version(store, version.label).notes
    decide(store, version, "ann", "refuse")
    identities.set_roles(store, "ann", ["operator"], actor="olive")
    assert reason_of(store, version) == "refused"
    identities.deactivate(store, "ann", actor="olive")
    assert reason_of(store, version) == "refused"
    key = identities.get_user(store, "ann").keys[0]
    user_keys.revoke_key(store, "ann", key.label, actor="olive", since=key.enrolled)
    assert lost_signatures(store, {key.fingerprint}) == ([], [], [version.label])
    assert reason_of(store, version) is None
    assert before[-1] in verify_version(store, version.label).notes


@pytest.mark.parametrize("seed", range(2))
def test_any_order_of_decisions_ends_with_the_newest(store: Store, version: Version, seed: int) -> None:
    """Two approvers decide, now and from drawers, in any order: held against a rule of four lines."""
    identities.add_user(store, "cat", ["approver"], actor="olive")
    draw = random.Random(seed)
    drawer: list[tuple[bytes, str, Decision, int]] = []
    log: list[tuple[str, Decision, int]] = []
    recorded: set[bytes] = set()
    for turn in range(14):
        if draw.random() < 0.6 or not drawer:
            user, decision = draw.choice(("ann", "cat")), draw.choice(("approve", "refuse"))
            drawer.append((envelope(store, version, user, decision), user, decision, turn))
        signed, user, decision, prepared = draw.choice(drawer[-3:])
        since = [entry for entry in log if entry[1] != decision]
        standing = log[log.index(since[-1]) + 1 :] if since else log
        if signed in recorded:
            with pytest.raises(Refused, match="was recorded before"):
                submit_approval(store, signed)
        elif user in {who for who, _, _ in standing}:
            submit_approval(store, signed)  # nothing new
        elif since and since[-1][2] >= prepared:
            with pytest.raises(Refused, match="after this was prepared"):
                submit_approval(store, signed)
        else:
            submit_approval(store, signed)
            log.append((user, decision, turn))
            recorded.add(signed)
        expected = {"approve": None, "refuse": "refused"}[log[-1][1]] if log else "not_approved"
        assert reason_of(store, version) == expected
    assert len({decision for _, decision, _ in log}) == 2
    assert verify_log(store) == []
