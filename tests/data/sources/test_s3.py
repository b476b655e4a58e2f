"""Sources in a bucket, read by s3fs from a real S3 server in another process."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.data.rows import build, many_rows, settings
from tests.s3_server import s3_environment
from tests.tiny import write_model
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


@pytest.mark.parametrize("path", ["s3://rows/none.jsonl", "s3://nobucket/*.jsonl"])
def test_what_is_not_there(tmp_path: Path, bucket: Any, path: str) -> None:
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


def test_the_command_line_says_that_credentials_are_missing(tmp_path: Path, bucket: Any) -> None:
    write_model(tmp_path / "base")
    (tmp_path / "p.txt").write_text("answer")
    data = {"sources": [{"path": "s3://rows/a.jsonl", "licence": "MIT"}], "privacy": {"entities": []}}
    project = {"name": "demo", "base": "./base", "data": data, "candidates": {"zero-shot": {"prompt": "p.txt"}}}
    (tmp_path / "tunesmith.yaml").write_text(json.dumps(project))
    without = ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_DEFAULT_REGION")
    environment = {name: value for name, value in os.environ.items() if name not in without} | {"HOME": str(tmp_path)}
    command = [sys.executable, "-m", "tunesmith", "data", "build", "--json", "-C", str(tmp_path)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 1, done.stderr
    assert "credentials" in done.stderr.lower()
    assert "Traceback" not in done.stderr
