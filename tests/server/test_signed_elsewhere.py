"""Signatures that were made elsewhere: which the server takes, and that other software verifies what it records."""

from __future__ import annotations

import base64
import json
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.utils import decode_dss_signature
from securesystemslib.dsse import Envelope
from securesystemslib.exceptions import VerificationError
from securesystemslib.signer import CryptoSigner, SSlibKey  # type: ignore[attr-defined]

from tests.fabricate import NAME, OWNER
from tests.server.conftest import Served
from tests.server.test_decisions import Approver
from tunesmith.core.clock import stamp
from tunesmith.core.digests import canonical
from tunesmith.registry.signing.attestations import ENVELOPE, signed_bytes
from tunesmith.registry.signing.keys import fingerprint_of
from tunesmith.store.people.user_keys import revoke_key


@pytest.fixture
def ada(served: Served, tmp_path: Path) -> Approver:
    return Approver(served, "ada", tmp_path)


def halves(der: bytes) -> tuple[bytes, bytes]:
    r, s = decode_dss_signature(der)
    return r.to_bytes(32, "big"), s.to_bytes(32, "big")


def said(ada: Approver, signed: dict[str, Any], signature: bytes | None = None) -> tuple[int, str]:
    """How the server answers. signature: in place of the right one."""
    if signature is not None:
        signed = {**signed, "signature": base64.b64encode(signature).decode()}
    answer = ada.submit(signed)
    return answer.status_code, answer.json().get("error", {}).get("message", "")


def test_other_software_verifies_what_is_recorded(served: Served, ada: Approver) -> None:
    prepared = ada.prepare(f"{NAME}@v1", "refuse", reason="why").json()
    answer = ada.submit(ada.signed(prepared)).json()
    store = served.scene.store
    document = json.loads(store.read_blob(store.record(answer["record"]).blobs[ENVELOPE]))
    public = ada.key.public_key()
    keyid = fingerprint_of(ada.key).removeprefix("sha256:")
    envelope = Envelope.from_dict(document)
    assert envelope.verify([SSlibKey.from_crypto(public, keyid=keyid)], threshold=1).keys() == {keyid}
    assert json.loads(envelope.payload) == prepared["statement"]
    other = ec.generate_private_key(ec.SECP256R1()).public_key()
    with pytest.raises(VerificationError):
        envelope.verify([SSlibKey.from_crypto(other, keyid=keyid)], threshold=1)
    # And the other way round: what that software signs is taken here.
    prepared = ada.prepare(f"{NAME}@v1", "approve").json()
    made = Envelope(canonical(prepared["statement"]), "application/vnd.in-toto+json", {})
    signature = made.sign(CryptoSigner(ada.key, SSlibKey.from_crypto(public, keyid=keyid)))
    assert said(ada, ada.signed(prepared), bytes.fromhex(signature.signature))[0] == 200


def test_a_signature_in_the_wrong_form_is_refused(ada: Approver) -> None:
    prepared = ada.prepare(f"{NAME}@v1", "refuse", reason="why").json()
    signed = ada.signed(prepared)
    der = base64.b64decode(signed["signature"])
    r, s = halves(der)
    for wrong in (s + r, r + r, bytes(64), b"\xff" * 64, der[:64], (r + s)[:63], r + s + b"\0", der + b"\0", der[::-1]):
        status, message = said(ada, signed, wrong)
        assert (status, message) == (409, "The signature is not ada's."), wrong.hex()
    # Signed was the statement and not DSSE's encoding of it.
    plain = ada.key.sign(canonical(prepared["statement"]), ec.ECDSA(hashes.SHA256()))
    assert said(ada, signed, plain)[0] == 409
    assert said(ada, signed, r + s)[0] == 200


def test_a_signature_does_not_wait_for_next_month(ada: Approver) -> None:
    prepared = ada.prepare(f"{NAME}@v1", "refuse", reason="why").json()
    predicate = prepared["statement"]["predicate"]
    for until, why in (
        (stamp(timedelta(seconds=-1)), "The time of the signed statement ended"),
        (stamp(timedelta(days=30)), "The time of the signed statement ends too late"),
        ("2999-01-01T00:00:00", "does not say until when"),
        ("soon", "does not say until when"),
        (None, "is not an approval or refusal"),
    ):
        changed = {key: value for key, value in predicate.items() if key != "until"}
        changed |= {"until": until} if until else {}
        statement = {**prepared["statement"], "predicate": changed}
        payload = base64.b64encode(signed_bytes(statement)).decode()
        status, message = said(ada, ada.signed({**prepared, "statement": statement, "payload": payload}))
        assert (status, why in message) == (409, True)
    assert said(ada, ada.signed(prepared))[0] == 200


def test_keys_that_do_not_count(served: Served, ada: Approver, tmp_path: Path) -> None:
    prepared = ada.prepare(f"{NAME}@v1", "refuse", reason="why").json()
    foreign = ec.generate_private_key(ec.SECP256R1())
    signature = foreign.sign(base64.b64decode(prepared["payload"]), ec.ECDSA(hashes.SHA256()))
    status, message = said(ada, {**ada.signed(prepared), "key": fingerprint_of(foreign)}, signature)
    assert (status, "key that is not trusted here" in message) == (409, True)
    eve = Approver(served, "eve", tmp_path)
    assert said(ada, {**eve.signed(prepared), "key": fingerprint_of(eve.key)})[0] == 409
    revoke_key(served.scene.store, "ada", "key-1", since=1, actor=OWNER)
    status, message = said(ada, ada.signed(prepared))
    assert (status, "revoked" in message) == (409, True)
    assert ada.prepare(f"{NAME}@v1", "refuse", reason="why").json()["keys"] == []
