"""Jobs on the nodes of a Ray cluster: what is refused, and a node that is lost."""

import os
import re
import signal
import socket
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tests.acting import do, looking
from tests.data.building.test_ray_runner import PATIENT
from tests.jobs.processes import wait
from tests.own_group import run_whole_group
from tests.tiny_project import settings, write_project
from tests.waiting import until
from tunesmith.core.errors import Refused, TunesmithError, UsageError
from tunesmith.core.system import ray_cluster
from tunesmith.jobs import leases, queue
from tunesmith.jobs.leases import Lease
from tunesmith.jobs.on_ray import _Performer
from tunesmith.jobs.places import check_node, make_places
from tunesmith.project import Project
from tunesmith.services import jobs, training

HERE = socket.gethostname()


@pytest.fixture
def made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Project]:
    monkeypatch.setenv("TUNESMITH_USER", "olive")

    def one(**changes: Any) -> Project:
        return Project.load(write_project(tmp_path / "p", **{"jobs": {"runner": "ray"}, **changes}))

    return one


def test_settings_that_cannot_be(made: Callable[..., Project]) -> None:
    tries: list[tuple[dict[str, Any], str]] = [
        ({"jobs": {"address": "head:6379"}}, "address applies to runner: ray"),
        ({"jobs": {"runner": "ray", "resources": {"CPU": 0}}}, "greater than 0"),
        ({"engine": {"ray": {"workers": 2}}}, r"needs engine\.ray\.address"),
        ({"engine": {"kind": "vllm", "start": True}}, r"cannot be combined with engine\.start"),
    ]
    for changes, said in tries:
        with pytest.raises(UsageError, match=said):
            made(**changes)
    assert made().settings.digest == made(jobs={"runner": "local"}).settings.digest, "who performs jobs changes nothing"


def nodes(*hosts: str, **resources: float) -> Any:
    """Ray, as far as places ask it."""
    known = [{"Alive": True, "NodeManagerHostname": host, "Resources": resources} for host in hosts]
    whole = {name: each * len(hosts) for name, each in resources.items()}
    return SimpleNamespace(nodes=lambda: known, cluster_resources=lambda: whole)


def places(project: Project, ray: Any, at_once: int | None = None, say: Any = print) -> Any:
    @contextmanager
    def connected(_where: str, _address: str | None) -> Iterator[Any]:
        yield ray

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ray_cluster, "connected", connected)
        return make_places(project, at_once, say)


def test_as_many_jobs_at_once_as_the_nodes_have_room_for(
    made: Callable[..., Project], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    project = made(jobs={"runner": "ray", "resources": {"CPU": 2}})
    assert len(places(project, nodes(HERE, HERE, CPU=5.0))) == 4
    assert len(places(project, nodes(HERE, HERE, CPU=5.0), at_once=1)) == 1
    with pytest.raises(Refused, match="does not hold 1 workers with 2 CPU each"):
        places(project, nodes(HERE, CPU=1.0))
    named, said = made(jobs={"runner": "ray", "resources": {"GPU": 1}, "address": "head:6379"}), list[str]()
    assert len(places(named, nodes(HERE, CPU=1.0), say=said.append)) == 1  # the cluster may grow
    assert said == ["waiting for 1 workers with 1 GPU each, and the Ray cluster has 0 GPU"]
    with pytest.raises(Refused, match=r"has nodes on far, and SQLite can be used on one machine only") as refused:
        places(made(), nodes(HERE, "far", CPU=1.0))
    assert "TUNESMITH_DATABASE_URL" in refused.value.fix
    monkeypatch.setenv("TUNESMITH_DATABASE_URL", "postgresql+psycopg://nobody@127.0.0.1:1/none")
    assert len(places(made(), nodes(HERE, "far", CPU=1.0))) == 2


def test_a_node_that_cannot_perform_the_job_says_why(made: Callable[..., Project], tmp_path: Path) -> None:
    project = made()
    do(project, jobs.add)
    lease = leases.claim(project.store, "w", ["run"], project="tiny")
    assert lease is not None
    given = {"root": project.root, "worker": "w", "host": HERE, "kept": str(project.store.root / "records")}
    given |= {"lease": lease, "mark": str(tmp_path)}
    check_node(*given.values())  # type: ignore[arg-type]
    assert queue.events(project.store, lease.job)[-1].message == f"performed on the node {HERE} of the Ray cluster"

    def refused(**other: Any) -> str:
        with pytest.raises(TunesmithError) as raised:
            check_node(*{**given, **other}.values())  # type: ignore[arg-type]
        assert isinstance(raised.value, UsageError | Refused), "it is not tried again"
        return str(raised.value)

    assert "SQLite can be used on one machine only" in refused(host="far")
    assert "does not see the files of the worker's store" in refused(mark=str(tmp_path / "none"))
    assert "does not see the files of the worker's store" in refused(kept="s3://bucket/records", mark="")
    assert "uses another database" in refused(worker="other:7")
    assert "uses another database" in refused(lease=Lease(99, 1, 60.0))
    assert "there is no project here" in refused(root=tmp_path / "nowhere")
    leases.finish(project.store, lease, {})
    assert "uses another database" in refused(), "the job has ended there"


def nothing(_lease: Lease, _mark: str) -> None:
    """Find nothing wrong with a node."""


def wrong(_lease: Lease, mark: str) -> None:
    raise Refused(f"this node does not see {mark}")


@pytest.fixture
def performer(monkeypatch: pytest.MonkeyPatch) -> Iterator[_Performer]:
    """What an actor runs, in this process."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3")
    monkeypatch.delenv("TUNESMITH_THREADS", raising=False)
    yield _Performer()
    os.environ.pop("TUNESMITH_THREADS", None)


def test_a_process_on_a_node_is_told_to_stop(performer: _Performer) -> None:
    with ThreadPoolExecutor() as pool:
        ended = pool.submit(performer.perform, {"CPU": 2.0}, nothing, wait, Lease(1, 1, 60.0), "")
        until(lambda: performer._process is not None and _handles_sigterm(performer._process.pid))
        performer.stop()
        assert ended.result(300).what == "its process ended with exit code 0"
    assert (os.environ["TUNESMITH_THREADS"], os.environ["CUDA_VISIBLE_DEVICES"]) == ("2", "")


def _handles_sigterm(process: int | None) -> bool:
    caught = re.search(r"SigCgt:\s*(\w+)", Path(f"/proc/{process}/status").read_text())
    return caught is not None and bool(int(caught[1], 16) >> (signal.SIGTERM - 1) & 1)


def test_a_process_on_a_node_is_not_started_where_it_is_of_no_use(performer: _Performer) -> None:
    refused = performer.perform({"CPU": 1.0}, wrong, wait, Lease(1, 1, 60.0), "/mark")
    assert isinstance(refused, Refused)
    assert refused.what == "this node does not see /mark"
    performer.stop()
    stopped = performer.perform({"CPU": 1.0}, nothing, wait, Lease(1, 1, 60.0), "")
    assert stopped.what == "it was told to stop before it began"
    assert performer._process is None


@pytest.mark.slow
@pytest.mark.long  # cheaper: test_worker.py, which kills workers
@pytest.mark.attack("crash", "a node of the cluster is lost while it performs a job")
def test_a_job_survives_the_loss_of_its_node(made: Callable[..., Project]) -> None:
    pytest.importorskip("ray.cluster_utils", reason="the extra `ray` is not installed")
    known: Any = settings()["candidates"]
    tuned = {**known["tuned"], "train": {"rank": 2, "batch": 2, "epochs": 4, "checkpoint_seconds": 0.001}}
    project = made(candidates={"plain": known["plain"], "tuned": tuned})
    number = do(project, jobs.add).job
    done = run_whole_group(
        [sys.executable, "-m", "tests.jobs.on_two_nodes", str(project.root)],
        cwd=Path(__file__).parents[2],
        env={**os.environ, **PATIENT, "PYTHONPATH": os.pathsep.join(sys.path), "TUNESMITH_THREADS": "1"},
        timeout=900,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    job = queue.get(project.store, number)
    lines = "\n".join(each.message for each in jobs.log(looking(project), number).lines)
    assert (job.state, job.attempts) == ("succeeded", 2), lines
    assert lines.count(f"performed on the node {HERE}") == 2
    assert "it was lost with its node" in lines
    assert "resuming from step" in lines
    assert job.result["register"]["version"] == "tiny@v1"
    assert training.repeat(project).same, "the bytes are those of an undisturbed training"
    assert not list(project.store.local("work").glob(".scratch-*")), "no mark is left"
