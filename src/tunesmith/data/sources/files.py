"""Source files: finds the files that a project names, opens them safely, and reads their rows."""

from __future__ import annotations

import contextlib
import glob
import itertools
import os
import stat
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from tunesmith.core.digests import digest_pieces, pieces_of
from tunesmith.core.errors import TunesmithError, UsageError
from tunesmith.core.reading.strict_json import JsonObject, parse_json
from tunesmith.core.reading.text_files import read_text_file
from tunesmith.core.system.files import room_for
from tunesmith.core.system.scratch import scratch_folder
from tunesmith.data.formats.row_readers import WHOLE, Part, SourceRow
from tunesmith.data.settings import Source
from tunesmith.data.sources import remote
from tunesmith.data.sources.compression import require_content, suffixes_of, unpacked
from tunesmith.data.sources.document_readers import Paragraphs
from tunesmith.data.sources.file_types import DOCUMENT_FILES, ROW_FILES, RowFile

_LOCAL = ("file", "local")


class SourceFile(NamedTuple):
    """A file and the source settings that name it.

    name: what records call it: its path relative to the project, its URL, or the source's name. path: its local path;
    None for a URL.
    """

    name: str
    path: Path | None
    source: Source

    def digest(self) -> str:
        """The digest of the file's present bytes."""
        with open_source(self) as opened:
            return opened.digest


def find_files(sources: Sequence[Source], root: Path) -> list[SourceFile]:
    """The files that the sources name, sorted by name.

    Raises UsageError for a pattern that matches no file, a file that two sources name, and anything but a regular file.
    """
    files = sorted((file for source in sources for file in _files_of(source, root)), key=lambda file: file.name)
    for file, after in itertools.pairwise(files):
        if file.name == after.name:
            fix = "change their patterns so that none overlap"
            raise UsageError("two sources name the same file", where=file.name, fix=fix)
    return files


def _files_of(source: Source, root: Path) -> Iterator[SourceFile]:
    protocol, pattern = remote.protocol_of(source.path), source.path
    if protocol in _LOCAL:
        pattern = pattern.split("://", 1)[1]
    elif protocol is not None:
        yield from (SourceFile(url, None, source) for url in remote.find_remote(pattern))
        return
    exact = os.path.lexists(root / pattern)  # a file name may contain brackets and stars
    matches = [pattern] if exact else sorted(glob.glob(pattern, root_dir=root, recursive=True))
    if not matches:
        fix = f"paths start at {root.absolute()}"
        for folder in (root / pattern).parents:
            if folder.is_dir() and not os.access(folder, os.R_OK | os.X_OK, effective_ids=True):
                fix = f"this user may not read the folder {folder.name}"
        raise UsageError("no file matches this source", where=source.path, fix=fix)
    for match in matches:
        path = root / match
        name = source.name or Path(os.path.relpath(path, root)).as_posix()
        inside = dataset_files(path, name) if stat.S_ISDIR(os.lstat(path).st_mode) else None
        for file, place in [(name, path)] if inside is None else [(f"{name}/{each}", path / each) for each in inside]:
            _require_regular(os.lstat(place).st_mode, file)
            yield SourceFile(file, place, source)


class OpenSource:
    """An open source file: its rows and the digest of its bytes (as stored, so compressed where the file is).

    digested: False leaves the digest empty, to read a part of a file whose digest is known already.
    """

    def __init__(self, file: SourceFile, stream: BinaryIO, *, digested: bool = True) -> None:
        self.file, self._stream = file, stream
        self.bytes = os.fstat(stream.fileno()).st_size
        if self.bytes == 0:
            raise UsageError("the file is empty", where=file.name, fix="add rows to it, or remove it from the sources")
        self._kind, self._packed = suffixes_of(file.name)
        require_content(stream, file.name)
        self.digest = _digest(stream) if digested else ""

    def position(self) -> int:
        """Bytes read so far, for progress."""
        return self._stream.tell()

    def rows(self) -> Iterator[SourceRow]:
        """The rows in order. Raises UsageError for a file without rows, TunesmithError if it changes meanwhile.

        Raises UsageError at the first row that cannot be read.
        """
        count = 0
        for row in self.read(WHOLE):
            count += 1
            yield row
        if count == 0:
            raise UsageError("the file holds no rows", where=self.file.name)
        if _digest(self._stream) != self.digest:
            raise TunesmithError("the file changed while it was read", where=self.file.name, fix="run again")

    def read(self, part: Part) -> Iterator[SourceRow]:
        """The rows of a part of the file; there may be none."""
        kind, name = self._row_file(), self.file.name
        self._stream.seek(0)
        stream = self._stream if self._packed is None else unpacked(self._stream, name, self._packed)
        for number, fields in kind.read(stream, name, part):
            yield SourceRow(name, number, fields)

    def parts(self, size: int) -> list[Part]:
        """Parts of the file that can be read separately, of about `size` bytes; one part where its type allows none."""
        kind = self._row_file()
        if self._packed is not None or kind.split is None:
            return [WHOLE]
        return kind.split(self._stream, self.file.name, size) or [WHOLE]

    def paragraphs(self) -> Paragraphs:
        """(headings above, paragraph) of a document, in order. Raises UsageError for a document that cannot be read."""
        self._stream.seek(0)
        kind = DOCUMENT_FILES[self._kind]
        try:
            yield from kind.read(self._stream.read(), self.file.name)
        except ImportError as error:
            what, fix = f"{kind.name} needs {error.name}, which is not installed", "pip install 'tunesmith[documents]'"
            raise UsageError(what, where=self.file.name, fix=fix) from error

    def _row_file(self) -> RowFile:
        if self._kind not in ROW_FILES:
            kind = self._kind or "a file without a suffix"
            raise UsageError(
                f"rows cannot be read from {kind}",
                where=self.file.name,
                fix=f"convert it to one of {', '.join(sorted(ROW_FILES))}, and give the file that ending",
            )
        return ROW_FILES[self._kind]


@contextlib.contextmanager
def open_source(file: SourceFile, *, digested: bool = True) -> Iterator[OpenSource]:
    """Open a regular file; a remote one is first downloaded into the folder for temporary files.

    Raises UsageError for a folder, link, FIFO, socket or device, without waiting for it.
    """
    with fetched(file) as here:
        assert here.path is not None
        try:
            stream = open(here.path, "rb", opener=_without_waiting)  # noqa: SIM115 - closed below
        except OSError as error:
            raise UsageError(f"cannot be opened: {error.strerror}", where=file.name) from error
        with stream:
            _require_regular(os.fstat(stream.fileno()).st_mode, file.name)
            yield OpenSource(file, stream, digested=digested)


@contextlib.contextmanager
def fetched(file: SourceFile, folder: Path | None = None) -> Iterator[SourceFile]:
    """The file itself where it is local, else a copy that exists until the context ends.

    folder: for the copy; None: the folder for temporary files.
    """
    if file.path is not None:
        yield file
        return
    with scratch_folder(folder) as scratch:
        copy = scratch / "fetched"
        with room_for(copy), copy.open("wb") as stream:
            remote.fetch(file.name, stream)
        yield SourceFile(file.name, copy, file.source)


def _without_waiting(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)


def _require_regular(mode: int, name: str) -> None:
    if stat.S_ISREG(mode):
        return
    kinds = {stat.S_IFDIR: "a folder", stat.S_IFLNK: "a link", stat.S_IFIFO: "a FIFO", stat.S_IFSOCK: "a socket"}
    kind = kinds.get(stat.S_IFMT(mode), "a device")
    raise UsageError(f"this is {kind}, not a file", where=name, fix="name a regular file, or a pattern of files")


def _digest(stream: BinaryIO) -> str:
    stream.seek(0)
    return digest_pieces(pieces_of(stream))


_STATE, _INFO, _SPLITS = "state.json", "dataset_info.json", "dataset_dict.json"


def dataset_files(folder: Path, name: str) -> list[str] | None:
    """Names of the .arrow files of a saved dataset, in order; None for any other folder.

    state.json lists the files and dataset_info.json describes them. Raises UsageError for a folder of several splits
    (name one of them instead) and for a list of files that cannot be followed.
    """
    if (folder / _SPLITS).is_file():
        names = _read(folder / _SPLITS, f"{name}/{_SPLITS}").get("splits")
        listed = names if isinstance(names, list) else []
        raise UsageError(
            f"the folder holds {len(listed)} splits of a dataset: {', '.join(map(str, listed))}",
            where=name,
            fix=f"name one, as {name}/{listed[0] if listed else 'train'}; held-out rows are chosen from what is read",
        )
    if not (folder / _STATE).is_file():
        return None
    where = f"{name}/{_STATE}"
    if not (folder / _INFO).is_file():
        raise UsageError(f"the dataset's folder has no {_INFO}", where=name, fix="save the dataset again")
    state = _read(folder / _STATE, where)
    if state.get("_indices_data_files") or state.get("_indices_files"):
        raise UsageError(
            "the dataset is a selection of rows of another one",
            where=where,
            fix="call flatten_indices() and save it again",
        )
    files = state.get("_data_files")
    if not isinstance(files, list) or not files:
        raise UsageError("no files are listed under _data_files", where=where, fix="save the dataset again")
    return [_plain(entry, folder, where) for entry in files]


def _plain(entry: Any, folder: Path, where: str) -> str:
    """A listed file's name. Raises UsageError for a path that leads out of the folder."""
    name = entry.get("filename") if isinstance(entry, dict) else None
    if not isinstance(name, str) or Path(name).name != name or Path(name).suffix != ".arrow":
        raise UsageError(
            f"{str(name)[:80]!r} is not an .arrow file of this folder", where=where, fix="save the dataset again"
        )
    if not (folder / name).exists():
        raise UsageError(f"{name} is listed but missing", where=where, fix="copy the whole folder")
    return name


def _read(path: Path, where: str) -> JsonObject:
    try:
        value = parse_json(read_text_file(path, "the file"))
    except ValueError as error:
        raise UsageError(f"cannot be read: {error}", where=where, fix="save the dataset again") from error
    if not isinstance(value, dict):
        raise UsageError("is not a JSON object", where=where, fix="save the dataset again")
    return value
