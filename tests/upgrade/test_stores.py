"""A store of an earlier revision opens, verifies and serves.

`store-2026-11-28.tar.xz` is the project of tests/tiny_project.py with two versions, made by the commands of that day:
`run`, `data quality --toxicity`, `train --search`, `users add`, `approve`, `rollout start`, a second `run` with more
epochs, its approval and rollout, `run --queue`, `forecast --queue`. Its gate `rude` is on a probe, its policy check has
a rule, and a job is of a kind, that are no longer there. Another store is added when records change; none is made anew.
"""

import tarfile
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.commands import call, printed
from tests.tiny_project import settings
from tunesmith.core.errors import TunesmithError
from tunesmith.project import Project
from tunesmith.store.records import Record

STORES = sorted(Path(__file__).parent.glob("store-*.tar.xz"))


@pytest.fixture(scope="module", params=STORES, ids=lambda path: path.name.partition(".")[0])
def project(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the store, with a project file of today."""
    folder = tmp_path_factory.mktemp("store") / "p"
    with tarfile.open(request.param) as file:
        file.extractall(folder, filter="data")
    (folder / "tunesmith.yaml").rename(folder / "old.yaml")
    today: dict[str, Any] = {**settings(), "rollout": {"steps": [{"setWeight": 50}, {"pause": {}}, {"setWeight": 100}]}}
    (folder / "tunesmith.yaml").write_text(yaml.safe_dump(today))
    return folder


def test_versions_and_the_audit_log_verify(project: Path) -> None:
    assert [call(project, "verify", f"tiny@v{number}")["ok"] for number in (1, 2)] == [True, True]
    assert call(project, "audit", "verify")["ok"]


def test_every_record_can_be_shown_and_backed_up(project: Path, tmp_path: Path) -> None:
    store = Project.load(project).store
    (dataset,) = store.records_of("dataset")[:1]
    told = {"name": "tuned", "decision": "train", "rivals": {"plain": 0.6}, "subsets": [{"rows": 100, "mean": 0.7}]}
    for kind in ("curve", "forecast"):  # of kinds that nothing makes any more
        store.put_record(Record(kind=kind, parents={"dataset": dataset}, body=told))
    kinds = ("dataset", "quality", "training", "training_search", "candidate", "evaluation", "verdict", "version")
    for kind in (*kinds, "curve", "forecast"):
        digests = store.records_of(kind)
        assert digests, kind
        for digest in digests:
            call(project, "show", digest)
    assert "tiny@v2" in printed(project, "show")
    printed(project, "backup", str(tmp_path / "backup"))
    (tmp_path / "tunesmith.yaml").write_bytes((project / "tunesmith.yaml").read_bytes())
    printed(tmp_path, "restore", str(tmp_path / "backup"))
    assert call(tmp_path, "show", store.records_of("forecast")[0])


def test_its_versions_answer_and_its_rollout_goes_on(project: Path) -> None:
    assert call(project, "chat", "tiny@champion", "--message", "turn on hall fan")
    assert call(project, "rollout", "abort", "tiny")["status"] == "aborted"
    assert call(project, "rollout", "start", "tiny@v2")


def test_reports_name_the_gates_that_are_no_longer_computed(project: Path) -> None:
    assert "The gate rude is no longer computed" in printed(
        project, "report", "tiny@v1", "--output", str(project / "r.html")
    )


def test_its_queued_jobs_end_with_a_reason(project: Path) -> None:
    printed(project, "worker", "--until-empty")
    jobs = [job for job in call(project, "jobs", "list")["jobs"] if job["job"] in (4, 5)]
    assert [job["state"] for job in jobs] == ["failed", "failed"]
    said = {job["kind"]: call(project, "jobs", "show", str(job["job"]))["error"]["what"] for job in jobs}
    assert "settings changed" in said["run"]
    assert said["forecast"] == "jobs of the kind forecast are no longer performed"


def test_a_setting_that_is_gone_is_named(project: Path, tmp_path: Path) -> None:
    (tmp_path / "tunesmith.yaml").write_text((project / "old.yaml").read_text())
    with pytest.raises(TunesmithError, match=r"rude|manners"):
        Project.load(tmp_path)
