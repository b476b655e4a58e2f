"""The same dataset by Ray, on a local cluster of two workers. Skipped where the extra `ray` is not installed."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.data.rows import build, settings, write_jsonl
from tests.data.test_shards import CHOSEN, mixed
from tunesmith.core.errors import UsageError
from tunesmith.data import shards
from tunesmith.data.on_ray import OnRay

ray = pytest.importorskip("ray", reason="the extra `ray` is not installed")


@pytest.fixture(scope="module", autouse=True)
def cluster() -> Iterator[None]:
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
    yield
    ray.shutdown()


def test_the_same_digest_and_the_same_errors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_jsonl(tmp_path / "rows.jsonl", mixed(400))
    whole = build(tmp_path, settings(**CHOSEN))
    monkeypatch.setattr(shards, "SHARD_BYTES", 15_000)
    assert build(tmp_path, settings(**CHOSEN), engine=OnRay(2)).digest == whole.digest
    path.open("a").write("{\n")
    with pytest.raises(UsageError) as caught:
        build(tmp_path, settings(**CHOSEN), engine=OnRay(2))
    assert caught.value.where.startswith("rows.jsonl, line")
