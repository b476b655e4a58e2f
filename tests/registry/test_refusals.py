"""An approver's signed no, by attack: the newest decision stands, and nothing older brings a version back."""

from __future__ import annotations

import random

import pytest

from tests.fabricate import approve
from tests.registry.test_approvals import approval_by, approval_count, put_approval, sealed
from tunesmith.core.errors import Refused, UsageError
from tunesmith.registry.approvals import prepare_approval, require_approved, sign, submit_approval
from tunesmith.registry.history import lost_signatures, verify_log
from tunesmith.registry.serving import may_serve
from tunesmith.registry.signing import keys
from tunesmith.registry.signing.attestations import Decision, statement_of
from tunesmith.registry.verification import verify_version
from tunesmith.registry.versions import Version
from tunesmith.services.releases import versions as service
from tunesmith.store import database
from tunesmith.store.people import identities, user_keys
from tunesmith.store.store import Store


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
    assert reason_of(store, version) == "refused"
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


def test_a_refusal_prepared_before_an_approval_is_not_taken(store: Store, version: Version) -> None:
    old = envelope(store, version, "ann", "refuse")
    approve(store, version, approver="ann")
    with pytest.raises(Refused, match="ann approved the version after this was prepared"):
        submit_approval(store, old)
    assert reason_of(store, version) is None


def test_no_override_gets_past_a_refusal(store: Store, version: Version) -> None:
    assert reason_of(store, version, override_by="olive") is None
    decide(store, version, "ann", "refuse")
    assert reason_of(store, version, override_by="olive") == "refused"


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


def test_a_refusal_that_was_slipped_into_the_files_does_not_count(store: Store, version: Version) -> None:
    approve(store, version, approver="ann")
    identities.add_user(store, "cat", ["approver"], actor="olive")
    refusal = approval_by(store, "cat", decision="refuse", reason="why")
    put_approval(store, version, refusal, sealed(store, "cat", statement_of(version, refusal)), logged=False)
    assert reason_of(store, version) is None


@pytest.mark.parametrize("seed", range(4))
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
