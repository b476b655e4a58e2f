"""An empty store whose owner will be olive."""

from __future__ import annotations

from pathlib import Path

import pytest

from tunesmith.store.store import Store


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Store:
    monkeypatch.setenv("TUNESMITH_USER", "olive")
    monkeypatch.delenv("TUNESMITH_DATABASE_URL", raising=False)
    return Store(tmp_path / "store")
