"""Proposed keys: what waits, who confirms it, and that it signs nothing before."""

from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from tests.acting import do
from tests.commands import call, printed
from tests.fabricate import APPROVER, OWNER, Scene
from tests.rollout.conftest import made, scene, versions
from tunesmith.core.errors import Refused, UsageError
from tunesmith.core.text.names import Scope
from tunesmith.registry.approvals import prepare_approval, submit_approval
from tunesmith.registry.history import verify_log
from tunesmith.registry.signing.attestations import public_pem, seal
from tunesmith.registry.signing.signatures import Untrusted
from tunesmith.registry.versions import Version
from tunesmith.services import users
from tunesmith.store.people.identities import add_user, deactivate, get_user, list_users
from tunesmith.store.people.proposed_keys import waiting_keys
from tunesmith.store.store import Store

__all__ = ["made", "scene", "versions"]


def proposal(store: Store, user: str = APPROVER) -> tuple[ec.EllipticCurvePrivateKey, str]:
    """A new private key, and the fingerprint under which its public half waits."""
    key = ec.generate_private_key(ec.SECP256R1())
    return key, do(store, users.propose_key, actor=user, public_key=public_pem(key.public_key())).fingerprint


def test_a_proposed_key_signs_once_another_person_confirmed_it(scene: Scene, versions: dict[int, Version]) -> None:
    store = scene.store
    key, fingerprint = proposal(store)
    request = prepare_approval(store, versions[4], APPROVER)
    with pytest.raises(Untrusted, match="not trusted here"):
        submit_approval(store, seal(request, key))
    before = (store.root / "trust" / "keys.json").read_bytes()
    add_user(store, "amy", ["admin"], actor=OWNER, scope=Scope("acme"))  # an admin of one tenant only
    for actor, whose, told, why in (
        (APPROVER, APPROVER, fingerprint, "it takes admin"),
        ("amy", APPROVER, fingerprint, "all tenants and regions"),
        (OWNER, "olga", fingerprint, "no key of olga waits"),
        (OWNER, APPROVER, fingerprint[:26], "first 20 digits"),
        (OWNER, APPROVER, "", "first 20 digits"),
        (OWNER, APPROVER, fingerprint + "0", "first 20 digits"),
        (OWNER, APPROVER, "sha256:" + "0" * 64, "no key of bob waits"),
        (OWNER, "nobody", fingerprint, "no key of nobody waits"),
    ):
        with pytest.raises((Refused, UsageError), match=why) as caught:
            do(store, users.confirm_key, actor=actor, user=whose, fingerprint=told)
        assert caught.value.fix or actor != OWNER or "digits" in why
    assert (store.root / "trust" / "keys.json").read_bytes() == before
    spoken = " ".join(fingerprint[7:31][i : i + 4] for i in range(0, 24, 4)).upper()
    done = do(store, users.confirm_key, actor=OWNER, user=APPROVER, fingerprint=spoken)
    assert (done.fingerprint, get_user(store, APPROVER).fingerprint) == (fingerprint, fingerprint)
    assert not waiting_keys(store)
    assert submit_approval(store, seal(request, key)).approval.approver == APPROVER
    assert verify_log(store) == []
    with pytest.raises(Refused, match="this key is bob's"):
        do(store, users.propose_key, actor="olga", public_key=get_user(store, APPROVER).keys[-1].public_key)


def test_proposals_end_are_few_and_of_p256(scene: Scene) -> None:
    store = scene.store
    public = ec.generate_private_key(ec.SECP256K1()).public_key()
    for wrong in (public.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo).decode(), "", "\u202e"):
        with pytest.raises(UsageError):
            do(store, users.propose_key, actor=APPROVER, public_key=wrong)
    _, first = proposal(store)
    prints = [first, *(proposal(store)[1] for _ in range(4))]
    assert [key.fingerprint for key in waiting_keys(store, APPROVER)] == prints
    with pytest.raises(UsageError, match="5 keys of bob wait"):
        proposal(store)
    with pytest.raises(Refused, match="it takes admin"):
        do(store, users.reject_key, actor="olga", user=APPROVER, fingerprint=first)
    do(store, users.reject_key, actor=APPROVER, user=APPROVER, fingerprint=first)  # its own user
    do(store, users.reject_key, actor=OWNER, user=APPROVER, fingerprint=prints[1])
    with pytest.raises(UsageError, match="no key of bob waits"):
        do(store, users.confirm_key, actor=OWNER, user=APPROVER, fingerprint=first)
    _, of_olga = proposal(store, "olga")
    deactivate(store, APPROVER, actor=OWNER)
    assert [key.fingerprint for key in waiting_keys(store)] == [of_olga]
    assert {user.name for user in list_users(store) if user.keys} == {OWNER, APPROVER}
    assert verify_log(store) == []


def test_the_command_line_lists_confirms_and_rejects(scene: Scene, tmp_path: Path) -> None:
    (tmp_path / "store").rename(tmp_path / ".tunesmith")
    store = Store(tmp_path / ".tunesmith", url=f"sqlite:///{tmp_path / '.tunesmith' / 'tunesmith.db'}")
    prints = [proposal(store)[1] for _ in range(2)]
    assert [key["fingerprint"] for key in call(tmp_path, "keys", "list")["proposed"]] == prints
    done = call(tmp_path, "keys", "confirm", APPROVER, prints[0][7:27])
    assert done == {"user": APPROVER, "label": "key-2", "fingerprint": prints[0]}
    assert call(tmp_path, "keys", "reject", APPROVER, prints[1])["fingerprint"] == prints[1]
    assert "proposed" not in printed(tmp_path, "keys", "list")
    store.engine.dispose()
