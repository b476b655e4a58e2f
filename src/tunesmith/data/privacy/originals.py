"""The way back from pseudonyms: kept only where it was asked for, encrypted, outside the store.

Whoever has the file and the key can undo the pseudonyms; the store, its copies and everything made from the dataset
cannot. AES-128-CBC with HMAC-SHA256 (Fernet). The key is read from the environment and kept nowhere.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from tunesmith.core.digests import canonical
from tunesmith.core.errors import Refused, UsageError
from tunesmith.core.files import write_atomic
from tunesmith.data.building.account import Account
from tunesmith.data.settings import Privacy

if TYPE_CHECKING:
    from cryptography.fernet import Fernet

KEY = "TUNESMITH_ORIGINALS_KEY"
_STORE = ".tunesmith"


def check_originals(settings: Privacy, root: Path) -> None:
    """Before a row is read. Raises UsageError where the map could not be kept: no key, or a place in the store."""
    if settings.originals is None:
        return
    path = (root / settings.originals).absolute()
    if _STORE in path.parts:
        raise UsageError(
            "the map back lies apart from what it undoes, so not in the store",
            where="data.privacy.originals",
            fix="name a place that the store's copies do not reach",
        )
    _fernet()


def keep_originals(settings: Privacy, root: Path, account: Account, kept: Iterable[str]) -> None:
    """Write {example id: {pseudonym: original}} of the rows that were kept, readable by this user alone."""
    if settings.originals is None:
        return
    known = {name: account.originals[name] for name in kept if name in account.originals}
    write_atomic(root / settings.originals, _fernet().encrypt(canonical(known)), mode=0o600)


def read_originals(path: Path) -> dict[str, dict[str, str]]:
    """Example id -> pseudonym -> original. Raises UsageError without the file, Refused where the key is not its own."""
    from cryptography.fernet import InvalidToken

    try:
        data = path.read_bytes()
    except OSError as error:
        raise UsageError(f"the map cannot be read: {error.strerror}", where=str(path)) from error
    try:
        read: dict[str, dict[str, str]] = json.loads(_fernet().decrypt(data))
    except InvalidToken as error:
        raise Refused(f"${KEY} is not the key of this file, or the file was changed", where=str(path)) from error
    return read


def new_key() -> str:
    """A key for the environment variable."""
    from cryptography.fernet import Fernet

    return Fernet.generate_key().decode()


def _fernet() -> Fernet:
    from cryptography.fernet import Fernet

    key = os.environ.get(KEY, "")
    try:
        return Fernet(key)
    except ValueError as error:
        raise UsageError(
            f"${KEY} holds no key for the map from pseudonyms to originals",
            where="data.privacy.originals",
            fix="`tunesmith data originals --new-key` prints one; keep it apart from the file",
        ) from error
