"""A version's folder: copied under strict rules, signed and verified with model-signing.

model-signing alone is not enough (version 1.1.1): it skips `.git*`, obeys paths to ignore that the signer chose,
accepts a manifest without files, and takes the older of two formats where a signature claims it. So a folder holds
allowed plain files alone, and a signature must make, byte for byte, the one statement about exactly these files that we
would have made. What is read is always a private copy: nobody can swap a file between its verification and its use.
"""

from __future__ import annotations

import base64
import binascii
import contextlib
import errno
import json
import os
import shutil
import stat
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from tunesmith.core.digests import canonical, digest_file
from tunesmith.core.errors import Refused, TunesmithError
from tunesmith.core.files import sync_folder, write_atomic
from tunesmith.models.weight_files import ADAPTER_FILE, CONFIG_FILE, MODEL_FILE, unique_keys
from tunesmith.registry.licence_duties import NOTICE
from tunesmith.store.trust import TrustedKey, find_key

RELEASE, SIGNATURE = "release.json", "model.sig"
ALLOWED = frozenset((CONFIG_FILE, ADAPTER_FILE, MODEL_FILE, NOTICE, RELEASE, SIGNATURE))
_MAX_BYTES = {RELEASE: 64 << 20, NOTICE: 64 << 20, SIGNATURE: 1 << 20, CONFIG_FILE: 64 << 10}
_MEDIA_TYPE = "application/vnd.dev.sigstore.bundle.v0.3+json"
_PAYLOAD_TYPE = "application/vnd.in-toto+json"
_STATEMENT = "https://in-toto.io/Statement/v1"
_PREDICATE = "https://model_signing/signature/v1.0"
_FIX = "restore the version's folder from where it was signed, or register it again"


class Untrusted(Refused):
    """The signature may be whole, but its key is not one to believe here."""


class Expired(Refused):
    """The version was signed for a time that is over."""


def sign_folder(folder: Path, private_key: Path) -> None:
    """Sign every file in folder into folder/model.sig. The folder's name becomes the subject's; nothing is left out."""
    from model_signing import hashing, signing

    everything = hashing.Config().set_ignored_paths(paths=[], ignore_git_paths=False)
    config = signing.Config().use_elliptic_key_signer(private_key=private_key).set_hashing_config(everything)
    signature = folder / SIGNATURE
    config.sign(folder, signature)
    # The same document in its one canonical spelling, so that not even a space in it can be changed unnoticed.
    write_atomic(signature, canonical(json.loads(signature.read_bytes())))


def verify_signature(folder: Path, keys: Sequence[TrustedKey]) -> TrustedKey:
    """The key that signed folder/model.sig, which must cover exactly the files beside it.

    folder: a private copy (private_copy). Raises Refused if a file is not the signed one or the key is unknown. The
    caller checks what the key's owner may sign.
    """
    path = folder / SIGNATURE
    hint, statement = _read_bundle(path)
    key = find_key(keys, f"sha256:{hint}")
    if key is None:
        raise Refused(
            f"signed with a key that is not trusted here ({hint[:12]})",
            where=str(path),
            fix="have its owner enrol it (tunesmith keys enrol), or verify with the right list (--trust)",
        )
    _check_cryptography(folder, key)
    _check_statement(folder, statement)
    return key


@contextlib.contextmanager
def private_copy(folder: Path) -> Iterator[Path]:
    """A copy of a version's folder that only this user can reach, gone at the end. It keeps the folder's name.

    Raises Refused for anything in it but allowed, regular, singly linked files. Errors raised while it is open name the
    original's path.
    """
    with tempfile.TemporaryDirectory(prefix="tunesmith-") as private:  # mode 0700
        copy = Path(private) / folder.name
        copy.mkdir(mode=0o700)
        _copy_plain(folder, copy)
        try:
            yield copy
        except TunesmithError as error:
            if error.where is not None:
                error.where = error.where.replace(str(copy), str(folder))
            raise


def sync_files(folder: Path) -> None:
    """fsync every file in folder and the folder itself, before it is renamed into place."""
    for path in folder.iterdir():
        with path.open("rb") as stream:
            os.fsync(stream.fileno())
    sync_folder(folder)


def _copy_plain(folder: Path, target: Path) -> None:
    try:
        handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except OSError as error:
        what = "the version's folder is missing" if error.errno == errno.ENOENT else "not a folder of its own"
        raise Refused(what, where=str(folder), fix=_FIX) from error
    try:
        names = sorted(os.listdir(handle))
        for name in names:
            if name not in ALLOWED:
                raise _refusal(folder / name, "a file that no version has")
        for name in (RELEASE, SIGNATURE):
            if name not in names:
                raise _refusal(folder / name, "missing")
        for name in names:
            _copy_file(handle, folder / name, target / name)
    finally:
        os.close(handle)


def _copy_file(folder: int, path: Path, target: Path) -> None:
    # Opened first and asked afterwards, through the open file: what is asked is what is copied. O_NONBLOCK, because
    # opening a FIFO would wait for a writer.
    try:
        handle = os.open(path.name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, dir_fd=folder)
    except OSError as error:
        raise _refusal(
            path, "a link" if error.errno == errno.ELOOP else f"cannot be opened: {error.strerror}"
        ) from error
    with contextlib.ExitStack() as opened:
        opened.callback(os.close, handle)
        facts = os.fstat(handle)
        if not stat.S_ISREG(facts.st_mode):
            raise _refusal(path, "not a regular file")
        if facts.st_nlink != 1:
            raise _refusal(path, "reachable under another name too (a hard link)")
        if facts.st_size > _MAX_BYTES.get(path.name, facts.st_size):
            raise _refusal(path, f"{facts.st_size} bytes, at most {_MAX_BYTES[path.name]} are allowed")
        with open(handle, "rb", closefd=False) as source, target.open("xb") as copy:
            shutil.copyfileobj(source, copy, 1 << 20)


def _read_bundle(path: Path) -> tuple[str, dict[str, Any]]:
    """The key's hint (64 hex digits) and the signed statement, out of a bundle that has the one form we write."""
    raw = path.read_bytes()
    try:
        document = json.loads(raw)
        envelope = document["dsseEnvelope"]
        hint = document["verificationMaterial"]["publicKey"]["hint"]
        payload, signature = envelope["payload"], envelope["signatures"][0]["sig"]
        expected = {
            "mediaType": _MEDIA_TYPE,
            "verificationMaterial": {"publicKey": {"hint": hint}, "tlogEntries": []},
            "dsseEnvelope": {
                "payload": payload,
                "payloadType": _PAYLOAD_TYPE,
                "signatures": [{"sig": signature, "keyid": ""}],
            },
        }
        if document != expected or canonical(document) != raw:
            raise ValueError("not in the form tunesmith signs in")
        for text in (payload, signature):
            if base64.b64encode(base64.b64decode(text, validate=True)).decode() != text:
                raise ValueError("base64 with stray bits")
        statement = json.loads(base64.b64decode(payload), object_pairs_hook=unique_keys)
        if not isinstance(hint, str) or not isinstance(statement, dict):
            raise ValueError("not a statement by a key")
    except (ValueError, KeyError, IndexError, TypeError, RecursionError, binascii.Error, TunesmithError) as error:
        raise _refusal(path, f"not a signature: {type(error).__name__} {str(error)[:120]}") from error
    return hint, statement


def _check_statement(folder: Path, statement: dict[str, Any]) -> None:
    """Hold what was signed against the one statement about the files that lie there, naming the file that differs."""
    actual = {
        path.name: digest_file(path).removeprefix("sha256:") for path in folder.iterdir() if path.name != SIGNATURE
    }
    signature = folder / SIGNATURE
    try:
        listed = statement["predicate"]["resources"]
        signed = {str(resource["name"]): resource["digest"] for resource in listed}
        root = statement["subject"][0]["digest"]["sha256"]
    except (KeyError, IndexError, TypeError) as error:
        raise _refusal(signature, f"the signed statement lacks {error}") from error
    for name in sorted(actual.keys() | signed.keys()):
        if name not in signed:
            raise _refusal(folder / name, "not among the files that were signed")
        if name not in actual:
            raise _refusal(folder / name, "was signed and is missing")
        if actual[name] != signed[name]:
            raise _refusal(folder / name, "its bytes are not the ones that were signed")
    expected = {
        "_type": _STATEMENT,
        "subject": [{"name": folder.name, "digest": {"sha256": root}}],
        "predicateType": _PREDICATE,
        "predicate": {
            "serialization": {"method": "files", "hash_type": "sha256", "allow_symlinks": False},
            "resources": [
                {"name": name, "algorithm": "sha256", "digest": digest} for name, digest in sorted(actual.items())
            ],
        },
    }
    if statement != expected:
        raise _refusal(signature, "the signed statement says more, less or other than these files in this folder")


def _check_cryptography(folder: Path, key: TrustedKey) -> None:
    """model-signing's own verification: the signature over the statement, the files against the statement."""
    from cryptography.exceptions import InvalidSignature
    from model_signing import hashing, verifying

    public = folder.with_name("signer.pem")
    public.write_text(key.public_key)
    everything = hashing.Config().set_ignored_paths(paths=[SIGNATURE], ignore_git_paths=False)
    config = verifying.Config().use_elliptic_key_verifier(public_key=public).set_hashing_config(everything)
    try:
        config.verify(folder, folder / SIGNATURE)
    except InvalidSignature as error:
        raise _refusal(folder / SIGNATURE, f"the signature is not {key.user}'s over this statement") from error
    except (ValueError, KeyError, TypeError) as error:
        # What was signed is genuine and not about these files: say which of them, if one of them it is.
        _check_statement(folder, _read_bundle(folder / SIGNATURE)[1])
        raise _refusal(folder / SIGNATURE, f"model-signing refuses it: {error}") from error


def _refusal(path: Path, what: str) -> Refused:
    return Refused(what, where=str(path), fix=_FIX)
