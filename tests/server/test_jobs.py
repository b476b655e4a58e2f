"""/api/jobs over HTTP: what `tunesmith jobs` shows, by tenant and by role."""

from pathlib import Path

import pytest

from tests.acting import looking
from tests.console.test_login import cookie_of, plain
from tests.fabricate import OWNER, Scene
from tests.server.conftest import Served, running
from tests.server.fake_engine import FakeEngine
from tests.tiny_project import write_project
from tunesmith.core.text.names import Scope
from tunesmith.jobs import leases, queue
from tunesmith.jobs.queue import Curve, JobError
from tunesmith.project import Project
from tunesmith.services import jobs
from tunesmith.store.people.identities import add_user
from tunesmith.store.people.tokens import issue_token


def added(served: Served, scope: Scope = Scope()) -> int:
    return queue.add(served.scene.store, "run", {}, project="p", actor=OWNER, scope=scope).id


def test_http_shows_and_changes_what_the_command_line_does(served: Served) -> None:
    store, numbers = served.scene.store, [added(served) for _ in range(3)]
    lease = leases.claim(store, "w", ["run"], project="p")
    assert lease is not None
    leases.renew(store, lease, {"step": "training", "done": 3.0, "total": 9.0, "note": "", "seconds_left": 6.0})
    with served.http() as http:
        assert http.get("/api/jobs").json() == jobs.list_jobs(looking(store)).document()
        page = http.get("/api/jobs", params={"most": 1, "before": numbers[2]}).json()["jobs"]
        assert [job["job"] for job in page] == [numbers[1]]
        shown = http.get(f"/api/jobs/{numbers[0]}").json()
        assert (shown["state"], shown["progress"]["seconds_left"]) == ("running", 6.0)
        assert http.post(f"/api/jobs/{numbers[0]}/cancel").json()["wanted"] == "cancelled"
        assert http.post(f"/api/jobs/{numbers[1]}/pause").json()["state"] == "paused"
        assert http.post(f"/api/jobs/{numbers[1]}/resume").json()["state"] == "queued"
        assert http.post(f"/api/jobs/{numbers[2]}/cancel").json()["state"] == "cancelled"
        again = http.post(f"/api/jobs/{numbers[2]}/cancel")
        assert (again.status_code, again.json()["error"]["code"]) == (409, "job_state")
        assert again.json()["error"]["message"] == f"Job {numbers[2]} has ended: cancelled."
        lines = http.get(f"/api/jobs/{numbers[2]}/log").json()["lines"]
        assert [line["message"] for line in lines] == ["cancelled, asked by olga"]
        assert http.get(f"/api/jobs/{numbers[2]}/log", params={"after": lines[-1]["number"]}).json()["lines"] == []
        for query in ({"most": "0"}, {"before": "x"}):
            assert http.get("/api/jobs", params=query).status_code == 400


@pytest.mark.attack("people", "tracebacks and paths in a tenant's own job")
def test_tracebacks_and_paths_are_for_those_who_run_the_server(served: Served) -> None:
    store = served.scene.store
    added(served, Scope("acme"))
    add_user(store, "amy", ["engineer", "admin"], actor=OWNER, scope=Scope("acme"))
    add_user(store, "avi", ["approver"], actor=OWNER)
    lease = leases.claim(store, "w", ["run"], project="p")
    assert lease is not None
    with served.http(issue_token(store, "avi", actor=OWNER)) as http:
        assert http.get(f"/api/jobs/{lease.job}").status_code == 200
        assert http.post(f"/api/jobs/{lease.job}/cancel").status_code == 403
    secret = "/srv/our apps/w.bin"
    leases.log(store, lease, f'Traceback (most recent call last):\n  File "{secret}", line 1')
    what = f"OSError: cannot open '{secret}'"
    error = JobError(code="internal", what=what, where=f"{secret}, base", fix="wait")
    leases.fail(store, lease, error, retry=False)
    for name in ("amy", "avi"):
        with served.http(issue_token(store, name, actor=OWNER)) as http:
            lines = http.get(f"/api/jobs/{lease.job}/log").json()["lines"]
            assert [line["message"] for line in lines[-2:]] == [
                "an internal error; its traceback is in the operators' log",
                "failed: OSError: cannot open '...'",
            ]
            shown = {"code": "internal", "what": "OSError: cannot open '...'", "where": None, "fix": "wait"}
            assert http.get(f"/api/jobs/{lease.job}").json()["error"] == shown
            assert shown in [job["error"] for job in http.get("/api/jobs").json()["jobs"]]
        with plain(served, cookie_of(served, name)) as browser:
            for path in ("", f"/{lease.job}"):
                page = browser.get(f"/console/jobs{path}")
                assert page.status_code == 200
                assert "our apps" not in page.text
                assert "Traceback" not in page.text
    with served.http() as http:  # an operator of all tenants
        assert "Traceback" in http.get(f"/api/jobs/{lease.job}/log").json()["lines"][-2]["message"]
        assert http.get(f"/api/jobs/{lease.job}").json()["error"] == error.model_dump(exclude_unset=True)
    with plain(served, cookie_of(served)) as browser:
        assert "our apps" in browser.get(f"/console/jobs/{lease.job}").text


def test_a_run_is_queued_over_http_and_its_curves_read(scene: Scene, tmp_path: Path) -> None:
    project = Project.load(write_project(tmp_path / "p"))
    project.store = scene.store
    add_user(scene.store, "eve", ["engineer"], actor=OWNER)
    with (
        running(scene, FakeEngine(scene.base), project=project) as served,
        served.http(issue_token(scene.store, "eve", actor=OWNER)) as http,
    ):
        changes = {"tuned": {"epochs": 2, "learning_rate": 0.01}}
        asked = {"changes": changes, "priority": 3, "key": "nightly"}
        first = http.post("/api/jobs", json=asked).json()
        assert (first["kind"], first["changes"], first["priority"]) == ("run", changes, 3)
        assert http.post("/api/jobs", json={"changes": {"tuned": {"epochs": 0}}}).status_code == 400
        lease = leases.claim(scene.store, "w", ["run"], project="tiny")
        assert lease is not None
        curve = Curve({"expected_seconds": 9.0}, 5.0, [{"step": 1, "loss": 2.5, "validation_loss": 2.0}])
        leases.renew(scene.store, lease, curves={"tuned": curve})
        (found,) = http.get(f"/api/jobs/{lease.job}/curves").json()["trainings"]
        assert (found["expected_seconds"], found["memory_bytes"]) == (9.0, 5.0)
        assert found["points"] == [{"step": 1, "loss": 2.5, "validation_loss": 2.0, "score": None}]
