"""Buckets on an S3 server."""

from collections.abc import Callable
from typing import Any

import pytest

from tests.s3_server import new_bucket, s3_environment


@pytest.fixture
def bucket(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """Opens a new bucket with a cache in a folder: `bucket(cache, limit)`; again for another cache of it."""
    pytest.importorskip("obstore", reason="obstore is not installed")
    from tunesmith.store.blobs.s3 import S3Blobs

    s3 = str(request.getfixturevalue("s3"))
    for name, value in s3_environment(s3).items():
        monkeypatch.setenv(name, value)
    made = new_bucket(s3)
    return lambda cache, limit=1 << 30: S3Blobs(f"s3://{made}/some/prefix", cache, limit)
