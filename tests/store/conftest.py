"""An empty store whose owner will be olive, and buckets on an S3 server."""

from __future__ import annotations

import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.s3_server import create_bucket, s3_environment, s3_server
from tunesmith.store.store import Store


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Store:
    monkeypatch.setenv("TUNESMITH_USER", "olive")
    return Store(tmp_path / "store")


@pytest.fixture(scope="session")
def s3() -> Iterator[str]:
    """The URL of an S3 server."""
    pytest.importorskip("obstore", reason="obstore is not installed")
    with s3_server() as url:
        yield url


@pytest.fixture
def bucket(s3: str, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """Opens a new bucket with a cache in a folder: `bucket(cache, limit)`; again for another cache of it."""
    from tunesmith.store.blobs.s3 import S3Blobs

    for name, value in s3_environment(s3).items():
        monkeypatch.setenv(name, value)
    made = f"b{uuid.uuid4().hex}"
    create_bucket(s3, made)
    return lambda cache, limit=1 << 30: S3Blobs(f"s3://{made}/some/prefix", cache, limit)
