"""Files of an installed package that are read as data: finds them without an import and checks their digest."""

from __future__ import annotations

import importlib.util
from pathlib import Path

from tunesmith.core.digests import digest_file, digest_of
from tunesmith.core.errors import Refused


def package_folders(package: str) -> list[Path]:
    """The folders of a package's files, without importing it; empty where it is not installed."""
    found = importlib.util.find_spec(package) if package.isidentifier() else None
    return [Path(place) for place in (found.submodule_search_locations or ())] if found else []


def folder_digest(folder: Path) -> str:
    """Digest of a folder's files by name, without byte code."""
    files = (path for path in folder.rglob("*") if path.is_file() and path.suffix != ".pyc")
    return digest_of({path.relative_to(folder).as_posix(): digest_file(path) for path in files})


def require_digest(folder: Path, found: str, expected: str, what: str) -> None:
    """Raise Refused where a folder's digest is not the expected one. what: for example "the spaCy package 'x'"."""
    if found != expected:
        raise Refused(
            f"the files of {what} are not the pinned ones",
            where=str(folder),
            fix=f"install it again; its digest is {found}, not {expected}",
        )
