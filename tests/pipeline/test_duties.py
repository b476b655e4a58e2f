"""A licence's duty is followed from a row to the version's notice, and cannot be dropped on the way."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import yaml

from tests.tiny_project import rows, settings, write_project
from tunesmith.api import Project
from tunesmith.core.errors import Refused
from tunesmith.data.dataset import load_dataset
from tunesmith.registry.opening import open_release
from tunesmith.registry.verification import verify_version
from tunesmith.registry.versions import load_version
from tunesmith.services.datasets.data import build
from tunesmith.store.store import Store

CREDIT = "Rooms corpus by Ada Example, CC BY-SA 4.0"
ATTRIBUTION = [
    {"source": "a.jsonl", "licence": "CC-BY-SA-4.0", "credit": CREDIT},
    {"source": "b.jsonl", "licence": "MIT", "credit": None},
]
DUTIES = {"use": "commercial", "attribution": ATTRIBUTION, "share_alike": ["CC-BY-SA-4.0"], "unknown": []}


def write(folder: Path, **licences: object) -> Path:
    """Half of the rows share-alike, half MIT; only tuned and plain candidates."""
    data = dict(settings()["data"])  # type: ignore[call-overload]
    data["sources"] = [
        {"path": "a.jsonl", "licence": "CC-BY-SA-4.0", "attribution": CREDIT},
        {"path": "b.jsonl"},
    ]
    data["licences"] = licences
    candidates = settings()["candidates"]
    kept = {name: candidates[name] for name in ("plain", "tuned")}  # type: ignore[index]
    write_project(folder, data=data, candidates=kept)
    found = rows()
    for name, half in (("a", found[:60]), ("b", [{**row, "licence": "MIT"} for row in found[60:]])):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in half))
    return folder


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = write(tmp_path_factory.mktemp("duties") / "p", share_alike=True)
    assert Project.load(folder).run().document()["register"]["version"] == "tiny@v1"
    return folder


def test_from_the_row_to_the_notice(finished: Path) -> None:
    project = Project.load(finished)
    store = project.store
    (dataset,) = store.records_of("dataset")
    licences = {example.source: example.licence for example in load_dataset(store, dataset).examples("train")}
    assert licences == {"a.jsonl": "CC-BY-SA-4.0", "b.jsonl": "MIT"}
    assert store.record(dataset).body["duties"] == DUTIES
    (version,) = store.records_of("version")
    with open_release(store, load_version(store, version)) as (folder, release):
        assert release.statement.duties == DUTIES
        notice = (folder / "NOTICE.md").read_text()
    assert "under CC-BY-SA-4.0" in notice
    assert f"- {CREDIT} (CC-BY-SA-4.0)" in notice
    assert "- b.jsonl (MIT)" in notice
    assert verify_version(store, "tiny@v1").ok


@pytest.mark.parametrize("attack", ["gone", "changed"])
def test_a_notice_that_was_dropped_or_changed_fails(finished: Path, tmp_path: Path, attack: str) -> None:
    shutil.copytree(finished / ".tunesmith", tmp_path / "store")
    store = Store(tmp_path / "store")
    notice = store.root / "versions" / "tiny" / "v1" / "NOTICE.md"
    notice.chmod(0o600)
    if attack == "gone":
        notice.unlink()
    else:
        notice.write_text(notice.read_text().replace("CC-BY-SA-4.0", "CC0-1.0"))
    assert not verify_version(store, "tiny@v1").ok
    (version,) = store.records_of("version")
    with pytest.raises(Refused), open_release(store, load_version(store, version)):
        pass


@pytest.mark.slow
def test_no_licence_or_one_that_the_policy_refuses_is_exit_3(tmp_path: Path) -> None:
    folder = write(tmp_path / "p")
    read = yaml.safe_load((folder / "tunesmith.yaml").read_text())
    del read["data"]["sources"][0]["licence"]
    for settings_, said in ((None, "share-alike"), (read, "without a licence(.|\n)*a.jsonl")):
        if settings_:
            (folder / "tunesmith.yaml").write_text(yaml.safe_dump(settings_))
        with pytest.raises(Refused, match=said) as caught:
            build(Project.load(folder))
        assert caught.value.exit_code == 3
