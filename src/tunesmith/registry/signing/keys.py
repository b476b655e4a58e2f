"""Signing keys: one EC P-256 key pair for each user. The private key is a file that only its owner should read.

Private keys are in $TUNESMITH_KEYS, else in the store's `keys/`. A person who can read a folder with all keys of a team
can sign as anyone in it. People who must not act for each other keep their own folders, and enrol only their public
keys (`tunesmith keys enrol`).
"""

from __future__ import annotations

import contextlib
import os
import secrets
from pathlib import Path

from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec

from tunesmith.core.errors import Refused, UsageError
from tunesmith.core.files import sync_folder, write_atomic
from tunesmith.core.names import check_name
from tunesmith.store import identities
from tunesmith.store.identities import User
from tunesmith.store.store import Store


def keys_folder(store: Store) -> Path:
    """The folder with private keys."""
    given = os.environ.get("TUNESMITH_KEYS")
    return Path(given) if given else store.local("keys")


def private_key_path(store: Store, user: str) -> Path:
    """The path of a user's private key, which may not exist."""
    return keys_folder(store) / f"{check_name(user, 'user name')}.pem"


def create_key(store: Store, user: str, *, actor: str) -> User:
    """Make a key pair and enrol the public key. Raises Refused if the user has a key, or if actor may not."""
    # Before the file is written: the next enrolment would use a file that a stranger put there.
    if actor != user:
        identities.require(store, actor, "user.change")
    path = private_key_path(store, user)
    if identities.get_user(store, user).public_key:
        raise Refused(f"{user} has a key already", where=str(path), fix=_BRING)
    if not path.exists():
        _write_new(path, ec.generate_private_key(ec.SECP256R1()))
    # An existing file is a pair whose enrolment was interrupted: continue with it.
    return identities.enrol_key(store, user, public_pem(_load_private(path).public_key()), actor=actor)


def enrol_public_key(store: Store, user: str, pem: bytes, *, actor: str) -> User:
    """Enrol a public key that was made elsewhere. Raises UsageError unless it is a P-256 public key in PEM."""
    try:
        public = serialization.load_pem_public_key(pem)
    except (ValueError, UnsupportedAlgorithm) as error:
        raise UsageError(
            f"not a public key in PEM: {error}", fix="give the file that `openssl ec -pubout` writes"
        ) from error
    return identities.enrol_key(store, user, public_pem(public), actor=actor)


def ensure_key(store: Store, user: str) -> User:
    """The user, with a key; it is made now if they have none."""
    found = identities.get_user(store, user)
    return found if found.public_key else create_key(store, user, actor=user)


def signing_key(store: Store, user: User) -> Path:
    """The file of a user's private key, compared with their public key.

    Raises Refused if it is missing, readable by other users, or belongs to another key.
    """
    path = private_key_path(store, user.name)
    private = _load_private(path)
    if path.stat().st_mode & 0o077:
        raise Refused(f"{user.name}'s private key is open to other users", where=str(path), fix=f"chmod 600 {path}")
    if public_pem(private.public_key()) != user.public_key:
        raise Refused(f"this private key is not the one of {user.name}'s public key", where=str(path), fix=_BRING)
    return path


def load_signing_key(store: Store, user: User) -> ec.EllipticCurvePrivateKey:
    """A user's private key. Raises as signing_key does."""
    return _load_private(signing_key(store, user))


_BRING = "put the right file there, or point $TUNESMITH_KEYS at the folder that holds it"


def _write_new(path: Path, key: ec.EllipticCurvePrivateKey) -> None:
    encoded = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    fresh = path.with_name(f".{path.stem}-{secrets.token_hex(8)}")
    write_atomic(fresh, encoded, mode=0o600)
    try:
        # Unlike a rename, a link never replaces a key that another process has just made and enrolled.
        with contextlib.suppress(FileExistsError):
            os.link(fresh, path)
    finally:
        fresh.unlink()
    sync_folder(path.parent)


def _load_private(path: Path) -> ec.EllipticCurvePrivateKey:
    try:
        key = serialization.load_pem_private_key(path.read_bytes(), password=None)
    except FileNotFoundError:
        raise Refused("the private key is not here", where=str(path), fix=_BRING) from None
    except (OSError, ValueError, TypeError, UnsupportedAlgorithm) as error:
        # The library's message may quote the file, so it must not be shown.
        raise Refused("the private key cannot be read", where=str(path), fix=_BRING) from error
    if not isinstance(key, ec.EllipticCurvePrivateKey) or not isinstance(key.curve, ec.SECP256R1):
        raise Refused("the private key is not an EC P-256 key", where=str(path), fix=_BRING)
    return key


def public_pem(key: object) -> str:
    """A P-256 public key as PEM text, always spelled alike: the key's fingerprint is the digest of this text."""
    if not isinstance(key, ec.EllipticCurvePublicKey) or not isinstance(key.curve, ec.SECP256R1):
        raise UsageError("the public key is not an EC P-256 key", fix="openssl ecparam -name prime256v1 -genkey")
    encoded = key.public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)
    return encoded.decode("ascii")
