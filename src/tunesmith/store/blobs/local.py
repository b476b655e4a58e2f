"""Blobs in a local folder: a key is a path under its root."""

from __future__ import annotations

import contextlib
import os
import stat
from collections.abc import Iterator
from pathlib import Path

from tunesmith.core.digests import pieces_of
from tunesmith.core.errors import Refused
from tunesmith.core.system.files import sync_folder, write_atomic
from tunesmith.core.system.scratch import SCRATCH

READ_ONLY = 0o444
_PRIVATE = 0o600


class LocalBlobs:
    """Implements BlobStore. Files are read-only, so that nobody edits one by accident."""

    def __init__(self, root: Path) -> None:
        self._root = root

    def put(self, key: str, data: bytes, *, private: bool = False) -> None:
        """Write an object, in place of one that is there."""
        write_atomic(self.path(key), data, mode=_PRIVATE if private else READ_ONLY)

    def put_file(self, key: str, source: Path) -> None:
        """Move a file on the same disk in. The caller has synced its bytes."""
        path = self.path(key)
        path.parent.mkdir(parents=True, exist_ok=True)
        os.chmod(source, source.stat().st_mode & READ_ONLY)
        os.replace(source, path)
        sync_folder(path.parent)

    def get(self, key: str) -> bytes:
        """An object's bytes. Raises FileNotFoundError."""
        return self.path(key).read_bytes()

    def pieces(self, key: str) -> Iterator[bytes]:
        """A file's bytes. Raises FileNotFoundError, and Refused for what is no regular file."""
        path = self.path(key)
        if not stat.S_ISREG(path.stat().st_mode):
            raise Refused("not a regular file", where=str(path), fix="restore the file")
        with path.open("rb") as stream:
            yield from pieces_of(stream)

    def path(self, key: str) -> Path:
        """The object's own file."""
        return self._root / key

    def folder(self, prefix: str) -> Path:
        """The folder itself."""
        return self._root / prefix

    def exists(self, key: str) -> bool:
        """Whether there is a file under a key."""
        return self.path(key).is_file()

    def keys(self, prefix: str) -> Iterator[str]:
        """Keys under a prefix. Links and devices are listed as they are: who reads one must check it."""
        paths = (path for path in self.folder(prefix).rglob("*") if path.is_symlink() or not path.is_dir())
        whole = (path for path in paths if not path.name.startswith(SCRATCH))
        yield from sorted(path.relative_to(self._root).as_posix() for path in whole)

    def entries(self, prefix: str) -> Iterator[tuple[str, int, float]]:
        """(key, bytes, seconds since 1970) of the objects under a prefix."""
        for key in self.keys(prefix):
            with contextlib.suppress(FileNotFoundError):  # it was deleted meanwhile
                status = self.path(key).lstat()
                yield key, status.st_size, status.st_mtime

    def delete(self, key: str) -> None:
        """Remove a file. Its folder stays, since another process may be about to write there."""
        self.path(key).unlink(missing_ok=True)

    def erase(self, key: str) -> str:
        """Remove a file. Nothing can lock it."""
        self.delete(key)
        return ""

    def where(self, key: str) -> str:
        """The file's path."""
        return str(self.path(key))
