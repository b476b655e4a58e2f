"""Files of an installed package that are read as data: found without importing it, held against their digest."""

from __future__ import annotations

import importlib.util
from pathlib import Path

from tunesmith.core.digests import digest_file, digest_of
from tunesmith.core.errors import Refused


def package_folders(package: str) -> list[Path]:
    """Where a package's files lie; none where it is not installed. The package is not imported."""
    found = importlib.util.find_spec(package) if package.isidentifier() else None
    return [Path(place) for place in (found.submodule_search_locations or ())] if found else []


def folder_digest(folder: Path) -> str:
    """Digest of a folder's files by name, byte code left out."""
    files = (path for path in folder.rglob("*") if path.is_file() and path.suffix != ".pyc")
    return digest_of({path.relative_to(folder).as_posix(): digest_file(path) for path in files})


def hold(folder: Path, found: str, expected: str, what: str) -> None:
    """Raises Refused where a folder's digest is not the expected one. what: "the spaCy package 'x'"."""
    if found != expected:
        raise Refused(
            f"the files of {what} are not the pinned ones",
            where=str(folder),
            fix=f"install it again; its digest is {found}, not {expected}",
        )
