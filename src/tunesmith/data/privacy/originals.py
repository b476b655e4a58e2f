"""The encrypted map from pseudonyms to originals, kept outside the store and only where the settings ask for it.

The map is encrypted with Fernet (AES-128-CBC with HMAC-SHA256). The key comes from the environment and is not stored.
A person with both the file and the key can undo the pseudonyms; the store and everything made from the dataset cannot.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from tunesmith.core.digests import canonical
from tunesmith.core.errors import NextStep, Refused, UsageError
from tunesmith.core.reading.strict_json import parse_json
from tunesmith.core.system.files import write_atomic
from tunesmith.data.settings import Privacy

if TYPE_CHECKING:
    from cryptography.fernet import Fernet

KEY = "TUNESMITH_ORIGINALS_KEY"
_STORE = ".tunesmith"


def check_originals(settings: Privacy, root: Path) -> None:
    """Check before a build that the map can be kept. Raises UsageError without a key, or for a path in the store."""
    if settings.originals is None:
        return
    path = (root / settings.originals).absolute()
    if _STORE in path.parts:
        raise UsageError(
            "the map from pseudonyms to originals must not be in the store",
            where="data.privacy.originals",
            fix="name a file outside .tunesmith",
        )
    _fernet()


def keep_originals(
    settings: Privacy, root: Path, originals: Mapping[str, Mapping[str, str]], kept: Iterable[str]
) -> None:
    """Write {example id: {pseudonym: original}} of the kept examples, readable by this user only."""
    if settings.originals is None:
        return
    known = {name: dict(originals[name]) for name in kept if name in originals}
    write_atomic(root / settings.originals, _fernet().encrypt(canonical(known)), mode=0o600)


def read_originals(path: Path) -> dict[str, dict[str, str]]:
    """Example id -> pseudonym -> original. Raises UsageError without the file, Refused for a wrong key."""
    from cryptography.fernet import InvalidToken

    try:
        data = path.read_bytes()
    except OSError as error:
        raise UsageError(f"the map cannot be read: {error.strerror}", where=str(path)) from error
    try:
        read: dict[str, dict[str, str]] = parse_json(_fernet().decrypt(data))
    except InvalidToken as error:
        raise Refused(f"${KEY} is not the key of this file, or the file was changed", where=str(path)) from error
    return read


def new_key() -> str:
    """A new key for the environment variable."""
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
            fix=NextStep("make one, and keep it apart from the file", "data originals", new_key=True),
        ) from error
