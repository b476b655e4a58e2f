"""The public keys that a verifier trusts: `trust/keys.json`, a list that can be read without the database.

A person who can write this file decides what verifies. A verifier who does not trust the store keeps a copy from a time
when they did, and uses it with `verify --trust FILE`.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

from pydantic import BaseModel, ConfigDict, ValidationError, model_validator

from tunesmith.core.digests import canonical, digest_bytes
from tunesmith.core.errors import Refused
from tunesmith.core.scope import Scope
from tunesmith.store.blobs import BlobStore

TRUST_KEY = "trust/keys.json"


class TrustedKey(BaseModel):
    """A user's public key with their roles and scope.

    tenant, region: "" means all. active: an inactive key stays in the list, so that a refusal can name its owner.
    fingerprint: SHA-256 of the PEM text, the same number that model-signing puts into a signature as its hint.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    user: str
    roles: tuple[str, ...]
    tenant: str = ""
    region: str = ""
    active: bool = True
    public_key: str
    fingerprint: str

    @model_validator(mode="after")
    def _own_fingerprint(self) -> TrustedKey:
        if digest_bytes(self.public_key.encode()) != self.fingerprint:
            raise ValueError(f"the fingerprint of {self.user}'s key does not match the key")
        return self

    @property
    def scope(self) -> Scope:
        """What its owner may act for."""
        return Scope(self.tenant, self.region)


def read_trust(path: Path) -> tuple[TrustedKey, ...]:
    """Read a list of keys. Raises Refused if it is missing, damaged or gives one key to two users."""
    fix = "restore it, or give your own copy with --trust FILE"
    try:
        items = json.loads(path.read_bytes())
        if not isinstance(items, list):
            raise ValueError("not a list of keys")
        keys = tuple(TrustedKey.model_validate(item) for item in items)
    except FileNotFoundError:
        raise Refused(
            "there is no list of trusted keys, so no signature can be believed", where=str(path), fix=fix
        ) from None
    except (OSError, ValidationError, ValueError, RecursionError) as error:
        raise Refused(f"the list of trusted keys cannot be read: {error}", where=str(path), fix=fix) from error
    for of in ("user", "fingerprint"):
        if len({getattr(key, of) for key in keys}) != len(keys):
            raise Refused(f"the list of trusted keys names one {of} twice", where=str(path), fix=fix)
    return keys


def write_trust(blobs: BlobStore, keys: Iterable[TrustedKey]) -> None:
    """Write the list, and each active key as `trust/USER.pem` for tools that read PEM (model_signing, openssl)."""
    listed = sorted(keys, key=lambda key: key.user)
    blobs.put(TRUST_KEY, canonical([key.model_dump(mode="json") for key in listed]))
    for key in listed:
        pem = f"trust/{key.user}.pem"
        if key.active:
            blobs.put(pem, key.public_key.encode())
        else:
            blobs.delete(pem)


def find_key(keys: Iterable[TrustedKey], fingerprint: str) -> TrustedKey | None:
    """The key with a fingerprint; None if it is not in the list."""
    return next((key for key in keys if key.fingerprint == fingerprint), None)
