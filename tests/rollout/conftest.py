"""A scene with three approved versions, made once and copied for each test: signing is the slow part."""

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.fabricate import NAME, OPERATOR, OWNER, Scene, build_scene
from tunesmith.registry.versions import Version, get_alias, list_versions
from tunesmith.rollout.commands import start
from tunesmith.rollout.controller import advance
from tunesmith.rollout.settings import RolloutSettings
from tunesmith.rollout.state import Rollout
from tunesmith.store import audit
from tunesmith.store.store import Store

Versions = dict[int, Version]
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
def versions(scene: Scene) -> Versions:
    """The scene's versions by number."""
    return {version.number: version for version in list_versions(scene.store)}


def copied(made: Scene, root: Path) -> Scene:
    """The scene under another root."""
    shutil.copytree(made.store.root, root)
    return Scene(Store(root, url=f"sqlite:///{root / 'tunesmith.db'}"), made.base, made.dataset)


def begin(scene: Scene, version: Version, *steps: dict[str, Any], **more: Any) -> Rollout:
    """Start a rollout; without steps it is promoted at its second look."""
    plan = RolloutSettings.model_validate({"steps": list(steps) or [{"setWeight": 100}]}).steps
    return start(scene.store, **{"name": NAME, "version": version, "steps": plan, "actor": OPERATOR, **more})


def serve(scene: Scene, *several: Version, **more: Any) -> None:
    """Promote versions one after another."""
    for version in several:
        rollout = begin(scene, version, **more)
        while rollout.live:
            rollout = advance(scene.store, rollout.id)
        assert rollout.status == "promoted", rollout.reason


def champion(scene: Scene) -> str:
    """The digest of the version that serves, or nothing."""
    alias = get_alias(scene.store, NAME)
    return alias.version if alias else ""


def logged(scene: Scene, action: str) -> list[dict[str, Any]]:
    """The details of the audit entries of an action."""
    with scene.store.reading() as session:
        return [dict(entry.detail) for entry in audit.entries(session) if entry.action == action]
