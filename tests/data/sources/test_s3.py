"""Sources in a bucket, read by s3fs from a real S3 server in another process."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest

from tests.data.rows import build, many_rows, settings
from tests.s3_server import s3_environment
from tunesmith.core.digests import digest_bytes
from tunesmith.core.errors import TunesmithError, UsageError
from tunesmith.data.sources.remote import fetch

pytestmark = pytest.mark.slow

s3fs = pytest.importorskip("s3fs", reason="s3fs is not installed (extra: s3)")
pytest.importorskip("moto", reason="moto is not installed")

ROWS = "".join(json.dumps(one) + "\n" for one in many_rows(120)).encode()


@pytest.fixture
def bucket(s3: str, monkeypatch: pytest.MonkeyPatch) -> Any:
    """An s3fs file system with the bucket `rows`."""
    for name, value in s3_environment(s3).items():
        monkeypatch.setenv(name, value)
    s3fs.S3FileSystem.clear_instance_cache()
    system = s3fs.S3FileSystem()
    if not system.exists("rows"):
        system.mkdir("rows")
    system.pipe("rows/a.jsonl", ROWS)
    return system


def test_objects_are_rows_under_their_digest(tmp_path: Path, bucket: Any) -> None:
    body = build(tmp_path, settings("s3://rows/*.jsonl")).record.body
    assert body["rows"]["kept"] == 120
    assert [(one["path"], one["digest"]) for one in body["sources"]] == [("s3://rows/a.jsonl", digest_bytes(ROWS))]
    for path in ("s3://rows/none.jsonl", "s3://nobucket/*.jsonl"):
        with pytest.raises(UsageError, match="no file matches") as caught:
            build(tmp_path, settings(path))
        assert caught.value.where == path


def test_an_object_that_changes_while_it_is_fetched(bucket: Any) -> None:
    bucket.pipe("rows/large.bin", b"a" * (24 << 20))

    class Changing(io.BytesIO):
        def write(self, data: Any) -> int:
            if not self.tell():
                bucket.pipe("rows/large.bin", b"b" * (24 << 20))
            return super().write(data)

    with pytest.raises(TunesmithError, match="changed while it was fetched") as caught:
        fetch("s3://rows/large.bin", Changing())
    assert caught.value.where == "s3://rows/large.bin"


def test_missing_credentials_are_named(tmp_path: Path, bucket: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_DEFAULT_REGION"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path))
    s3fs.S3FileSystem.clear_instance_cache()
    with pytest.raises(TunesmithError, match=r"(?i)credentials") as caught:
        build(tmp_path, settings("s3://rows/a.jsonl"))
    assert caught.value.exit_code == 1
