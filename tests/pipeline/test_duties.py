"""A licence's duty is followed from a row to the version's notice, and cannot be dropped on the way."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import yaml

from tests.tiny import write_model
from tests.tiny_project import rows, settings, write_project
from tunesmith.api import Project
from tunesmith.core.errors import Refused
from tunesmith.data.dataset import load_dataset
from tunesmith.registry.opening import open_release
from tunesmith.registry.verification import verify_version
from tunesmith.registry.versions import load_version
from tunesmith.services.datasets.data import build
from tunesmith.services.starting.new_project import make_project
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
    copy = tmp_path / "store"
    shutil.copytree(finished / ".tunesmith", copy)
    notice = copy / "versions" / "tiny" / "v1" / "NOTICE.md"
    notice.chmod(0o600)
    if attack == "gone":
        notice.unlink()
    else:
        notice.write_text(notice.read_text().replace("CC-BY-SA-4.0", "CC0-1.0"))
    found = verify_version(Store(copy), "tiny@v1")
    assert not found.ok
    store = type(Project.load(finished).store)(copy)
    with (
        pytest.raises(Refused),
        open_release(store, load_version(store, found.digest or store.records_of("version")[0])),
    ):
        pass


def test_a_new_project_admits_the_custom_licence_that_it_is_given(tmp_path: Path) -> None:
    data = tmp_path / "mine.jsonl"
    found = [row | {"template": row["template"].partition(" ")[2]} for row in rows()]  # on and off together
    data.write_text("".join(json.dumps(row) + "\n" for row in found))
    folder, base = tmp_path / "p", str(write_model(tmp_path / "model"))
    make_project(folder, data=data, licence="LicenseRef-Acme", base=base)
    assert yaml.safe_load((folder / "tunesmith.yaml").read_text())["data"]["licences"] == {"allow": ["LicenseRef-Acme"]}
    project = Project.load(folder)
    build(project)
    (dataset,) = project.store.records_of("dataset")
    assert project.store.record(dataset).body["duties"]["unknown"] == ["LicenseRef-Acme"]
    with pytest.raises(Refused, match="non-commercial"):
        make_project(tmp_path / "q", data=data, licence="LicenseRef-Acme AND CC-BY-NC-4.0", base=base)


@pytest.mark.slow
def test_no_licence_or_one_that_the_policy_refuses_is_exit_3(tmp_path: Path) -> None:
    folder = write(tmp_path / "p")
    with pytest.raises(Refused, match="share-alike") as caught:
        build(Project.load(folder))
    assert caught.value.exit_code == 3
    read = yaml.safe_load((folder / "tunesmith.yaml").read_text())
    del read["data"]["sources"][0]["licence"]
    (folder / "tunesmith.yaml").write_text(yaml.safe_dump(read))
    with pytest.raises(Refused, match="without a licence") as caught:
        build(Project.load(folder))
    assert caught.value.exit_code == 3
    assert "a.jsonl" in str(caught.value)
