"""The public keys that a verifier trusts: `trust/keys.json`, a list that can be read without the database.

A person who can write this file decides what verifies. A verifier who does not trust the store keeps a copy from a time
when they did, and uses it with `verify --trust FILE`.

A signature counts if its key was active when the audit log recorded it: the number of that entry decides, not a clock
and nothing that the signer states. The list names what a retired or revoked key signed in time, so that a verifier
without the log gives the same answer.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from pathlib import Path
from typing import Literal

from pydantic import model_validator

from tunesmith.core.digests import canonical, digest_bytes
from tunesmith.core.errors import Refused, UsageError
from tunesmith.core.reading.strict_json import JsonObject, parse_json
from tunesmith.core.reading.text_files import read_text_file
from tunesmith.core.values import ScopedView
from tunesmith.store.blobs import BlobStore

TRUST_KEY = "trust/keys.json"
FIRST_LABEL = "key-1"
KeyStatus = Literal["active", "retired", "revoked"]


class TrustedKey(ScopedView):
    """A user's public key with their roles and scope.

    tenant, region: "" means all. active: whether the user is; a deactivated user's keys stay in the list, so that a
    message can name their owner. status: the key's own; signed: the digests of the versions, approvals and refusals
    that a retired or revoked key signed in time, and of the erasures and holds that any key signed. fingerprint:
    SHA-256 of the PEM text, the same number that model-signing puts into a signature as its hint.
    """

    user: str
    label: str = FIRST_LABEL
    roles: tuple[str, ...]
    tenant: str = ""
    region: str = ""
    active: bool = True
    status: KeyStatus = "active"
    signed: tuple[str, ...] = ()
    public_key: str
    fingerprint: str

    @model_validator(mode="after")
    def _own_fingerprint(self) -> TrustedKey:
        if digest_bytes(self.public_key.encode()) != self.fingerprint:
            raise ValueError(f"the fingerprint of {self.user}'s key does not match the key")
        return self

    def counts_for(self, digest: str) -> bool:
        """Whether its signature over the version or approval with a digest counts."""
        return self.status == "active" or digest in self.signed


def signature_entry(key: str, digest: str) -> JsonObject:
    """What an audit entry states of the signature that it records. key: a fingerprint; digest: what was signed."""
    return {"signature": {"key": key, "digest": digest}}


def read_trust(path: Path) -> tuple[TrustedKey, ...]:
    """Read a list of keys. Raises Refused if it is missing, damaged or gives one key to two users."""
    fix = "restore it, or give your own copy"
    try:
        items = parse_json(read_text_file(path, "the list"))
        if not isinstance(items, list):
            raise ValueError("not a list of keys")
        keys = tuple(TrustedKey.model_validate(item) for item in items)
    except (UsageError, ValueError) as error:
        if not path.exists():
            what = "there is no list of trusted keys, so no signature can be believed"
        else:
            what = f"the list of trusted keys cannot be read: {error.what if isinstance(error, UsageError) else error}"
        raise Refused(what, where=str(path), fix=fix) from error
    for what, named in (
        ("key", {key.fingerprint for key in keys}),
        ("label of a user", {(key.user, key.label) for key in keys}),
    ):
        if len(named) != len(keys):
            raise Refused(f"the list of trusted keys names one {what} twice", where=str(path), fix=fix)
    return keys


def write_trust(blobs: BlobStore, keys: Collection[TrustedKey]) -> None:
    """Write the list, and each active key as `trust/USER.pem` for tools that read PEM (model_signing, openssl)."""
    for key in keys:
        pem = f"trust/{key_file(key.user, key.label)}"
        if key.active and key.status == "active":
            _put_changed(blobs, pem, key.public_key.encode())
        else:
            blobs.delete(pem)
    # Last, so that `is_written` sees a call that was killed.
    _put_changed(blobs, TRUST_KEY, _encoded(keys))


def in_both(before: Iterable[TrustedKey], after: Iterable[TrustedKey]) -> list[TrustedKey]:
    """The keys as they are after a change, without what the change added: new keys, and new roles of their owners."""
    known = {key.fingerprint: frozenset(key.roles) for key in before}
    return [
        key.model_copy(update={"roles": tuple(role for role in key.roles if role in known[key.fingerprint])})
        for key in after
        if key.fingerprint in known
    ]


def is_written(blobs: BlobStore, keys: Collection[TrustedKey]) -> bool:
    """Whether the list is as write_trust writes it."""
    return blobs.get(TRUST_KEY) == _encoded(keys) if blobs.exists(TRUST_KEY) else not keys


def key_file(user: str, label: str) -> str:
    """The name of a key's file: USER.pem for a user's first key, USER@LABEL.pem for later ones."""
    return f"{user}.pem" if label == FIRST_LABEL else f"{user}@{label}.pem"


def find_key(keys: Iterable[TrustedKey], fingerprint: str) -> TrustedKey | None:
    """The key with a fingerprint; None if it is not in the list."""
    return next((key for key in keys if key.fingerprint == fingerprint), None)


def _encoded(keys: Collection[TrustedKey]) -> bytes:
    return canonical([key.model_dump(mode="json") for key in sorted(keys, key=lambda key: (key.user, key.label))])


def _put_changed(blobs: BlobStore, key: str, data: bytes) -> None:
    if not blobs.exists(key) or blobs.get(key) != data:
        blobs.put(key, data)
