"""Signed statements about a version: an in-toto statement in a DSSE envelope, kept as a record's blob."""

from __future__ import annotations

import base64
import binascii
from collections.abc import Mapping, Sequence
from typing import Any

from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.utils import encode_dss_signature
from cryptography.hazmat.primitives.serialization import load_pem_public_key

from tunesmith.core.digests import canonical, digest_bytes
from tunesmith.core.errors import NextStep, Refused, TunesmithError, UsageError
from tunesmith.core.reading.strict_json import Fields, JsonObject, parse_json
from tunesmith.records.version import ApprovalBody
from tunesmith.registry.signing.release import Version
from tunesmith.registry.signing.signatures import (
    PAYLOAD_TYPE,
    STATEMENT,
    Untrusted,
    check_base64,
    check_in_time,
    check_may_sign,
    dsse,
)
from tunesmith.store.people.trust import TrustedKey, find_key
from tunesmith.store.records import Record

ENVELOPE = "envelope.json"
_APPROVAL = "urn:tunesmith:approval:v1"
_KEY_CHANGE = "urn:tunesmith:key-change:v1"


def statement_of(version: Version, approval: ApprovalBody) -> JsonObject:
    """The in-toto statement: this approval or refusal is of exactly this digest."""
    return stated({version.label: version.digest}, _APPROVAL, approval.model_dump(mode="json"))


def read_statement(statement: Any) -> tuple[str, str, ApprovalBody]:
    """(label, digest, approval or refusal) of a statement about one version. Raises Refused for any other statement."""
    try:
        (subject,) = statement["subject"]
        label, digest = subject["name"], f"sha256:{subject['digest']['sha256']}"
        approval = ApprovalBody.model_validate(statement["predicate"])
        if statement != stated({label: digest}, _APPROVAL, approval.model_dump(mode="json")):
            raise ValueError
    except (KeyError, TypeError, ValueError) as error:
        raise Refused("the statement is not an approval or refusal", fix=NextStep("decide again", "approve")) from error
    return label, digest, approval


def key_statement(user: str, action: str, label: str, fingerprint: str) -> JsonObject:
    """The in-toto statement by which a user changes a key of theirs. action: user.key or user.key.retire."""
    return stated({label: fingerprint}, _KEY_CHANGE, {"user": user, "action": action})


def stated(subjects: Mapping[str, str], kind: str, predicate: JsonObject) -> JsonObject:
    """An in-toto statement. subjects: name -> digest of what it is about; kind: the predicate's type."""
    return {
        "_type": STATEMENT,
        "subject": [{"name": name, "digest": digest_set(digest)} for name, digest in subjects.items()],
        "predicateType": kind,
        "predicate": predicate,
    }


def digest_set(digest: str) -> JsonObject:
    """A digest as in-toto writes it."""
    return {"sha256": digest.removeprefix("sha256:")}


def public_pem(key: object) -> str:
    """A P-256 public key as PEM text, always spelled alike: the key's fingerprint is the digest of this text."""
    if not isinstance(key, ec.EllipticCurvePublicKey) or not isinstance(key.curve, ec.SECP256R1):
        raise UsageError("the public key is not an EC P-256 key", fix="openssl ecparam -name prime256v1 -genkey")
    encoded = key.public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)
    return encoded.decode("ascii")


def fingerprint_of(key: ec.EllipticCurvePrivateKey) -> str:
    """The fingerprint of a private key's public half."""
    return digest_bytes(public_pem(key.public_key()).encode())


def signed_bytes(statement: Fields) -> bytes:
    """The bytes that a signature over a statement covers: DSSE's pre-authentication encoding."""
    from securesystemslib.dsse import Envelope

    return bytes(Envelope(canonical(statement), PAYLOAD_TYPE, {}).pae())


def seal(statement: Fields, key: ec.EllipticCurvePrivateKey) -> bytes:
    """A DSSE envelope around a statement, canonical JSON. The keyid is the fingerprint of the key's public half."""
    from securesystemslib.dsse import Envelope
    from securesystemslib.signer import CryptoSigner, SSlibKey  # type: ignore[attr-defined]  # it has no __all__

    keyid = fingerprint_of(key).removeprefix("sha256:")
    envelope = Envelope(canonical(statement), PAYLOAD_TYPE, {})
    envelope.sign(CryptoSigner(key, SSlibKey.from_crypto(key.public_key(), keyid=keyid)))
    return canonical(envelope.to_dict())


def envelope_of(statement: Fields, fingerprint: str, signature: bytes) -> bytes:
    """A DSSE envelope around a statement that was signed elsewhere, canonical JSON. Checks nothing.

    signature: DER, or r and s of 32 bytes each as WebCrypto gives them.
    """
    if len(signature) == 64:
        half = (int.from_bytes(signature[:32], "big"), int.from_bytes(signature[32:], "big"))
        signature = encode_dss_signature(*half)
    payload, encoded = (base64.b64encode(each).decode() for each in (canonical(statement), signature))
    return canonical(dsse(payload, fingerprint.removeprefix("sha256:"), encoded))


def open_envelope(raw: bytes, keys: Sequence[TrustedKey], where: str) -> tuple[Any, TrustedKey]:
    """The statement in an envelope, and the key that signed it.

    Raises Refused if the envelope is damaged, Untrusted if the key is not among keys.
    """
    from securesystemslib.dsse import Envelope
    from securesystemslib.exceptions import VerificationError
    from securesystemslib.signer import SSlibKey  # type: ignore[attr-defined]

    try:
        document = parse_json(raw)
        keyid = document["signatures"][0]["keyid"]
        payload, signature = document["payload"], document["signatures"][0]["sig"]
        if document != dsse(payload, keyid, signature) or canonical(document) != raw or not isinstance(keyid, str):
            raise ValueError("not in the form tunesmith signs in")
        check_base64(payload, signature)
        envelope = Envelope.from_dict(document)
        statement = parse_json(envelope.payload)
    except (ValueError, KeyError, IndexError, TypeError, binascii.Error, TunesmithError) as error:
        raise Refused(f"not an envelope: {type(error).__name__}", where=where) from error
    key = find_key(keys, f"sha256:{keyid}")
    if key is None:
        raise Untrusted(f"signed by a key that is not trusted here ({keyid[:12]})", where=where)
    public = load_pem_public_key(key.public_key.encode())
    try:
        envelope.verify([SSlibKey.from_crypto(public, keyid=keyid)], threshold=1)
    except VerificationError as error:
        raise Refused(f"the signature is not {key.user}'s", where=where) from error
    return statement, key


def read_approval(
    record: Record, envelope: bytes, version: Version, signer: TrustedKey, keys: Sequence[TrustedKey]
) -> ApprovalBody:
    """An approval or refusal of a version, verified. signer: the key that signed the version; its user may not decide.

    Raises Refused if the envelope is not a signature over exactly this version and this record; Untrusted if it is an
    approval and the approver may not approve the version today. A refusal still counts when its approver has left.
    """
    where = f"approval {record.digest.removeprefix('sha256:')[:12]}"
    try:
        approval = ApprovalBody.of(record)
    except Refused as error:
        raise Refused("not an approval", where=where) from error
    if record.parents != {"version": version.digest} or record.blobs != {ENVELOPE: digest_bytes(envelope)}:
        raise Refused("an approval of another version, or with another envelope", where=where)
    statement, key = open_envelope(envelope, keys, where)
    if statement != statement_of(version, approval) or approval.override != version.override:
        raise Refused("the signed statement is not about this version, or not what the record says", where=where)
    if key.user != approval.approver:
        raise Refused(f"the record says {approval.approver}, the key is {key.user}'s", where=where)
    if approval.decision == "approve":
        check_approver(version, signer, key, record.digest)
    check_in_time(key, record.digest, where)
    return approval


def check_approver(version: Version, signer: TrustedKey, approver: TrustedKey, digest: str) -> None:
    """Raise Untrusted unless this user may approve this version today: role, scope, and not the one who registered it.

    signer, approver: the keys that signed the version and the approval, whose record has a digest.
    """
    check_not_signer(version, approver.user)
    check_may_sign(approver, "version.approve", digest, version.label, version.scope, apart_from=signer)


def check_not_signer(version: Version, user: str) -> None:
    """Raise Untrusted if a user registered the version that they want to approve."""
    if user == version.signer:
        raise Untrusted(
            f"{user} registered {version.label} and cannot approve it",
            where=version.label,
            fix=NextStep("have another approver approve it", "approve", version=version.label, actor=...),
        )
