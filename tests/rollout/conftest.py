"""A scene with three approved versions, made once and copied for each test: signing is the slow part."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.fabricate import OWNER, Scene, build_scene
from tunesmith.registry.versions import Version, list_versions
from tunesmith.store.store import Store

_MADE: list[Scene] = []  # pytest makes a fixture again for each module that imports it


@pytest.fixture(scope="session")
def made(tmp_path_factory: pytest.TempPathFactory) -> Scene:
    """Versions 1 to 3 approved, version 4 not. Never changed: take `scene`."""
    if _MADE:
        return _MADE[0]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TUNESMITH_USER", OWNER)
        scene = build_scene(tmp_path_factory.mktemp("made") / "store")
        for seed in (1, 2, 3):
            scene.version(seed)
        scene.version(4, approved=False)
        scene.store.engine.dispose()
    _MADE.append(scene)
    return scene


@pytest.fixture
def scene(made: Scene, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Scene]:
    """A copy of `made` of the test's own."""
    monkeypatch.setenv("TUNESMITH_USER", OWNER)
    copy = copied(made, tmp_path / "store")
    yield copy
    copy.store.engine.dispose()


@pytest.fixture
def versions(scene: Scene) -> dict[int, Version]:
    """The scene's versions by number."""
    return {version.number: version for version in list_versions(scene.store)}


def copied(made: Scene, root: Path) -> Scene:
    """The scene under another root."""
    shutil.copytree(made.store.root, root)
    return Scene(Store(root, url=f"sqlite:///{root / 'tunesmith.db'}"), made.base, made.dataset)
