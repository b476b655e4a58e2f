"""A store whose restore was killed, or whose database is lost, damaged or another store's: nothing is changed."""

import contextlib
import shutil
from pathlib import Path

import pytest

from tests.attack_table import Happened
from tests.commands import printed
from tests.fabricate import OWNER, Scene
from tests.killed import EVERY, Home, record
from tests.rollout.conftest import made, scene
from tests.rollout.test_copies import contents, rows_of, whole
from tunesmith.core.errors import Refused
from tunesmith.services.audit import backup, restore
from tunesmith.store.store import Store

__all__ = ["made", "scene"]

UNDER_WAY, LOST = "a restore is under way here", "the database is missing or empty"


class Empty(Home):
    """A place for a restore."""

    def open(self) -> Store:
        """The store, which is not opened but to fill it."""
        store = super().open()
        engine = store.engine_to_fill()
        store.engine_to_fill = lambda: engine  # type: ignore[method-assign]
        return store


def files_of(folder: Path) -> dict[Path, bytes]:
    """What is in a folder, without what readers of SQLite write and without leftovers, which any command removes."""
    found = (each for each in folder.rglob("*") if each.is_file() and not {"work", "keys"} & {*each.parts})
    return {each: each.read_bytes() for each in found if "tunesmith.db-" not in each.name}


def project(folder: Path) -> Home:
    """An empty folder with a project file, and the place of its store."""
    (folder / ".tunesmith").mkdir(parents=True)
    (folder / "tunesmith.yaml").touch()
    return Empty(*Home.local(folder / ".tunesmith"))


@pytest.mark.attack("crash", "kill -9 of a restore at its writes, and another command in the folder")
def test_a_killed_restore_goes_on_whatever_is_called_meanwhile(
    scene: Scene, tmp_path: Path, happened: Happened
) -> None:
    file = tmp_path / "backup.tar"
    backup(scene.store, file)
    expected = contents(scene.store), rows_of(scene.store)
    scene.store.engine.dispose()

    def run(store: Store) -> None:
        restore(store, file, actor=OWNER)

    points = record(project(tmp_path / "whole"), run)
    late = len(points) - 12  # where its end begins
    for number in [each for each in range(1, len(points)) if EVERY or each % 20 < 2 or each > late]:
        folder = tmp_path / f"killed-{number}"
        home = project(folder)
        record(home, run, number)
        before = files_of(folder)
        left = points[number:]
        committed = "commit" not in left
        said = UNDER_WAY if any(each.startswith("replace .scratch") for each in left) else LOST
        with contextlib.nullcontext() if committed else pytest.raises(Refused, match=said):
            printed(folder, "users", "list")
        if not committed:
            assert files_of(folder) == before
            printed(folder, "restore", str(file), "--as", OWNER)
        store = home.open()
        assert (contents(store), rows_of(store)) == expected
        shutil.copytree(scene.store.root / "keys", home.root / "keys", dirs_exist_ok=True)
        whole(store)
        happened("refused, and the restore went on" if not committed else "whole")
        store.engine.dispose()
