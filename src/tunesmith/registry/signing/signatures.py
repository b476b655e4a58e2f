"""The signature of a version's folder: strict copying, signing and verifying with model-signing.

model-signing alone is not enough (version 1.1.1). It skips `.git*`, ignores paths that the signer chose to ignore,
accepts a manifest without files, and uses the older of two formats if a signature says so. So a folder may hold only
allowed plain files, and the signed statement must be, byte for byte, the one that we would make about exactly these
files. Verification reads a private copy, so that nobody can replace a file between its verification and its use.
"""

from __future__ import annotations

import base64
import binascii
import contextlib
import errno
import os
import shutil
import stat
from collections.abc import Iterator, Sequence
from pathlib import Path

from tunesmith.core.digests import canonical, digest_file
from tunesmith.core.errors import NextStep, Refused, TunesmithError
from tunesmith.core.reading.strict_json import JsonObject, parse_json
from tunesmith.core.system.files import room_for, sync_folder, write_atomic
from tunesmith.core.system.scratch import scratch_folder
from tunesmith.core.text.names import Scope
from tunesmith.models.weight_files import ADAPTER_FILE, CONFIG_FILE, MODEL_FILE
from tunesmith.registry.licence_duties import NOTICE
from tunesmith.store.people.roles import permits
from tunesmith.store.people.trust import TrustedKey, find_key

RELEASE, SIGNATURE = "release.json", "model.sig"
ALLOWED = frozenset((CONFIG_FILE, ADAPTER_FILE, MODEL_FILE, NOTICE, RELEASE, SIGNATURE))
_MAX_BYTES = {RELEASE: 64 << 20, NOTICE: 64 << 20, SIGNATURE: 1 << 20, CONFIG_FILE: 64 << 10}
_MEDIA_TYPE = "application/vnd.dev.sigstore.bundle.v0.3+json"
PAYLOAD_TYPE = "application/vnd.in-toto+json"
STATEMENT = "https://in-toto.io/Statement/v1"
_PREDICATE = "https://model_signing/signature/v1.0"
FIX = "restore the version's folder from where it was signed, or register it again"
# What a signature does, in words.
_ACTS = {
    "version.register": "sign versions",
    "version.override": "override gates",
    "version.approve": "approve versions",
    "version.hold": "hold versions",
    "hold.end": "end holds",
    "paper.write": "write papers",
    "erase.plan": "plan erasures",
    "erase.confirm": "confirm erasures",
}
_PASSING = (errno.EMFILE, errno.ENFILE, errno.ENOMEM)  # they say nothing about the folder


class Untrusted(Refused):
    """The key that signed is not trusted here, or its owner may not sign this. The signature itself may be valid."""


class Expired(Refused):
    """The time that the version was signed for is over."""


def sign_folder(folder: Path, private_key: Path) -> None:
    """Sign every file in folder, without exception, into folder/model.sig. The subject is the folder's name."""
    from model_signing import hashing, signing

    everything = hashing.Config().set_ignored_paths(paths=[], ignore_git_paths=False)
    config = signing.Config().use_elliptic_key_signer(private_key=private_key).set_hashing_config(everything)
    signature = folder / SIGNATURE
    config.sign(folder, signature)
    # Rewritten in canonical form, so that no byte of it can be changed unnoticed.
    write_atomic(signature, canonical(parse_json(signature.read_bytes())))


def verify_signature(folder: Path, keys: Sequence[TrustedKey]) -> TrustedKey:
    """The key that signed folder/model.sig, which must cover exactly the folder's other files.

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
            fix=NextStep("have its owner enrol it, or verify with the list that has it", "keys enrol"),
        )
    _check_cryptography(folder, key)
    _check_statement(folder, statement)
    return key


def check_in_time(key: TrustedKey, digest: str, where: str) -> None:
    """Raise Untrusted unless the audit log recorded a key's signature over a digest while the key was active."""
    if not key.counts_for(digest):
        raise Untrusted(
            f"signed with {key.user}'s key {key.label}, which was {key.status} before",
            where=where,
            fix="register or approve it again with an active key",
        )


def check_may_sign(
    key: TrustedKey,
    action: str,
    digest: str,
    where: str,
    scope: Scope = Scope(),
    *,
    apart_from: TrustedKey | None = None,
    stands: bool = False,
) -> None:
    """Raise Untrusted unless a signature counts. Every kind of statement asks this, and nothing else.

    action: what the statement does, one of roles.ACTIONS. digest: of what was signed. scope: what it is about.
    apart_from: the key of the other person whom it takes. stands: what it does is done once: a signature that the audit
    log recorded in time then counts whatever became of its person.
    """
    act = _ACTS[action]
    if apart_from is not None and (key.user == apart_from.user or key.fingerprint == apart_from.fingerprint):
        raise Untrusted(f"{key.user} may not {act} that they signed before", where=where, fix="it takes another person")
    if stands and digest in key.signed:
        return
    fix = f"have an active user of that tenant and region who may {act} do it"
    if not key.active:
        raise Untrusted(f"signed by {key.user}, who is deactivated", where=where, fix=fix)
    check_in_time(key, digest, where)
    if not permits(key.roles, action):
        roles = ", ".join(key.roles)
        raise Untrusted(f"{key.user} may not {act}: their roles are {roles}", where=where, fix=fix)
    if not key.scope.covers(scope):
        raise Untrusted(f"{key.user} does not speak for {scope}", where=where, fix=fix)


@contextlib.contextmanager
def private_copy(folder: Path) -> Iterator[Path]:
    """A temporary copy of a version's folder that only this user can read. It keeps the folder's name.

    Raises Refused unless the folder holds only allowed, regular files without hard links; TunesmithError where it
    cannot be copied now, since the disk is full or too many files are open. Errors that are raised while
    the copy is in use name the original's path.
    """
    with scratch_folder() as private:
        copy = private / folder.name
        copy.mkdir(mode=0o700)
        with room_for(copy):
            _copy_plain(folder, copy)
        try:
            yield copy
        except TunesmithError as error:
            if error.where is not None:
                error.where = error.where.replace(str(copy), str(folder))
            raise


def sync_files(folder: Path) -> None:
    """fsync every file in folder, its folders and the folder itself, before it is renamed into place."""
    for path in (*folder.rglob("*"), folder):
        if path.is_dir():
            sync_folder(path)
            continue
        with path.open("rb") as stream:
            os.fsync(stream.fileno())


def _copy_plain(folder: Path, target: Path) -> None:
    try:
        handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except OSError as error:
        _raise_passing(folder, error)
        what = "the version's folder is missing" if error.errno == errno.ENOENT else "not a folder, or a link to one"
        raise Refused(what, where=str(folder), fix=FIX) from error
    try:
        names = sorted(os.listdir(handle))
        for name in names:
            if name not in ALLOWED:
                raise _refusal(folder / name, "not a file that a version has")
        for name in (RELEASE, SIGNATURE):
            if name not in names:
                raise _refusal(folder / name, "missing")
        for name in names:
            _copy_file(handle, folder / name, target / name)
    finally:
        os.close(handle)


def _copy_file(folder: int, path: Path, target: Path) -> None:
    # First opened, then checked through the open file, so that the checked file is the copied one. O_NONBLOCK, because
    # a FIFO would wait for a writer.
    try:
        handle = os.open(path.name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, dir_fd=folder)
    except OSError as error:
        _raise_passing(path, error)
        raise _refusal(
            path, "a link" if error.errno == errno.ELOOP else f"cannot be opened: {error.strerror}"
        ) from error
    with contextlib.ExitStack() as opened:
        opened.callback(os.close, handle)
        facts = os.fstat(handle)
        if not stat.S_ISREG(facts.st_mode):
            raise _refusal(path, "not a regular file")
        if facts.st_nlink != 1:
            raise _refusal(path, "has another name too (a hard link)")
        if facts.st_size > _MAX_BYTES.get(path.name, facts.st_size):
            raise _refusal(path, f"{facts.st_size} bytes, at most {_MAX_BYTES[path.name]} are allowed")
        with open(handle, "rb", closefd=False) as source, target.open("xb") as copy:
            shutil.copyfileobj(source, copy, 1 << 20)


def _raise_passing(path: Path, error: OSError) -> None:
    if error.errno in _PASSING:
        raise TunesmithError(f"cannot be opened now: {error.strerror}", where=str(path), fix="try again") from error


def _read_bundle(path: Path) -> tuple[str, JsonObject]:
    """The key's hint (64 hex digits) and the signed statement of a bundle, which must have the form that we write."""
    raw = path.read_bytes()
    try:
        document = parse_json(raw)
        envelope = document["dsseEnvelope"]
        hint = document["verificationMaterial"]["publicKey"]["hint"]
        payload, signature = envelope["payload"], envelope["signatures"][0]["sig"]
        expected = {
            "mediaType": _MEDIA_TYPE,
            "verificationMaterial": {"publicKey": {"hint": hint}, "tlogEntries": []},
            "dsseEnvelope": dsse(payload, "", signature),
        }
        if document != expected or canonical(document) != raw:
            raise ValueError("not in the form tunesmith signs in")
        check_base64(payload, signature)
        statement = parse_json(base64.b64decode(payload))
        if not isinstance(hint, str) or not isinstance(statement, dict):
            raise ValueError("not a statement by a key")
    except (ValueError, KeyError, IndexError, TypeError, binascii.Error, TunesmithError) as error:
        raise _refusal(path, f"not a signature: {type(error).__name__} {str(error)[:120]}") from error
    return hint, statement


def _check_statement(folder: Path, statement: JsonObject) -> None:
    """Compare the signed statement with the folder's files. Raises Refused with the file that differs."""
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
            raise _refusal(folder / name, "was signed but is missing")
        if actual[name] != signed[name]:
            raise _refusal(folder / name, "its bytes are not the ones that were signed")
    expected = {
        "_type": STATEMENT,
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
        raise _refusal(signature, "the signed statement is not exactly about these files in this folder")


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
        # The signature is genuine but not about these files: name the file that differs, if there is one.
        _check_statement(folder, _read_bundle(folder / SIGNATURE)[1])
        raise _refusal(folder / SIGNATURE, f"model-signing refuses it: {error}") from error


def dsse(payload: str, keyid: str, signature: str) -> JsonObject:
    """A DSSE envelope. payload, signature: base64."""
    return {
        "payload": payload,
        "payloadType": PAYLOAD_TYPE,
        "signatures": [{"keyid": keyid, "sig": signature}],
    }


def check_base64(*texts: str) -> None:
    """Raise ValueError unless each text is the one spelling of its bytes in base64."""
    for text in texts:
        if base64.b64encode(base64.b64decode(text, validate=True)).decode() != text:
            raise ValueError("base64 with stray bits")


def _refusal(path: Path, what: str) -> Refused:
    return Refused(what, where=str(path), fix=FIX)
