"""Four eyes and an approver's signed no, by attack: the newest decision stands, nothing older brings a version back."""

import json
import os
import secrets
from collections.abc import Callable
from typing import Any

import pytest
from sqlalchemy import delete, update

from tests.fabricate import Chain, approve, put_chain, put_recall
from tunesmith.core.clock import stamp
from tunesmith.core.digests import canonical
from tunesmith.core.errors import Refused, UsageError
from tunesmith.core.text.names import Scope
from tunesmith.project import parse_settings
from tunesmith.records.version import ApprovalBody, Decision, Requirement
from tunesmith.registry.approvals import LASTS, prepare_approval, require_approved, submit_approval
from tunesmith.registry.history import lost_signatures, verify_log
from tunesmith.registry.registration import register
from tunesmith.registry.risk import RiskSettings, missing
from tunesmith.registry.serving import may_serve
from tunesmith.registry.signing import keys
from tunesmith.registry.signing.attestations import ENVELOPE, seal, statement_of
from tunesmith.registry.verification import verify_version
from tunesmith.registry.versions import Version
from tunesmith.services.versions import approvals_for
from tunesmith.store import audit
from tunesmith.store.audit import Head
from tunesmith.store.people import identities, user_keys
from tunesmith.store.people.roles import Role
from tunesmith.store.people.trust import signature_entry
from tunesmith.store.records import Record
from tunesmith.store.store import Store
from tunesmith.store.tables import AuditRow, KeyRow, RecallRow, UserRow

HIGH = Requirement(risk_class="high", approvers=2, roles=("steward",))
EVERYBODY: dict[str, tuple[Role, ...]] = {
    "ann": ("approver",),
    "cat": ("approver",),
    "stu": ("approver", "steward"),
    "oli": ("approver", "operator", "steward"),
}


def put_approval(
    store: Store,
    version: Version,
    approval: ApprovalBody,
    envelope: bytes,
    *,
    logged: bool = True,
    key: str | None = None,
) -> str:
    """Slip an approval's record into the store as someone who can write it would. key: the approver's newest one."""
    record = Record(
        kind="approval",
        parents={"version": version.digest},
        blobs={ENVELOPE: store.put_bytes(envelope)},
        body=approval.model_dump(mode="json"),
    )
    if not logged:
        return store.put_record(record)
    detail = signature_entry(key or identities.get_user(store, approval.approver).fingerprint or "", record.digest)
    with store.change(approval.approver, "version.approve", version.digest, detail) as session:
        return store.put_record(record, session)


def approval_by(store: Store, user: str, **changes: object) -> ApprovalBody:
    with store.reading() as session:
        stated = {"approver": user, "role": "approver", "decision": "approve", "reason": "", "override": None}
        times = {"at": stamp(), "until": stamp(LASTS), "nonce": secrets.token_hex(16)}
        return ApprovalBody.model_validate({**stated, **times, "audit": audit.newest(session), **changes})


def sealed(store: Store, user: str, statement: object) -> bytes:
    known = keys.ensure_key(store, user)
    return seal(statement, keys.load_signing_key(store, known))  # type: ignore[arg-type]


def slip(store: Store, version: Version, user: str, *, logged: bool = True, **changes: object) -> None:
    """Slip a user's signed approval into the store."""
    approval = approval_by(store, user, **changes)
    put_approval(store, version, approval, sealed(store, user, statement_of(version, approval)), logged=logged)


def approval_count(store: Store) -> int:
    with store.reading() as session:
        return session.query(AuditRow).filter_by(action="version.approve").count()


@pytest.mark.attack("people", "a signed approval sent again, or signed without a nonce")
def test_a_signed_statement_is_recorded_once(store: Store, version: Version) -> None:
    key = keys.load_signing_key(store, keys.ensure_key(store, "ann"))
    requests = [prepare_approval(store, version, "ann", "why", "refuse") for _ in range(2)]
    nonces = {request["predicate"]["nonce"] for request in requests}
    assert len(nonces) == 2
    signed = [seal(request, key) for request in requests]
    submit_approval(store, signed[0])
    first, kept = (envelope(store, version, "ann", "approve") for _ in range(2))
    submit_approval(store, first)  # the refusal no longer stands
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
    submit_approval(store, envelope(store, version, "ann", "refuse"))
    with pytest.raises(Refused, match="was recorded before"):
        submit_approval(store, first)
    with pytest.raises(Refused, match="ann refused the version after this was prepared: why"):
        submit_approval(store, kept)
    assert reason_of(store, version) == "refused"
    assert approval_count(store) == 1
    assert verify_log(store) == []


def test_what_submit_refuses(store: Store, version: Version) -> None:
    for name, roles in (("cat", ["approver"]), ("eve", ["engineer"])):
        identities.add_user(store, name, roles, actor="olive")
    heads = [Head(seq=seq, digest=version.digest) for seq in (10_000, 1)]
    nothing = {"subject": [{"digest": {"sha256": "0" * 64}}], "predicate": {}}
    for user, statement, said in (
        ("cat", approval_by(store, "ann"), "the record says ann, the key is cat's"),
        *(("ann", approval_by(store, "ann", audit=head), "prepared on another audit log") for head in heads),
        ("ann", approval_by(store, "ann", decision="refuse"), "needs a reason"),
        ("eve", approval_by(store, "eve"), "it takes approver"),
        ("eve", approval_by(store, "eve", decision="refuse", reason="why"), "it takes approver"),
        *(("ann", each, "not an approval") for each in ({}, [], "text", nothing)),
    ):
        stated = statement_of(version, statement) if isinstance(statement, ApprovalBody) else statement
        with pytest.raises((Refused, UsageError), match=said):
            submit_approval(store, sealed(store, user, stated))
    with pytest.raises(UsageError, match="needs a reason"):
        prepare_approval(store, version, "ann", "  ", "refuse")
    for user, said in (("eve", "it takes approver"), ("olive", "olive may not do this"), ("nobody", "not a user")):
        with pytest.raises(Refused, match=said):
            prepare_approval(store, version, user, "why", "refuse")
    signed = envelope(store, version, "ann", "approve")
    identities.set_roles(store, "ann", ["operator"], actor="olive")
    with pytest.raises(Refused, match="ann may not do this"):
        submit_approval(store, signed)
    identities.set_roles(store, "ann", ["approver"], actor="olive")
    put_recall(store, version.digest)
    with pytest.raises(Refused, match="recalled: consent withdrawn"):
        submit_approval(store, signed)
    assert approval_count(store) == 0


def test_who_may_not_approve_does_not_count_whichever_way(store: Store, version: Version, chain: Chain) -> None:
    """Not by preparing, not by a signed statement, and not by a record that was slipped into the store."""
    theirs = register(store, name="intents", verdict=chain.verdict, actor="olive", scope=Scope("acme", "eu"))
    identities.set_roles(store, "olive", ["admin", "approver", "engineer"], actor="olive")
    identities.add_user(store, "eve", ["engineer", "operator"], actor="olive")
    identities.add_user(store, "bob", ["approver"], actor="olive", scope=Scope("other"))
    identities.add_user(store, "cat", ["approver"], actor="olive", scope=Scope("acme", "eu"))
    for user, at, said, later in (
        ("olive", version, "olive registered intents@v1", "olive registered intents@v1"),
        ("eve", version, "it takes approver", "eve may not approve"),
        ("bob", theirs, "may act only within", "bob does not speak for"),
    ):
        for decision in ("approve", "refuse"):
            with pytest.raises(Refused, match=said):
                prepare_approval(store, at, user, "why", decision)  # type: ignore[arg-type]
        with pytest.raises(Refused, match=said):
            submit_approval(store, sealed(store, user, statement_of(at, approval_by(store, user))))
        slip(store, at, user)
        with pytest.raises(Refused, match=later):
            require_approved(store, at)
    approve(store, theirs, approver="cat")
    assert require_approved(store, theirs).approver == "cat"
    slip(store, version, "ann", logged=False)
    with pytest.raises(Refused, match="the audit log has no entry"):
        require_approved(store, version)
    approve(store, version, approver="ann")
    assert require_approved(store, version).approver == "ann"


def test_an_approval_of_one_version_is_none_of_another(store: Store, version: Version) -> None:
    given = store.record(approve(store, version, approver="ann"))
    assert store.record(approve(store, version, approver="ann", reason="again")) == given, "once is enough"
    other = register(store, name="intents", verdict=put_chain(store, seed=1).verdict, actor="olive")
    with pytest.raises(Refused, match="intents@v2 is not approved"):
        require_approved(store, other)
    for forged in (
        other.model_copy(update={"digest": version.digest}),
        version.model_copy(update={"digest": other.digest}),
        version.model_copy(update={"risk": HIGH}),
    ):
        with pytest.raises(Refused, match="not the version of that digest"):
            require_approved(store, forged)
    body = ApprovalBody.of(given)
    put_approval(store, other, body, store.read_blob(given.blobs[ENVELOPE]))
    with pytest.raises(Refused, match="not about this version"):
        require_approved(store, other)
    assert any("does not count" in note for note in verify_version(store, other.label).notes)


def test_an_overridden_version_is_approved_with_a_reason_by_who_knows(store: Store) -> None:
    verdict = put_chain(store, verdict="fail").verdict
    version = register(store, name="intents", verdict=verdict, actor="olive", override="a drill")
    with pytest.raises(UsageError, match=r"were overridden \(a drill\): an approval of it needs a reason"):
        approve(store, version, approver="ann", reason=" ")
    slip(store, version, "ann", reason="fine")
    with pytest.raises(Refused, match="not about this version, or not what the record says"):
        require_approved(store, version)
    approve(store, version, approver="ann", reason="only for the drill")
    assert require_approved(store, version).override == "a drill"


def test_damage_or_a_recall_prevents_and_ends_an_approval(store: Store, version: Version, chain: Chain) -> None:
    path = store.blob_path(store.record(chain.dataset).blobs["train.jsonl"])
    whole = path.read_bytes()
    path.chmod(0o644)
    path.write_bytes(whole + b"{}\n")
    with pytest.raises(Refused, match="does not verify: its bytes"):
        approve(store, version, approver="ann")
    path.write_bytes(whole)
    for digest, use in (
        (chain.dataset, lambda: approve(store, version, approver="ann")),
        (version.digest, lambda: require_approved(store, version)),
    ):
        put_recall(store, digest)
        with pytest.raises(Refused, match="recalled"):
            use()
        with store.writing() as session:
            session.execute(delete(RecallRow))
        approve(store, version, approver="ann")
    (store.root / "versions" / "intents" / "v1" / "model.sig").write_bytes(b"")
    with pytest.raises(Refused, match="not a signature"):
        require_approved(store, version)


def test_one_person_with_two_accounts_cannot_use_one_key(store: Store, version: Version) -> None:
    public = identities.get_user(store, "olive").keys[0].public_key
    with pytest.raises(Refused, match="this key is olive's"):
        keys.enrol_public_key(store, "ann", public.encode(), actor="ann")
    # Nor by writing the table of keys: the owner that the release states is compared.
    with store.writing() as session:
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


DOCTORED: dict[str, Callable[[Any], object]] = {
    "reason": lambda stated: stated["predicate"].update(reason="another"),
    "decision": lambda stated: stated["predicate"].update(decision="reject"),
    "label": lambda stated: stated["subject"][0].update(name="intents@v2"),
    "digest": lambda stated: stated["subject"][0]["digest"].update(sha256="0" * 64),
    "type": lambda stated: stated.update(predicateType="https://slsa.dev/provenance/v1"),
}


@pytest.mark.parametrize("attack", [*DOCTORED, "unsigned", "other key", "spelling", "none"])
def test_a_doctored_approval_does_not_count(store: Store, version: Version, attack: str) -> None:
    approval = approval_by(store, "ann")
    statement = statement_of(version, approval)
    DOCTORED.get(attack, lambda _: None)(statement)
    document = json.loads(sealed(store, "olive" if attack == "other key" else "ann", statement))
    if attack == "unsigned":
        document["signatures"] = []
    if attack == "other key":
        hint = (keys.ensure_key(store, "ann").fingerprint or "").removeprefix("sha256:")
        document["signatures"][0]["keyid"] = hint
    spelled = {"spelling": canonical(document) + b"\n", "none": b"[" * 100_000}.get(attack, canonical(document))
    put_approval(store, version, approval, spelled)
    with pytest.raises(Refused, match="intents@v1 is not approved: "):
        require_approved(store, version)


# Refusals


def envelope(store: Store, version: Version, user: str, decision: Decision, reason: str = "why") -> bytes:
    known = keys.ensure_key(store, user)
    return seal(prepare_approval(store, version, user, reason, decision), keys.load_signing_key(store, known))


def reason_of(store: Store, version: Version, override_by: str | None = None) -> str | None:
    """Why it may not serve, by the database; the files must say the same."""
    with store.reading() as session:
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
    approve(store, version, approver="cat", reason=" names a customer ", decision="refuse")
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


def test_a_refusal_counts_when_its_approver_has_left_and_not_when_the_key_was_stolen(
    store: Store, version: Version
) -> None:
    identities.add_user(store, "cat", ["approver"], actor="olive")
    approve(store, version, approver="cat")
    before = verify_version(store, version.label).notes
    submit_approval(store, envelope(store, version, "ann", "refuse"))
    identities.set_roles(store, "ann", ["operator"], actor="olive")
    assert reason_of(store, version) == "refused"
    identities.deactivate(store, "ann", actor="olive")
    assert reason_of(store, version) == "refused"
    key = identities.get_user(store, "ann").keys[0]
    user_keys.revoke_key(store, "ann", key.label, actor="olive", since=key.enrolled)
    assert lost_signatures(store, {key.fingerprint}) == ([], [], [version.label])
    assert reason_of(store, version) is None
    assert before[-1] in verify_version(store, version.label).notes


# Risk classes: a version serves exactly if those who approved it since its last refusal fill every place


@pytest.fixture
def high(store: Store, chain: Chain) -> Version:
    for name, roles in EVERYBODY.items():
        if name != "ann":
            identities.add_user(store, name, roles, actor="olive")
    return register(store, name="intents", verdict=chain.verdict, actor="olive", risk=HIGH)


def test_a_requirement_says_who_is_missing() -> None:
    assert missing(None, {}) == ("1 more approver",)
    assert missing(HIGH, {}) == ("1 more approver with the role steward", "1 more approver")
    assert missing(HIGH, {"ann": ("approver",)}) == ("1 more approver with the role steward",)
    assert missing(HIGH, {"stu": ("approver", "steward")}) == ("1 more approver",)
    two = Requirement(risk_class="high", approvers=4, roles=("steward", "steward"))
    assert missing(two, {}) == ("2 more approvers with the role steward", "2 more approvers")
    both = Requirement(risk_class="high", approvers=2, roles=("operator", "steward"))
    for first, second in (("stu", "oli"), ("oli", "stu")):  # oli leaves the steward's place to stu, or moves away
        assert missing(both, {name: EVERYBODY[name] for name in (first, second)}) == ()
    stewards = both.model_copy(update={"roles": ("steward", "operator")})
    assert missing(stewards, {name: EVERYBODY[name] for name in ("oli", "stu")}) == ()
    assert missing(both, {"oli": EVERYBODY["oli"]}) == ("1 more approver with the role steward",)
    assert missing(both, {"ann": EVERYBODY["ann"], "cat": EVERYBODY["cat"], "oli": EVERYBODY["oli"]}) == (
        "1 more approver with the role steward",
    )


def test_one_person_fills_one_place_whatever_their_roles(store: Store, high: Version) -> None:
    approve(store, high, approver="stu")
    assert reason_of(store, high, override_by="olive") is None
    second = keys.create_key(store, "stu", actor="stu", label="second")
    statement = statement_of(high, again := approval_by(store, "stu"))
    signed = sealed(store, "stu", statement)
    assert second.label != identities.get_user(store, "stu").keys[0].label
    assert submit_approval(store, signed).approval.approver == "stu"
    put_approval(store, high, again, signed)  # even recorded with an entry of the log
    assert reason_of(store, high) == "not_approved"
    with pytest.raises(Refused, match="intents@v1 is not approved: needs 1 more approver") as refused:
        require_approved(store, high)
    assert "ask another person to approve it" in str(refused.value.fix)
    approve(store, high, approver="cat")
    assert reason_of(store, high) is None
    submit_approval(store, envelope(store, high, "ann", "refuse"))
    submit_approval(store, envelope(store, high, "stu", "approve"))
    assert reason_of(store, high) == "refused", "what was said before the refusal does not count"
    submit_approval(store, envelope(store, high, "cat", "approve"))
    assert reason_of(store, high) is None
    identities.set_roles(store, "stu", ["approver"], actor="olive")
    assert reason_of(store, high) == "refused"


def test_the_class_is_the_versions_not_the_projects(store: Store, chain: Chain, high: Version) -> None:
    again = register(store, name="intents", verdict=chain.verdict, actor="olive", risk=HIGH)
    assert again == high
    lower = RiskSettings.model_validate({"class": "low"}).requirement
    looser = register(store, name="intents", verdict=chain.verdict, actor="olive", risk=lower)
    assert (looser.label, looser.number, high.number) == ("intents@v2", 2, 1)
    approve(store, high, approver="ann")
    approve(store, looser, approver="ann")
    assert reason_of(store, high) == "not_approved"
    assert approvals_for(store, looser).missing == ()
    assert high.risk == HIGH
    assert verify_log(store) == []


def test_what_a_project_may_state() -> None:
    def of(**stated: object) -> Requirement:
        return RiskSettings.model_validate(stated).requirement

    assert of(**{"class": "low"}) == Requirement(risk_class="low", approvers=1)
    assert of(**{"class": "limited"}) == Requirement(risk_class="limited", approvers=2)
    assert of(**{"class": "high"}) == HIGH
    assert of(**{"class": "high", "approvers": 3, "roles": ["steward", "operator"]}).roles == ("operator", "steward")
    head = "name: x\nbase: y\ndata: {sources: [{path: a.jsonl, licence: MIT}]}\ncandidates: {a: {}}\nrisk: "
    for stated, problem in (
        ("{class: unacceptable}", "low"),
        ("{class: high, approvers: 1}", "the class high takes 2 or more"),
        ("{class: low, roles: [steward, operator]}", "2 roles need as many approvers, not 1"),
        ("{class: low, roles: [king]}", "steward"),
        ("{approvers: 2}", "class"),
    ):
        with pytest.raises(UsageError, match=problem):
            parse_settings(head + stated, "tunesmith.yaml")
