"""Signing keys: EC P-256 key pairs of one user each. A private key is a file that only its owner should read.

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

from tunesmith.core.digests import digest_bytes
from tunesmith.core.errors import NextStep, Refused, UsageError
from tunesmith.core.system.files import sync_folder, write_atomic
from tunesmith.core.text.names import check_name
from tunesmith.registry.signing.attestations import fingerprint_of, key_statement, public_pem, seal
from tunesmith.store.people import identities, user_keys
from tunesmith.store.people.identities import User, UserKey
from tunesmith.store.people.trust import FIRST_LABEL, key_file
from tunesmith.store.people.user_keys import Proof
from tunesmith.store.store import Store


def private_key_path(store: Store, user: str, label: str = FIRST_LABEL) -> Path:
    """The path where a key pair of a user is made. It may not exist."""
    given = os.environ.get("TUNESMITH_KEYS")
    folder = Path(given) if given else store.local("keys")
    return folder / key_file(check_name(user, "user name"), check_name(label, "key label"))


def private_keys(store: Store, user: User) -> dict[str, Path]:
    """Fingerprint -> file of every private key here that can be read: USER.pem and USER@LABEL.pem."""
    files = {}
    for path in _private_files(store, user.name):
        with contextlib.suppress(Refused):
            files[fingerprint_of(load_private_key(path))] = path
    return files


def create_key(store: Store, user: str, *, actor: str, label: str | None = None) -> UserKey:
    """Make a key pair and enrol the public key. label: by default key-1, key-2 and so on.

    Raises as user_keys.enrol_key does; actor may be the user themself, with an active key here, or an admin.
    """
    # Before the file is written: the next enrolment would use a file that a stranger put there.
    if actor != user:
        identities.require(store, actor, "user.change")
    owner = identities.get_user(store, user)
    if not owner.active:
        raise Refused(f"{user} is deactivated", where=user, fix="add a new user")
    label = label or user_keys.next_label(owner)
    if label in {key.label for key in owner.keys}:
        raise UsageError(f"{user} has a key {label} already", where=user, fix="give the new key another label")
    path = private_key_path(store, user, label)
    proven = _Prover(store, owner, actor)
    if not path.exists():
        _write_new(path, ec.generate_private_key(ec.SECP256R1()))
    # An existing file is a pair whose enrolment was interrupted: continue with it.
    return _enrol(store, user, public_pem(load_private_key(path).public_key()), actor, label, proven)


def enrol_public_key(store: Store, user: str, pem: bytes, *, actor: str, label: str | None = None) -> UserKey:
    """Enrol a public key that was made elsewhere. Raises UsageError unless it is a P-256 public key in PEM."""
    owner = identities.get_user(store, user)
    label = label or user_keys.next_label(owner)
    return _enrol(store, user, read_public_key(pem), actor, label, _Prover(store, owner, actor))


def retire_key(store: Store, user: str, label: str, *, actor: str) -> User:
    """End a key's use from now on. Raises as user_keys.retire_key does."""
    owner = identities.get_user(store, user)
    prover = _Prover(store, owner, actor)
    known = {key.label: key.fingerprint for key in owner.keys}
    proof = prover.prove("user.key.retire", label, known[label]) if label in known else None
    return user_keys.retire_key(store, user, label, actor=actor, proof=proof)


def read_public_key(pem: bytes) -> str:
    """A public key in our spelling. Raises UsageError unless it is a P-256 public key in PEM."""
    try:
        return public_pem(serialization.load_pem_public_key(pem))
    except (ValueError, UnsupportedAlgorithm) as error:
        raise UsageError(
            f"not a public key in PEM: {error}", fix="give the file that `openssl ec -pubout` writes"
        ) from error


def ensure_key(store: Store, user: str) -> User:
    """The user, with an active key; it is made now if they never had one. Raises Refused if all were ended."""
    owner = identities.get_user(store, user)
    if not owner.keys:
        create_key(store, user, actor=user)
        return identities.get_user(store, user)
    if not owner.active_keys:
        raise Refused(
            f"all keys of {user} were retired or revoked",
            where=user,
            fix=NextStep("have an admin create one", "keys create", user=user),
        )
    return owner


def signing_key(store: Store, user: User) -> Path:
    """The private key of the user's newest active key that is here.

    Raises Refused if there is none, or if other users can read it.
    """
    files = _private_files(store, user.name)
    here = private_keys(store, user)
    for key in user.active_keys:
        if path := here.get(key.fingerprint):
            if path.stat().st_mode & 0o077:
                fix = f"chmod 600 {path}"
                raise Refused(f"{user.name}'s private key is open to other users", where=str(path), fix=fix)
            return path
    for key in user.keys:
        if path := here.get(key.fingerprint):
            raise Refused(f"{user.name}'s key {key.label} was {key.status}", where=str(path), fix=_BRING)
    for path in files:
        load_private_key(path)  # raises if it cannot be read
        raise Refused(f"this private key is not the one of {user.name}'s public key", where=str(path), fix=_BRING)
    raise Refused("the private key is not here", where=str(private_key_path(store, user.name)), fix=_BRING)


def load_signing_key(store: Store, user: User) -> ec.EllipticCurvePrivateKey:
    """A user's private key. Raises as signing_key does."""
    return load_private_key(signing_key(store, user))


_BRING = "put the right file there, or point $TUNESMITH_KEYS at the folder that holds it"


class _Prover:
    """Signs a user's changes of their own keys with an active key of theirs. An admin without a key here needs none."""

    def __init__(self, store: Store, owner: User, actor: str) -> None:
        self._user, self._key = owner.name, None
        if actor == owner.name and owner.keys:
            try:
                self._key = load_signing_key(store, owner)
            except Refused:
                if not owner.may("user.change"):
                    raise

    def prove(self, action: str, label: str, fingerprint: str) -> Proof | None:
        """The proof for one change; None for an actor who needs none."""
        if self._key is None:
            return None
        envelope = seal(key_statement(self._user, action, label, fingerprint), self._key)
        return Proof(fingerprint_of(self._key), envelope.decode())


def _enrol(store: Store, user: str, pem: str, actor: str, label: str, prover: _Prover) -> UserKey:
    proof = prover.prove("user.key", label, digest_bytes(pem.encode()))
    enrolled = user_keys.enrol_key(store, user, pem, actor=actor, label=label, proof=proof)
    return next(key for key in enrolled.keys if key.label == label)


def _private_files(store: Store, user: str) -> list[Path]:
    first = private_key_path(store, user)
    later = sorted(first.parent.glob(f"{user}@*.pem"))
    return [path for path in (first, *later) if path.is_file()]


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


def load_private_key(path: Path) -> ec.EllipticCurvePrivateKey:
    """A private key from a PEM file. Raises Refused if it cannot be read or is no P-256 key."""
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
