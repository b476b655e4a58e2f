"""Key pairs: made once, kept private, one a person."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519

from tests.fabricate import approve
from tunesmith.core.errors import Refused, UsageError
from tunesmith.registry.approvals import require_approved
from tunesmith.registry.signing import keys
from tunesmith.registry.versions import Version
from tunesmith.store.people import user_keys
from tunesmith.store.store import Store


def pem(key: ec.EllipticCurvePrivateKey | ed25519.Ed25519PrivateKey) -> bytes:
    return key.public_key().public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)


def test_a_key_pair_is_made_once_and_published(store: Store) -> None:
    made = keys.create_key(store, "ann", actor="ann")
    path = store.root / "keys" / "ann.pem"
    assert path.stat().st_mode & 0o777 == 0o600
    assert path.parent.stat().st_mode & 0o077 == 0
    assert [entry.name for entry in path.parent.iterdir()] == ["ann.pem"]
    assert (store.root / "trust" / "ann.pem").read_text() == made.public_key
    [listed] = json.loads((store.root / "trust" / "keys.json").read_bytes())
    assert (listed["user"], listed["fingerprint"]) == ("ann", made.fingerprint)
    assert "PRIVATE" not in (store.root / "trust" / "keys.json").read_text()
    assert keys.ensure_key(store, "ann").keys == (made,)


def test_nobody_but_an_admin_makes_a_key_for_another(store: Store) -> None:
    with pytest.raises(Refused, match="it takes admin"):
        keys.create_key(store, "olive", actor="ann")
    assert not (store.root / "keys" / "olive.pem").exists()
    keys.create_key(store, "ann", actor="olive")


def test_an_interrupted_enrolment_continues_with_its_key(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(user_keys, "enrol_key", stop)
        with pytest.raises(KeyboardInterrupt):
            keys.create_key(store, "ann", actor="ann")
    made = (store.root / "keys" / "ann.pem").read_bytes()
    keys.create_key(store, "ann", actor="ann")
    assert (store.root / "keys" / "ann.pem").read_bytes() == made


def test_a_key_open_to_others_or_not_the_users_is_not_used(store: Store) -> None:
    ann = keys.ensure_key(store, "ann")
    path = keys.signing_key(store, ann)
    path.chmod(0o640)
    with pytest.raises(Refused, match="open to other users"):
        keys.signing_key(store, ann)
    path.chmod(0o600)
    keys.ensure_key(store, "olive")
    path.write_bytes((store.root / "keys" / "olive.pem").read_bytes())
    with pytest.raises(Refused, match="not the one of ann's public key"):
        keys.signing_key(store, ann)


@pytest.mark.parametrize("content", [b"", b"-----BEGIN PRIVATE KEY-----\nsecret\n-----END PRIVATE KEY-----\n", None])
def test_a_broken_private_key_is_refused_without_quoting_it(store: Store, content: bytes | None) -> None:
    ann = keys.ensure_key(store, "ann")
    path = store.root / "keys" / "ann.pem"
    if content is None:
        key = ec.generate_private_key(ec.SECP384R1())
        content = key.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        )
    path.write_bytes(content)
    with pytest.raises(Refused) as caught:
        keys.signing_key(store, ann)
    assert "secret" not in str(caught.value)


def test_a_public_key_is_enrolled_in_one_spelling(store: Store) -> None:
    public = pem(ec.generate_private_key(ec.SECP256R1()))
    enrolled = keys.enrol_public_key(store, "ann", b"a comment\n" + public.replace(b"\n", b"\r\n"), actor="ann")
    assert enrolled.public_key.encode() == public
    with pytest.raises(Refused, match="this key is ann's"):
        keys.enrol_public_key(store, "olive", public, actor="olive")


def test_other_kinds_of_keys_are_wrong_usage(store: Store) -> None:
    others = [pem(ec.generate_private_key(ec.SECP384R1())), pem(ed25519.Ed25519PrivateKey.generate()), b"", b"x"]
    for public in others:
        with pytest.raises(UsageError):
            keys.enrol_public_key(store, "ann", public, actor="ann")


def test_the_folder_of_private_keys_can_be_ones_own(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TUNESMITH_KEYS", str(tmp_path / "mine"))
    keys.ensure_key(store, "ann")
    assert os.listdir(tmp_path / "mine") == ["ann.pem"]
    assert not (store.root / "keys").exists()


def test_an_openssl_key_signs_from_outside_the_store(
    store: Store, version: Version, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pair = ec.generate_private_key(ec.SECP256R1())
    sec1 = pair.private_bytes(  # what `openssl ecparam -genkey -noout` writes
        serialization.Encoding.PEM, serialization.PrivateFormat.TraditionalOpenSSL, serialization.NoEncryption()
    )
    mine = tmp_path / "mine"
    mine.mkdir(mode=0o700)
    (mine / "ann.pem").write_bytes(sec1)
    (mine / "ann.pem").chmod(0o600)
    keys.enrol_public_key(store, "ann", pem(pair), actor="olive")
    with pytest.raises(Refused, match="the private key is not here"):
        approve(store, version, approver="ann")
    monkeypatch.setenv("TUNESMITH_KEYS", str(mine))
    approve(store, version, approver="ann")
    assert require_approved(store, version).approver == "ann"
    assert not (store.root / "keys" / "ann.pem").exists()
