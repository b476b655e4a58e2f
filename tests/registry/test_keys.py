"""Key pairs: made once, kept private, one a person."""

import json
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519
from sqlalchemy import select

from tests.acting import do
from tests.attack_table import Happened
from tests.fabricate import approve, put_chain
from tests.registry.test_approvals import put_approval
from tunesmith.core import clock
from tunesmith.core.clock import now
from tunesmith.core.digests import canonical
from tunesmith.core.errors import Refused, UsageError
from tunesmith.records.version import ApprovalBody
from tunesmith.registry.approvals import prepare_approval, require_approved, submit_approval
from tunesmith.registry.history import verify_log
from tunesmith.registry.opening import verified_copy
from tunesmith.registry.registration import register
from tunesmith.registry.serving import Permission, may_serve
from tunesmith.registry.signing import keys
from tunesmith.registry.signing.attestations import ENVELOPE, key_statement, seal
from tunesmith.registry.signing.signatures import SIGNATURE, Untrusted, sign_folder
from tunesmith.registry.verification import verify_version
from tunesmith.registry.versions import Version
from tunesmith.services.users import revoke_key
from tunesmith.store import audit
from tunesmith.store.people import identities, user_keys
from tunesmith.store.people.user_keys import Proof
from tunesmith.store.store import Store
from tunesmith.store.tables import AuditRow


def pem(key: ec.EllipticCurvePrivateKey | ed25519.Ed25519PrivateKey) -> bytes:
    return key.public_key().public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)


def private(key: ec.EllipticCurvePrivateKey, form: serialization.PrivateFormat) -> bytes:
    return key.private_bytes(serialization.Encoding.PEM, form, serialization.NoEncryption())


def test_a_key_pair_is_made_once_and_published(store: Store) -> None:
    with pytest.raises(Refused, match="it takes admin"):
        keys.create_key(store, "olive", actor="ann")
    made = keys.create_key(store, "ann", actor="ann")
    path = store.root / "keys" / "ann.pem"
    assert path.stat().st_mode & 0o777 == 0o600
    assert path.parent.stat().st_mode & 0o077 == 0
    assert [entry.name for entry in path.parent.iterdir()] == ["ann.pem"]
    assert (store.root / "trust" / "ann.pem").read_text() == made.public_key
    [listed] = json.loads((store.root / "trust" / "keys.json").read_bytes())
    assert (listed["user"], listed["fingerprint"]) == ("ann", made.fingerprint)
    assert "PRIVATE" not in (store.root / "trust" / "keys.json").read_text()
    ann = keys.ensure_key(store, "ann")
    assert ann.keys == (made,)

    path.chmod(0o640)
    with pytest.raises(Refused, match="open to other users"):
        keys.signing_key(store, ann)
    path.chmod(0o600)
    keys.create_key(store, "olive", actor="olive")
    for content, why in (
        ((store.root / "keys" / "olive.pem").read_bytes(), "not the one of ann's public key"),
        (b"-----BEGIN PRIVATE KEY-----\nsecret\n-----END PRIVATE KEY-----\n", None),
        (private(ec.generate_private_key(ec.SECP384R1()), serialization.PrivateFormat.PKCS8), None),
    ):
        path.write_bytes(content)
        with pytest.raises(Refused, match=why) as caught:
            keys.signing_key(store, ann)
        assert "secret" not in str(caught.value)


def test_keys_made_elsewhere_sign_under_any_label_and_from_any_folder(
    store: Store, version: Version, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """ann signs with the newest active key whose private half is here."""
    keys.ensure_key(store, "ann")
    pair = ec.generate_private_key(ec.SECP256R1())
    made = keys.enrol_public_key(store, "ann", pem(pair), actor="ann", label="card")
    assert keys.signing_key(store, identities.get_user(store, "ann")).name == "ann.pem"  # the new one is not here
    mine = tmp_path / "mine"
    mine.mkdir(mode=0o700)
    monkeypatch.setenv("TUNESMITH_KEYS", str(mine))
    with pytest.raises(Refused, match="the private key is not here"):
        approve(store, version, approver="ann")
    form = serialization.PrivateFormat.TraditionalOpenSSL  # what `openssl ecparam -genkey -noout` writes
    (mine / "ann@card.pem").write_bytes(private(pair, form))
    (mine / "ann@card.pem").chmod(0o600)
    approve(store, version, approver="ann")
    assert require_approved(store, version).approver == "ann"
    with store.reading() as session:
        entry = session.scalars(select(AuditRow).where(AuditRow.action == "version.approve")).one()
    assert entry.detail["signature"]["key"] == made.fingerprint
    assert sorted(file.name for file in (store.root / "trust").iterdir()) == [
        "ann.pem", "ann@card.pem", "keys.json", "olive.pem",
    ]  # fmt: skip


def test_public_keys_are_p256_keys_in_one_spelling(store: Store) -> None:
    public = pem(ec.generate_private_key(ec.SECP256R1()))
    enrolled = keys.enrol_public_key(store, "ann", b"a comment\n" + public.replace(b"\n", b"\r\n"), actor="ann")
    assert enrolled.public_key.encode() == public
    for other in (pem(ec.generate_private_key(ec.SECP384R1())), pem(ed25519.Ed25519PrivateKey.generate()), b"x"):
        with pytest.raises(UsageError):
            keys.enrol_public_key(store, "ann", other, actor="ann")


# Keys that are replaced or stolen: what an old key signed before its end counts, what it signs after does not


def serving(store: Store, version: Version) -> Permission:
    with store.reading() as session:
        return may_serve(session, version)


def rotate(store: Store, user: str) -> None:
    """Replace a user's key-1 by key-2, by themself."""
    keys.ensure_key(store, user)
    keys.create_key(store, user, actor=user)
    keys.retire_key(store, user, "key-1", actor=user)


def another(store: Store, seed: int) -> Version:
    return register(store, name="intents", verdict=put_chain(store, seed=seed).verdict, actor="olive")


def head(store: Store) -> int:
    with store.reading() as session:
        return audit.newest(session).seq


@pytest.fixture
def at(monkeypatch: pytest.MonkeyPatch) -> Callable[[float], datetime]:
    """Set the clock that the audit log reads, in hours from noon."""
    noon = datetime(2031, 5, 6, 12, tzinfo=UTC)

    def set_clock(hours: float) -> datetime:
        moment = noon + timedelta(hours=hours)
        monkeypatch.setattr(clock, "now", lambda: moment)
        monkeypatch.setattr(user_keys, "now", lambda: moment)
        return moment

    return set_clock


@pytest.mark.attack("signing", "a retired key signs a version or an approval")
def test_a_retired_key_counts_for_what_it_signed_before_alone(
    store: Store, version: Version, happened: Happened
) -> None:
    approve(store, version, approver="ann")
    waiting = another(store, 1)
    prepared = prepare_approval(store, waiting, "ann")
    first = identities.get_user(store, "ann").fingerprint
    old = seal(prepared, keys.load_signing_key(store, identities.get_user(store, "ann")))
    signer = keys.signing_key(store, identities.get_user(store, "olive"))
    rotate(store, "ann")
    rotate(store, "olive")
    assert serving(store, version).granted
    assert require_approved(store, version).approver == "ann"
    with verified_copy(store, version) as loaded:
        assert loaded.version == version
    offline = verify_version(store, version.label)
    assert (offline.ok, any("approved by ann" in note for note in offline.notes)) == (True, True)
    assert register(store, name="intents", verdict=version.verdict, actor="olive") == version, "whichever key signed it"
    newer = another(store, 2)
    approve(store, newer, approver="ann")
    assert serving(store, newer).granted
    assert verify_version(store, newer.label).ok
    assert verify_log(store) == []

    # An approval that was prepared and signed before, but submitted after.
    with pytest.raises(Untrusted, match="ann's key key-1, which was retired before"):
        submit_approval(store, old)
    # The same, put into the store and its log by somebody who can write both.
    put_approval(store, waiting, ApprovalBody.model_validate(prepared["predicate"]), old, key=first)
    assert "which was retired before" in serving(store, waiting).message
    with pytest.raises(Refused, match="which was retired before"):
        require_approved(store, waiting)
    # The signature of the version, replaced by one of the old key.
    folder = store.version_folder(newer.ref)
    (folder / SIGNATURE).unlink()
    sign_folder(folder, signer)
    with pytest.raises(Untrusted, match="olive's key key-1, which was retired before"), verified_copy(store, newer):
        pass
    assert not verify_version(store, newer.label).ok
    happened("refused", 4)


@pytest.mark.attack("signing", "an old signature is passed off as the new key's")
def test_an_old_signature_is_not_the_new_keys(store: Store, version: Version, happened: Happened) -> None:
    approve(store, version, approver="ann")
    with store.reading() as session:
        entry = session.scalars(select(AuditRow).where(AuditRow.action == "version.approve")).one()
    old = store.record(entry.detail["signature"]["digest"])
    rotate(store, "ann")
    rotate(store, "olive")
    new = {name: identities.get_user(store, name).fingerprint or "" for name in ("ann", "olive")}
    envelope = json.loads(store.read_blob(old.blobs[ENVELOPE]))
    envelope["signatures"][0]["keyid"] = new["ann"].removeprefix("sha256:")
    with pytest.raises(Refused, match="the signature is not ann's"):
        submit_approval(store, canonical(envelope))
    path = store.version_folder(version.ref) / SIGNATURE
    bundle = json.loads(path.read_bytes())
    bundle["verificationMaterial"]["publicKey"]["hint"] = new["olive"].removeprefix("sha256:")
    path.write_bytes(canonical(bundle))
    with pytest.raises(Refused, match="the signature is not olive's"), verified_copy(store, version):
        pass
    happened("refused", 2)


@pytest.mark.attack("signing", "a stolen key is revoked from a time on, back-dated")
def test_a_stolen_key_is_revoked_from_a_time_on(
    store: Store, version: Version, at: Callable[[float], datetime], happened: Happened
) -> None:
    at(0)
    approve(store, version, approver="ann")  # noon
    at(1)
    second = another(store, 1)
    approve(store, second, approver="ann")
    theft = at(2)
    third = another(store, 2)
    approve(store, third, approver="ann")
    at(3)
    approve(store, another(store, 3), approver="ann")
    at(8)
    ended = do(store, revoke_key, user="olive", label="key-1", since=theft.isoformat())
    assert ended.invalidated == ("intents@v3", "intents@v4")
    assert serving(store, version).granted
    assert serving(store, second).granted
    for label in ("intents@v1", "intents@v2"):
        assert verify_version(store, label).ok
    assert serving(store, third).reason == "signer"
    assert not verify_version(store, "intents@v3").ok
    # Back-dated once more: further versions stop serving. It cannot be taken back.
    ended = do(store, revoke_key, user="olive", label="key-1", since=at(0.5).isoformat())
    at(9)
    assert ended.invalidated == ("intents@v2", "intents@v3", "intents@v4")
    assert (serving(store, version).granted, serving(store, second).reason) == (True, "signer")
    with pytest.raises(UsageError, match="already"):
        do(store, revoke_key, user="olive", label="key-1", since=theft.isoformat())
    # An approval by a stolen key: the same rule.
    ended = do(store, revoke_key, user="ann", label="key-1", since=at(0.2).isoformat())
    assert ended.unapproved == ("intents@v2", "intents@v3", "intents@v4")
    assert serving(store, version).granted
    # With a new key, the same verdict is the next version.
    keys.create_key(store, "olive", actor="olive")
    again = register(store, name="intents", verdict=second.verdict, actor="olive")
    assert again.label == "intents@v5"
    assert verify_log(store) == []
    happened("stopped serving", 3)
    happened("went on, as signed before", 1)


@pytest.mark.attack("signing", "the clock is set back while a stolen key signs")
def test_a_clock_set_back_does_not_help_a_thief(
    store: Store, version: Version, at: Callable[[float], datetime], happened: Happened
) -> None:
    at(0)
    approve(store, version, approver="ann")
    theft = at(2)
    at(-20)  # the thief sets the clock back before they sign
    stolen = another(store, 1)
    approve(store, stolen, approver="ann")
    at(8)
    ended = do(store, revoke_key, user="olive", label="key-1", since=theft.isoformat())
    assert ended.invalidated == ("intents@v2",)
    # A clock that was set back for a while long before does not void what came between.
    ended = do(store, revoke_key, user="ann", label="key-1", since=at(5).isoformat())
    assert ended.unapproved == ("intents@v2",)
    assert serving(store, version).reason is None
    happened("does not count", 2)


@pytest.mark.attack("people", "a thief enrols a key of their own with a stolen key")
def test_a_key_enrolled_by_a_thief_falls_with_the_stolen_one(
    store: Store, version: Version, happened: Happened
) -> None:
    identities.add_user(store, "eve", ["engineer"], actor="olive")
    keys.ensure_key(store, "eve")
    entry = head(store) + 1
    keys.create_key(store, "eve", actor="eve", label="thief")
    (store.root / "keys" / "eve.pem").unlink()
    keys.create_key(store, "eve", actor="eve", label="second")  # proved with the thief's key
    stolen = register(store, name="other", verdict=put_chain(store, seed=5).verdict, actor="eve")
    for wrong in ("0", "100000", "yesterday", "2031-01-01T00:00:00", (now() + timedelta(days=1)).isoformat()):
        with pytest.raises(UsageError):
            do(store, revoke_key, user="eve", label="key-1", since=wrong)
    ended = do(store, revoke_key, user="eve", label="key-1", since=str(entry))
    assert (ended.until, ended.also_revoked, ended.invalidated) == (entry, ("thief", "second"), (stolen.label,))
    assert serving(store, stolen).reason == "signer"
    with pytest.raises(Refused, match="all keys of eve were retired or revoked"):
        keys.ensure_key(store, "eve")
    assert verify_log(store) == []
    happened("revoked too", 2)


@pytest.mark.attack("people", "a thief enrols keys as an admin whose key was stolen")
def test_keys_that_a_thief_gave_as_an_admin_are_named(store: Store, happened: Happened) -> None:
    def drawn() -> str:
        return pem(ec.generate_private_key(ec.SECP256R1())).decode()

    keys.ensure_key(store, "olive")
    user_keys.enrol_key(store, "ann", drawn(), actor="olive", label="before")
    entry = head(store) + 1
    keys.create_key(store, "olive", actor="olive", label="proven")
    user_keys.enrol_key(store, "olive", drawn(), actor="olive", label="own")
    user_keys.enrol_key(store, "ann", drawn(), actor="olive", label="hers")
    identities.add_user(store, "eve", ["approver"], actor="olive", public_key=drawn())
    identities.add_user(store, "zoe", ["approver"], actor="olive")
    ended = do(store, revoke_key, user="olive", label="key-1", since=str(entry))
    assert ended.also_revoked == ("proven",)
    assert ended.to_look_at == tuple(
        f"{key} (entry {entry + number})"
        for number, key in enumerate(("own of olive", "hers of ann", "key-1 of eve"), 1)
    )
    assert identities.get_user(store, "eve").active_keys, "named, not revoked"
    happened("named", 3)


@pytest.mark.attack("people", "somebody changes a user's keys without holding one")
def test_only_a_holder_of_an_active_key_or_an_admin_changes_keys(
    store: Store, monkeypatch: pytest.MonkeyPatch, happened: Happened
) -> None:
    keys.ensure_key(store, "ann")
    keys.ensure_key(store, "olive")
    monkeypatch.setenv("TUNESMITH_KEYS", str(store.root / "elsewhere"))
    tries: list[Callable[[], object]] = [
        lambda: keys.create_key(store, "ann", actor="ann"),
        lambda: keys.retire_key(store, "ann", "key-1", actor="ann"),
        lambda: keys.retire_key(store, "olive", "key-1", actor="ann"),
        lambda: do(store, revoke_key, user="ann", label="key-1", since="1", actor="ann"),
        lambda: do(store, revoke_key, user="olive", label="key-1", since="1", actor="ann"),
        lambda: user_keys.retire_key(store, "ann", "key-1", actor="ann"),
    ]
    stranger = identities.get_user(store, "olive").fingerprint or ""
    tries.append(lambda: user_keys.retire_key(store, "ann", "key-1", actor="ann", proof=Proof(stranger, "{}")))
    for attempt in tries:
        with pytest.raises(Refused):
            attempt()
    assert not (store.root / "elsewhere").exists()
    happened("refused", len(tries))
    keys.create_key(store, "ann", actor="olive")  # an admin may
    keys.retire_key(store, "ann", "key-1", actor="olive")
    monkeypatch.delenv("TUNESMITH_KEYS")
    with pytest.raises(Refused, match="ann's key key-1 was retired"):
        keys.create_key(store, "ann", actor="ann")  # only the retired private key is here


def test_a_changed_proof_shows_in_the_log(store: Store) -> None:
    rotate(store, "ann")
    assert verify_log(store) == []
    key = keys.load_signing_key(store, identities.get_user(store, "ann"))
    detail = {"proof": seal(key_statement("ann", "user.key", "other", "sha256:" + "0" * 64), key).decode()}
    user = {"user": store_state(store, "ann")}
    with store.change("ann", "user.key", "ann", {**detail, **user, "key": "sha256:" + "1" * 64, "label": "other"}):
        pass
    with store.change("ann", "user.key", "ann", {**user, "proof": "{}"}):
        pass
    first, second = verify_log(store)
    assert "is not of this change" in first
    assert "does not hold" in second


def store_state(store: Store, name: str) -> dict[str, object]:
    with store.reading() as session:
        return identities.state(identities.user_row(session, name))


@pytest.mark.attack("people", "an old or another user's key is enrolled again")
def test_a_key_is_enrolled_once_for_ever(store: Store, happened: Happened) -> None:
    old = keys.create_key(store, "ann", actor="ann")
    rotate(store, "ann")
    public = identities.get_user(store, "ann").keys[1].public_key
    identities.add_user(store, "eve", ["approver"], actor="olive")
    for user, key, what in (
        ("eve", old.public_key, "this key is ann's and was retired"),
        ("ann", old.public_key, "this key is ann's and was retired"),
        ("eve", public, "this key is ann's"),
        ("ann", public, "this key is ann's"),
    ):
        with pytest.raises(Refused, match=what):
            keys.enrol_public_key(store, user, key.encode(), actor="olive", label="again")
    with pytest.raises(UsageError, match="has a key key-1 already"):
        keys.create_key(store, "ann", actor="ann", label="key-1")
    happened("refused", 4)
