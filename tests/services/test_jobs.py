"""What people do with jobs: the rules that commands, pages and routes share."""

from pathlib import Path
from typing import Any

import pytest

from tests.acting import do, looking
from tests.tiny_project import write_project
from tunesmith.core.errors import Forbidden, NotThere, UsageError
from tunesmith.core.text.names import Scope
from tunesmith.jobs import queue
from tunesmith.jobs.arguments import project_of
from tunesmith.project import Project
from tunesmith.services import datasets, jobs
from tunesmith.store.people.identities import add_user, ensure_owner
from tunesmith.training.settings import TrainSettings


@pytest.fixture
def project(tmp_path: Path) -> Project:
    found = Project.load(write_project(tmp_path / "p"))
    ensure_owner(found.store)
    return found


def train_of(project: Project, number: int) -> TrainSettings:
    train = project_of(project, queue.get(project.store, number)).settings.candidates["tuned"].train
    assert train is not None
    return train


def test_settings_of_one_run(project: Project) -> None:
    queued = do(project, jobs.add, changes={"tuned": {"epochs": "2", "learning_rate": 0.01, "rank": "2"}})
    assert queued.changes == {"tuned": {"epochs": 2, "learning_rate": 0.01}}, "the file has this rank"
    train = train_of(project, queued.job)
    assert (train.epochs, train.learning_rate) == (2, 0.01)
    train = train_of(project, do(project, jobs.add, changes={"tuned": {"budget": "20m"}}).job)
    assert (train.budget, train.epochs) == (1200, train_of(project, do(project, jobs.add).job).epochs), "as in the file"


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ({"changes": {"plain": {"epochs": 2}}}, "no candidate 'plain' is trained"),
        ({"changes": {"tuned": {"keep": "last"}}}, "cannot be changed for one run"),
        ({"changes": {"tuned": {"epochs": "many"}}}, "epochs: "),
        ({"changes": {"tuned": {"epochs": 2, "budget": "20x"}}}, "write a duration such as 20m"),
        ({"kind": "forecast"}, "kind"),
        ({"priority": 5000}, "less than or equal to 1000"),
    ],
)
def test_what_cannot_be_queued(project: Project, asked: dict[str, Any], said: str) -> None:
    with pytest.raises(UsageError, match=said):
        do(project, jobs.add, **asked)
    assert jobs.list_jobs(looking(project)).total == 0


def test_a_key_means_one_job(project: Project) -> None:
    assert len({do(project, jobs.add, key="nightly").job for _ in range(2)}) == 1


def test_jobs_of_others_are_not_there(project: Project) -> None:
    store, owner = project.store, ensure_owner(project.store).name
    amy = looking(store, add_user(store, "amy", ["steward", "operator"], actor=owner, scope=Scope("acme")).name)
    own, others = (
        queue.add(store, "run", {}, project="p", actor=owner, scope=Scope(tenant)).id for tenant in ("acme", "globex")
    )
    for change in (jobs.cancel, jobs.pause, jobs.resume):
        with pytest.raises(NotThere, match=f"there is no job {others}"):
            do(store, change, actor="amy", job=others)
    for read in (jobs.show, jobs.log, jobs.newest_lines, jobs.curves):
        with pytest.raises(NotThere):
            read(amy, others)
    assert [each.job for each in jobs.list_jobs(amy).jobs] == [own]
    assert tuple(jobs.list_jobs(each).total for each in (amy, looking(store))) == (1, 2)
    assert do(store, jobs.pause, actor="amy", job=own).state == "paused"
    for about_all in (lambda: do(project, jobs.add, actor="amy"), lambda: datasets.list_rows(amy, "any")):
        with pytest.raises(Forbidden, match="all tenants"):
            about_all()
    with pytest.raises(UsageError, match="not a state"):
        jobs.list_jobs(amy, states=["done"])
