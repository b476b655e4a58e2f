"""Anchors: the newest entry of the audit log, kept outside the store.

Whoever can put back an old copy of the store puts back its whole log, which is then whole and verifies. An anchor that
was written meanwhile names an entry that the copy does not have.

A place is a file of JSON lines, to which lines are only added, or a folder of a bucket with S3 Object Lock. There each
anchor is an object that nobody can change or delete before its retention ends. Every version of each object is read, so
an object that was overwritten or hidden by a delete marker still counts.
"""

from __future__ import annotations

import fcntl
import os
import stat
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from pydantic import Field, StrictInt, ValidationError

from tunesmith.core.digests import canonical
from tunesmith.core.errors import Refused, TunesmithError, UsageError
from tunesmith.core.reading.strict_json import JsonObject
from tunesmith.core.system.files import sync_folder
from tunesmith.core.values import Digest, Frozen
from tunesmith.store.audit import Head

_LONGEST = 1 << 16  # bytes of one anchor, with its time stamp


class Anchor(Frozen):
    """One anchor. store: the digest of the log's first entry. seq, digest: the newest entry. time_stamp: base64."""

    store: Digest
    seq: StrictInt
    digest: Digest
    at: str = Field(pattern=r"^[0-9T:.Z-]{20,32}$")
    time_stamp: str = ""

    @property
    def head(self) -> Head:
        """The entry that it names."""
        return Head(seq=self.seq, digest=self.digest)

    @property
    def statement(self) -> bytes:
        """The bytes that a time stamp covers: canonical JSON of all other fields."""
        return canonical(self.model_dump(exclude={"time_stamp"}))

    @property
    def encoded(self) -> bytes:
        """Its line in a file, without the line break, and its object in a bucket."""
        return canonical(self.model_dump(exclude_defaults=True))


@dataclass
class AnchorsFound:
    """What a place holds. problems: what is in it but is no anchor, and what was done to it."""

    anchors: list[Anchor] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)

    def take(self, data: bytes, where: str) -> None:
        """Add one anchor, or say that it is none."""
        try:
            if len(data) > _LONGEST:
                raise ValueError
            self.anchors.append(Anchor.model_validate_json(data))
        except (ValidationError, ValueError):
            self.problems.append(f"{where} is not an anchor: it was cut off or edited")


def open_place(text: str, root: Path) -> FilePlace | BucketPlace:
    """The place that a person named. root: of the store. Raises UsageError for a place inside it, or no place."""
    if text.startswith("s3://"):
        bucket, _, prefix = text.removeprefix("s3://").partition("/")
        if not bucket:
            raise UsageError("this names no bucket", where=text[:200], fix="s3://BUCKET/FOLDER")
        return BucketPlace(bucket, prefix.strip("/"))
    if "://" in text or not text.strip() or "\0" in text:
        raise UsageError("an anchor is kept in a file or under s3://", where=text[:200], fix="name one of the two")
    path = Path(os.path.realpath(text))
    if path.is_relative_to(os.path.realpath(root)):
        raise UsageError(
            "this file is inside the store, so it would be put back together with it",
            where=str(path),
            fix="keep anchors on another machine or disk",
        )
    if os.path.islink(text) and not path.exists():
        raise UsageError("this is a link to nothing", where=str(path), fix="connect the disk that it names")
    return FilePlace(path)


class FilePlace:
    """A file of JSON lines. name: what the log and messages call it. Raises TunesmithError where it cannot be used."""

    def __init__(self, path: Path) -> None:
        self.path, self.name = path, str(path)

    def read(self) -> AnchorsFound:
        """All anchors, oldest first. A missing file holds none."""
        kept = AnchorsFound()
        try:
            with open(os.open(self.path, os.O_RDONLY | os.O_NONBLOCK), "rb") as stream:
                self._check_regular(stream.fileno())
                number = 0
                while line := stream.readline(_LONGEST + 2):
                    number += 1
                    whole = line.endswith(b"\n")
                    kept.take(line if whole else b"", f"line {number} of {self.name}")
                    if not whole:
                        break
        except FileNotFoundError:
            return kept
        except OSError as error:
            raise self._failed(error) from error
        return kept

    def write(self, anchor: Anchor, keep_until: datetime) -> datetime | None:
        """Add a line and sync it; None, since somebody can remove it. A line that does not fit is taken back."""
        line = anchor.encoded + b"\n"
        try:
            handle = os.open(self.path, os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_NONBLOCK, 0o644)
            try:
                self._check_regular(handle)
                fcntl.flock(handle, fcntl.LOCK_EX)
                size = os.fstat(handle).st_size
                if size and os.pread(handle, 1, size - 1) != b"\n":
                    raise Refused("the last line is cut off", where=self.name, fix="keep this file, start another one")
                if os.write(handle, line) != len(line):
                    os.ftruncate(handle, size)
                    raise TunesmithError("the anchor did not fit", where=self.name, fix="make room on that disk")
                os.fsync(handle)
            finally:
                os.close(handle)
            sync_folder(self.path.parent)
        except OSError as error:
            raise self._failed(error) from error
        return None

    def _check_regular(self, handle: int) -> None:
        if not stat.S_ISREG(os.fstat(handle).st_mode):
            raise UsageError("this is not a regular file", where=self.name, fix="name a file")

    def _failed(self, error: OSError) -> TunesmithError:
        what = f"the anchors cannot be read or written: {error.strerror or error}"
        return TunesmithError(what, where=self.name, fix="check that the folder exists and who may write there")


class BucketPlace:
    """A folder of a bucket with S3 Object Lock. Credentials and endpoint come from the environment (`AWS_...`).

    By s3fs and not by obstore, which keeps the blobs: obstore neither locks an object nor lists its versions, so it
    would not see an anchor behind a delete marker.
    """

    def __init__(self, bucket: str, prefix: str) -> None:
        self._bucket, self._prefix = bucket, f"{prefix}/" if prefix else ""
        self.name = f"s3://{bucket}/{self._prefix}".rstrip("/")

    def read(self) -> AnchorsFound:
        """The anchors of all versions of all objects in the folder, oldest first."""
        kept = AnchorsFound()
        versions, deleted = list[JsonObject](), set[str]()
        for page in self._pages():
            versions += page.get("Versions") or []
            deleted |= {marker["Key"] for marker in page.get("DeleteMarkers") or []}
        for one in sorted(versions, key=lambda one: (one["Key"], str(one["LastModified"]))):
            key, version = one["Key"], one["VersionId"]
            where = f"object {key!r} of {self.name}"  # anybody who can write there chose the key
            if one["Size"] > _LONGEST:
                kept.take(b"", where)
                continue
            # One request: several would ask for the newest version first, which may be a delete marker.
            kept.take(self._bytes(key, version), where)
            if key in deleted and self._locked(key, version):
                kept.problems.append(f"{where} was deleted before its retention ended; its locked version is there")
        return kept

    def write(self, anchor: Anchor, keep_until: datetime) -> datetime | None:
        """Put an object that nobody, the account's owner included, can change or delete before keep_until,
        which it returns."""
        what = self._call("get_object_lock_configuration").get("ObjectLockConfiguration") or {}
        if what.get("ObjectLockEnabled") != "Enabled":
            raise self._no_lock()
        self._call(
            "put_object",
            Key=f"{self._prefix}{anchor.seq:012d}-{anchor.digest[7:23]}.json",
            Body=anchor.encoded,
            ObjectLockMode="COMPLIANCE",
            ObjectLockRetainUntilDate=keep_until,
            ChecksumAlgorithm="SHA256",
        )
        return keep_until

    def _bytes(self, key: str, version: str) -> bytes:
        path = f"{self._bucket}/{key}"
        return bytes(self._try(lambda fs: fs.cat_file(path, version_id=version, max_concurrency=1)))

    def _pages(self) -> Iterator[JsonObject]:
        markers: dict[str, str] = {}
        while True:
            page = self._call("list_object_versions", Prefix=self._prefix, **markers)
            yield page
            if not page.get("IsTruncated"):
                return
            markers = {"KeyMarker": page["NextKeyMarker"], "VersionIdMarker": page["NextVersionIdMarker"]}

    def _locked(self, key: str, version: str) -> bool:
        until = self._call("head_object", Key=key, VersionId=version).get("ObjectLockRetainUntilDate")
        return isinstance(until, datetime) and until > datetime.now(UTC)

    def _call(self, method: str, **arguments: Any) -> JsonObject:
        answer: JsonObject = self._try(lambda fs: fs.call_s3(method, Bucket=self._bucket, **arguments))
        return answer

    def _try(self, call: Callable[[Any], Any]) -> Any:
        try:
            import s3fs
        except ImportError as error:
            raise TunesmithError(
                "s3:// needs the package s3fs", where=self.name, fix='pip install "tunesmith[s3]"'
            ) from error
        try:
            return call(s3fs.S3FileSystem())
        except Exception as error:
            if "ObjectLockConfigurationNotFound" in f"{error.__cause__} {error}":
                raise self._no_lock() from error
            what = f"the bucket cannot be used: {type(error).__name__}: {str(error)[:200]}"
            raise TunesmithError(what, where=self.name, fix="check bucket, credentials and permissions") from error

    def _no_lock(self) -> Refused:
        return Refused(
            "this bucket has no Object Lock, so anchors in it could be deleted",
            where=self.name,
            fix="make a bucket with Object Lock",
        )
