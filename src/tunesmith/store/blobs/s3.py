"""Blobs in a bucket of an S3-compatible store, with a local cache.

Credentials, region and endpoint come from the environment (`AWS_ACCESS_KEY_ID`, `AWS_SECRET_ACCESS_KEY`,
`AWS_SESSION_TOKEN`, `AWS_REGION`, `AWS_ENDPOINT_URL`), else from the machine's role.
"""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Iterator
from datetime import timedelta
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from tunesmith.core.clock import iso
from tunesmith.core.digests import digest_of
from tunesmith.core.errors import Refused, TunesmithError, UsageError
from tunesmith.core.reading.strict_json import JsonObject
from tunesmith.core.system.files import write_atomic
from tunesmith.store.blobs import named_digest
from tunesmith.store.blobs.cache import FileCache

try:
    from obstore.exceptions import (
        AlreadyExistsError,
        BaseError,
        PermissionDeniedError,
        UnauthenticatedError,
    )
    from obstore.store import S3Store
except ImportError as error:
    raise TunesmithError(
        "a store in a bucket needs the package obstore", where="TUNESMITH_BLOBS_URL", fix='pip install "tunesmith[s3]"'
    ) from error

if TYPE_CHECKING:
    from obstore import ObjectMeta

_BUCKET = re.compile(r"[a-z0-9][a-z0-9.-]{1,61}[a-z0-9]")
_CODE = re.compile(r"<Code>(\w+)</Code>")
_PART = 8 << 20
_MOST_PARTS = 9_000  # S3 takes 10,000
_PIECE = 1 << 20
_RETRY = timedelta(seconds=30)
_NEEDS = (
    "it needs s3:ListBucket, s3:GetObject, s3:PutObject and s3:DeleteObject; "
    "to erase also s3:ListBucketVersions, s3:DeleteObjectVersion and s3:GetObjectRetention"
)


class S3Blobs:
    """Implements BlobStore on a bucket.

    url: `s3://BUCKET/PREFIX`. cache: a local folder for copies of at most `limit` bytes. Blobs, records and version
    folders are cached; everything else is read from the bucket each time. Raises TunesmithError where the bucket cannot
    be used, after retries for 30 seconds.
    """

    def __init__(self, url: str, cache: Path, limit: int) -> None:
        parts = urlsplit(url)
        self._bucket, self._prefix = parts.netloc, parts.path.strip("/")
        if parts.scheme != "s3" or not _BUCKET.fullmatch(self._bucket) or parts.query or parts.fragment:
            raise UsageError(f"{url[:200]!r} is not a place for blobs", where="TUNESMITH_BLOBS_URL", fix=_URL_HELP)
        self._url = f"s3://{self._bucket}/{self._prefix}".rstrip("/")
        self._cache = FileCache(cache, limit)

    def put(self, key: str, data: bytes, *, private: bool = False) -> None:
        """Write an object. One whose key names its content is left as it is where it exists."""
        digest = named_digest(key)
        with self._told(key):
            if digest is None:
                self._store.put(key, data)
            else:
                self._create(key, data)
        if digest is not None:
            self._cache.add(key, digest, [data])

    def put_file(self, key: str, source: Path) -> None:
        """Upload a file in parts. The file is used up."""
        size, named = source.stat().st_size, named_digest(key) is not None
        with self._told(key):
            if named and size <= _PART:
                self._create(key, source)
            # An upload in parts cannot ask for "only where there is none". Two of one content write the same bytes.
            elif not named or self._size(key) != size:
                part = max(_PART, -(-size // _MOST_PARTS))
                self._store.put(key, source, use_multipart=size > _PART, chunk_size=part, max_concurrency=4)
        if named:
            self._cache.move_in(key, source)
        else:
            source.unlink()

    def get(self, key: str) -> bytes:
        """An object's bytes. Raises FileNotFoundError."""
        return b"".join(self.pieces(key)) if named_digest(key) is None else self.path(key).read_bytes()

    def pieces(self, key: str) -> Iterator[bytes]:
        """An object's bytes from the bucket, never from the cache. Raises FileNotFoundError."""
        with self._told(key):
            for piece in self._store.get(key).stream(min_chunk_size=_PIECE):
                yield bytes(piece)

    def path(self, key: str) -> Path:
        """A copy in the cache. Raises Refused where the object's bytes are not those that its key names."""
        digest = named_digest(key)
        if digest is None:
            return self._current(key)
        try:
            copy = self._cache.file(key, digest) or self._cache.add(key, digest, self.pieces(key))
        except FileNotFoundError:
            return self._cache.root / key
        if copy is None:
            raise Refused("the object's bytes do not have that digest", where=self.where(key), fix=_RESTORE)
        return copy

    def folder(self, prefix: str) -> Path:
        """A copy in the cache of the objects that are there now."""
        listed = self._list(prefix)
        facts = [[one["path"], one["size"], one["e_tag"], one["last_modified"].isoformat()] for one in listed]
        key, name = digest_of([self._url, prefix, facts]).removeprefix("sha256:"), prefix.rstrip("/").rsplit("/", 1)[-1]
        if not listed:
            return self._cache.root / "folders" / key / name
        files = {one["path"].removeprefix(prefix): partial(self.pieces, one["path"]) for one in listed}
        try:
            return self._cache.folder(name, key, files)
        except FileNotFoundError as error:
            fix = "run the same command again"
            raise TunesmithError("the folder changed while it was read", where=self.where(prefix), fix=fix) from error

    def exists(self, key: str) -> bool:
        """Whether there is an object under a key, in the bucket now."""
        with self._told(key):
            return self._size(key) is not None

    def keys(self, prefix: str) -> Iterator[str]:
        """Keys under a prefix."""
        yield from (one["path"] for one in self._list(prefix))

    def entries(self, prefix: str) -> Iterator[tuple[str, int, float]]:
        """(key, bytes, seconds since 1970) of the objects under a prefix."""
        yield from ((one["path"], one["size"], one["last_modified"].timestamp()) for one in self._list(prefix))

    def delete(self, key: str) -> None:
        """Remove an object and its copy in the cache."""
        with self._told(key):
            self._store.delete(key)
        self._cache.drop(f"current/{key}" if named_digest(key) is None else key)

    def erase(self, key: str) -> str:
        """Remove an object with all versions that the bucket keeps. Returns until when one is locked."""
        self.delete(key)
        name = "/".join(filter(None, (self._prefix, key)))
        page = self._call("list_object_versions", Prefix=name)
        listed = [one for kind in ("Versions", "DeleteMarkers") for one in page.get(kind) or () if one["Key"] == name]
        for one in listed:  # its delete markers last: one stays before a version that is locked
            named = {"Key": one["Key"], "VersionId": one["VersionId"]}
            try:
                self._call("delete_object", **named)
            except TunesmithError as error:
                if not isinstance(error.__cause__, PermissionError):
                    raise
                until = self._call("head_object", **named).get("ObjectLockRetainUntilDate")
                return iso(until) if until else "its legal hold ends"
        return ""

    def _call(self, method: str, **arguments: Any) -> JsonObject:
        """What obstore cannot do: it knows no versions."""
        try:
            import s3fs

            answer: JsonObject = s3fs.S3FileSystem().call_s3(method, Bucket=self._bucket, **arguments)
        except Exception as error:
            raise self._failed(arguments.get("Key", ""), error) from error
        return answer

    def where(self, key: str) -> str:
        """The object's URL."""
        return f"{self._url}/{key}".rstrip("/")

    @cached_property
    def _store(self) -> S3Store:
        """The bucket, which was seen to exist: a missing object and a missing bucket are not told apart later."""
        endpoints = [os.environ.get(name, "") for name in ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL", "AWS_ENDPOINT")]
        store = S3Store(
            self._bucket,
            prefix=self._prefix or None,
            client_options={
                "allow_http": any(url.startswith("http://") for url in endpoints),
                "connect_timeout": timedelta(seconds=5),
                "read_timeout": timedelta(seconds=60),
                "timeout": timedelta(hours=1),  # of a whole file; the default of 30 seconds cuts large ones off
            },
            retry_config={"max_retries": 100, "retry_timeout": _RETRY},
        )
        with self._told(""):
            next(iter(store.list(chunk_size=1)), None)
        return store

    def _create(self, key: str, data: bytes | Path) -> None:
        with contextlib.suppress(AlreadyExistsError):
            self._store.put(key, data, mode="create", use_multipart=False)

    def _size(self, key: str) -> int | None:
        """An object's bytes; None where there is none."""
        try:
            return self._store.head(key)["size"]
        except FileNotFoundError:
            return None

    def _list(self, prefix: str) -> list[ObjectMeta]:
        with self._told(prefix):
            objects = [one for some in self._store.list(prefix=prefix) for one in some]
        return sorted(objects, key=lambda one: one["path"])

    def _current(self, key: str) -> Path:
        """A local file with the object's bytes now, since an object under such a key may change."""
        path = self._cache.root / "current" / key
        try:
            write_atomic(path, self.get(key), mode=0o600)
        except FileNotFoundError:
            path.unlink(missing_ok=True)
        return path

    @contextlib.contextmanager
    def _told(self, key: str) -> Iterator[None]:
        """Raise FileNotFoundError where there is no object, TunesmithError for all else that the bucket answers."""
        try:
            yield
        except FileNotFoundError as error:
            if "NoSuchBucket" not in str(error):
                raise FileNotFoundError(self.where(key)) from error
            raise self._failed(key, error) from error
        except BaseError as error:
            raise self._failed(key, error) from error

    def _failed(self, key: str, error: Exception) -> TunesmithError:
        text = str(error)
        code = match[1] if (match := _CODE.search(text)) else ""
        denied = isinstance(error, PermissionDeniedError | UnauthenticatedError | PermissionError)
        denied |= " 403 " in text or " 401 " in text
        if code == "NoSuchBucket":
            what, fix = f"there is no bucket {self._bucket}", f"create it, or change TUNESMITH_BLOBS_URL: {_URL_HELP}"
        elif "169.254.169.254" in text:
            what, fix = "there are no credentials for the bucket", "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"
        elif denied:
            what, fix = f"the bucket denies access ({code or 'forbidden'})", f"check the AWS_... variables; {_NEEDS}"
        else:
            what = f"the bucket cannot be used: {code or text.splitlines()[0][:300]}"
            fix = "check the network and AWS_ENDPOINT_URL, then run the same command again"
        return TunesmithError(what, where=self.where(key), fix=fix)


_URL_HELP = "write s3://BUCKET/PREFIX"
_RESTORE = "restore the object from a backup"
