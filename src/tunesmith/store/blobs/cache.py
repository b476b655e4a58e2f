"""Local copies of objects that are kept elsewhere: a folder of bounded size. The least recently used ones go first."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

from tunesmith.core.digests import digest_file, digest_pieces
from tunesmith.core.system.files import room_for
from tunesmith.core.system.scratch import scratch_file, scratch_folder

_READ_ONLY = 0o400
_DIGESTS = "digests.json"
# A file that was used this many seconds ago may be about to be opened, so it stays even where the cache is full.
_IN_USE = 60.0


class FileCache:
    """Copies of files under names such as `blobs/ab/HEX`, and of folders. Several processes may use one.

    A copy is compared with its digest when this process first reads it, and again when the file changed; a damaged copy
    is as good as none. limit: bytes; what was used within the last minute may exceed it.
    """

    def __init__(self, root: Path, limit: int) -> None:
        self.root, self._limit = root, limit
        self._written = limit  # bytes since the files were last counted; at first they were never counted
        self._verified: dict[Path, tuple[int, int, int]] = {}
        self._counting = threading.Lock()

    def file(self, name: str, digest: str) -> Path | None:
        """The copy of a file whose bytes have this digest; None where there is none."""
        path = self.root / name
        if self._has(path, digest):
            _mark_used(path)
            return path
        path.unlink(missing_ok=True)
        return None

    def add(self, name: str, digest: str, pieces: Iterable[bytes]) -> Path | None:
        """Write a copy; None, and no copy, where the bytes do not have this digest."""
        path = self.root / name
        with room_for(path), scratch_file(self._incoming(), _READ_ONLY) as (scratch, stream):
            if digest_pieces(pieces, stream) != digest:
                return None
            stream.flush()
            path.parent.mkdir(parents=True, exist_ok=True)
            os.replace(scratch, path)
        self._verified[path] = _identity(path)
        _mark_used(path)
        self._make_room(path.stat().st_size)
        return path

    def move_in(self, name: str, source: Path) -> None:
        """Make a local file the copy. It is verified when it is read."""
        path = self.root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        os.chmod(source, _READ_ONLY)
        shutil.move(source, path)  # the cache may be on another disk
        _mark_used(path)
        self._make_room(path.stat().st_size)

    def drop(self, name: str) -> None:
        """Remove a copy. One that is not there is no error."""
        (self.root / name).unlink(missing_ok=True)

    def folder(self, name: str, key: str, files: Mapping[str, Callable[[], Iterable[bytes]]]) -> Path:
        """A folder called name with copies of files.

        key: names this state of the folder, so a folder with other contents has another key. files: path -> its bytes.
        """
        place = self.root / "folders" / key
        if not self._has_folder(place, name):
            with room_for(place), scratch_folder(self._incoming()) as scratch:
                digests = {path: _write(scratch / "new" / name / path, read()) for path, read in files.items()}
                (scratch / "new" / _DIGESTS).write_text(json.dumps(digests))
                place.parent.mkdir(parents=True, exist_ok=True)
                if place.exists():  # damaged
                    os.replace(place, scratch / "old")
                with contextlib.suppress(OSError):  # another process was faster
                    os.replace(scratch / "new", place)
            _mark_used(place)
            self._make_room(_bytes(place))
        _mark_used(place)
        return place / name

    def _has(self, path: Path, digest: str) -> bool:
        try:
            identity = _identity(path)
            if self._verified.get(path) == identity:
                return True
            whole = digest_file(path) == digest
        except FileNotFoundError:
            return False
        if whole:
            self._verified[path] = identity
        return whole

    def _has_folder(self, place: Path, name: str) -> bool:
        try:
            digests = json.loads((place / _DIGESTS).read_text())
            return all(self._has(place / name / path, digest) for path, digest in digests.items())
        except (FileNotFoundError, ValueError, AttributeError):
            return False

    def _incoming(self) -> Path:
        self.root.mkdir(parents=True, exist_ok=True, mode=0o700)
        folder = self.root / "incoming"
        folder.mkdir(exist_ok=True)
        return folder

    def _make_room(self, written: int) -> None:
        """Remove the least recently used copies where there are too many. Counts only after every 16th of the limit."""
        with self._counting:
            self._written += written
            if self._written < self._limit // 16:
                return
            self._written = 0
            copies = [*self.root.glob("blobs/*/*"), *self.root.glob("records/*/*"), *self.root.glob("folders/*")]
            copies += self.root.glob("current/*/*")
            sized = []
            for path in copies:
                with contextlib.suppress(FileNotFoundError):
                    sized.append((path.stat().st_atime, _bytes(path), path))
            total = sum(size for _, size, _ in sized)
            for used, size, path in sorted(sized):
                if total <= self._limit or used > time.time() - _IN_USE:
                    return
                shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink(missing_ok=True)
                self._verified.pop(path, None)
                total -= size


def _identity(path: Path) -> tuple[int, int, int]:
    status = path.stat()
    return status.st_ino, status.st_size, status.st_mtime_ns


def _mark_used(path: Path) -> None:
    with contextlib.suppress(FileNotFoundError):  # another process removed it
        os.utime(path, ns=(time.time_ns(), path.stat().st_mtime_ns))


def _bytes(path: Path) -> int:
    return sum(each.stat().st_size for each in path.rglob("*")) if path.is_dir() else path.stat().st_size


def _write(path: Path, pieces: Iterable[bytes]) -> str:
    """Write a file; returns its digest."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as stream:
        digest = digest_pieces(pieces, stream)
    path.chmod(_READ_ONLY)
    return digest
