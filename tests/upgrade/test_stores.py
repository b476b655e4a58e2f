"""A store of an earlier revision opens, verifies and serves.

`store-2026-11-28.tar.xz` is the project of tests/tiny_project.py with two versions, made by the commands of that day:
`run`, `data quality --toxicity`, `train --search`, `users add`, `approve`, `rollout start`, a second `run` with more
epochs, its approval and rollout, `run --queue`, `forecast --queue`. Its gate `rude` is on a probe, and its policy check
has a rule, that are no longer there. Another store is added when records change; none is made anew.
"""

from __future__ import annotations

import tarfile
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.commands import call, printed
from tests.tiny_project import settings
from tunesmith.project import Project

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


def test_every_record_can_be_shown(project: Path) -> None:
    store = Project.load(project).store
    kinds = ("dataset", "quality", "training", "training_search", "candidate", "evaluation", "verdict", "version")
    for kind in kinds:
        digests = store.records_of(kind)
        assert digests, kind
        for digest in digests:
            call(project, "show", digest)
    assert "tiny@v2" in printed(project, "show")


def test_its_versions_answer_and_its_rollout_goes_on(project: Path) -> None:
    assert call(project, "chat", "tiny@champion", "--message", "turn on hall fan")
    assert call(project, "rollout", "abort", "tiny")["status"] == "aborted"
    assert call(project, "rollout", "start", "tiny@v2")
