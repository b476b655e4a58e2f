"""What makes a new version due queues one run, in its time, and what comes of the run waits for an approval."""

import json
import shutil
import signal
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

from tests.acting import do, looking
from tests.fabricate import Scene, approve, put_requests
from tests.http_server import answering
from tests.rollout.conftest import serve
from tests.tiny import write_model
from tests.tiny_project import write_project
from tests.webhooks.conftest import Receiver, deliverer_of, receiver
from tunesmith.cli.main import app
from tunesmith.core.errors import Refused, UsageError
from tunesmith.jobs import leases
from tunesmith.jobs.kinds import perform_job
from tunesmith.jobs.queue import JobError
from tunesmith.monitoring import recall as recalls
from tunesmith.monitoring.causes import CAUSES, Cause
from tunesmith.pipeline.run import run
from tunesmith.project import Project
from tunesmith.registry.versions import list_versions
from tunesmith.rollout.champions import list_champions, note_champions
from tunesmith.services import jobs, monitoring
from tunesmith.store.people import identities
from tunesmith.store.tables import WebhookRow

__all__ = ["receiver"]

HELD = {"prompt": "prompt.txt", "max_tokens": 40, "constrain": True}
CHAMPION = {"version": "champion"}
NOT_WORSE = {"kept": {"metric": "json_valid", "not_below": "champion", "drop_at_most": 0.2}}
ONE_HOUR = timedelta(hours=1)


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A project whose first version serves. Never changed: take `project`."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TUNESMITH_USER", "olive")
        folder = write_project(tmp_path_factory.mktemp("served") / "p", candidates={"held": HELD})
        project = Project.load(folder)
        run(project)
        identities.add_user(project.store, "ann", ["approver"], actor="olive")
        (version,) = list_versions(project.store, "tiny")
        approve(project.store, version, approver="ann", reason="read")
        serve(Scene(project.store, "", ""), version, name="tiny", actor="olive")
        project.store.engine.dispose()
        yield folder


@pytest.fixture
def folder(served: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the served project, with every cause on."""
    monkeypatch.setenv("TUNESMITH_USER", "olive")
    shutil.copytree(served, tmp_path / "p", symlinks=True)
    change(tmp_path / "p", retraining={"causes": list(CAUSES)})
    return tmp_path / "p"


def change(folder: Path, **changes: Any) -> None:
    file = folder / "tunesmith.yaml"
    file.write_text(yaml.safe_dump({**yaml.safe_load(file.read_text()), **changes}, sort_keys=False))


def look(folder: Path, days: float = 0.0, *, add: bool = True) -> monitoring.Retraining:
    project = Project.load(folder)
    try:
        clock = lambda: datetime.now(UTC) + timedelta(days=days)  # noqa: E731
        return monitoring.look(project, by="olive" if add else None, clock=clock)
    finally:
        project.store.engine.dispose()


def causes(found: monitoring.Retraining) -> list[str]:
    return [each.cause for each in found.causes]


def end_job(folder: Path) -> None:
    """Someone performed the job that waits, and it failed."""
    store = Project.load(folder).store
    lease = leases.claim(store, "w", ["run"], project="tiny")
    assert lease is not None
    leases.fail(store, lease, JobError(code="verdict_fail", what="no"), retry=False)
    store.engine.dispose()


def add_rows(folder: Path, room: str = "roof") -> None:
    answer = json.dumps({"on": True, "room": "attic", "thing": "lamp"}, separators=(",", ":"))
    turns = [{"role": "user", "content": f"turn on {room} lamp now"}, {"role": "assistant", "content": answer}]
    with (folder / "rows.jsonl").open("a") as stream:
        stream.write(json.dumps({"messages": turns, "template": room}) + "\n")


def drifting(folder: Path) -> None:
    """Requests to the champion that are much longer than the test rows."""
    project = Project.load(folder)
    (version,) = list_versions(project.store, "tiny")
    rows = [{"scores": {"json_valid": 0.0}, "features": {"characters": 900}}] * 300
    put_requests(project.store, version.digest, rows, name="tiny")
    project.store.engine.dispose()


def recalled(folder: Path) -> None:
    project = Project.load(folder)
    identities.set_roles(project.store, "olive", ["admin", "engineer", "steward"], actor="olive")
    do(project, monitoring.recall, kind="version", value="tiny@v1", reason="wrong")
    project.store.engine.dispose()


@pytest.mark.parametrize(
    ("cause", "days", "act"),
    [
        ("drift", 0.0, drifting),
        ("rows", 0.0, add_rows),
        ("base", 0.0, lambda folder: (write_model(folder / "other", seed=9), change(folder, base="other"))),
        ("evidence", 181.0, lambda folder: change(folder, retraining={"causes": ["evidence"]})),
        ("schedule", 91.0, lambda folder: change(folder, retraining={"causes": ["schedule"]})),
        ("recall", 0.0, lambda folder: recalled(folder)),
    ],
)
def test_a_cause_queues_one_run(folder: Path, cause: str, days: float, act: Callable[[Path], Any]) -> None:
    act(folder)
    assert causes(first := look(folder, days)) == [cause]
    assert cause != "recall" or "tiny@v1 was recalled" in first.causes[0].says
    assert first.causes[0].job == 1
    assert look(folder, days).causes == first.causes
    end_job(folder)
    assert look(folder, days).causes == first.causes, "whatever came of it"
    assert [job.cause.split(":")[0] for job in jobs.list_jobs(looking(Project.load(folder))).jobs] == [cause]


def test_one_run_at_a_time_then_a_wait_then_the_budget(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = look(folder)
    assert (found.version, found.causes) == ("tiny@v1", ())
    change(folder, retraining=None)
    with pytest.raises(UsageError, match="does not say when to retrain"):
        look(folder)
    change(folder, retraining={"causes": ["rows"], "wait_hours": 24, "runs_in_30_days": 2})
    add_rows(folder)
    assert look(folder, add=False).causes[0].job is None
    assert look(folder).causes[0].job == 1
    with monkeypatch.context() as patch:
        patch.setattr(monitoring, "look", None)  # while a run waits, a worker measures nothing
        monitoring.look_again(folder, str)
    add_rows(folder, "tower")
    assert look(folder, 2).causes[0].waits == "job 1 is queued"
    end_job(folder)
    assert "ago (wait_hours): from" in look(folder, 0.5).causes[0].waits
    assert look(folder, 2).causes[0].job == 2
    end_job(folder)
    add_rows(folder, "stairs")
    assert look(folder, 3).causes[0].waits == "2 were queued in the last 30 days (runs_in_30_days)"
    assert look(folder, 40).causes[0].job == 3


def test_rows_at_a_url_are_downloaded_only_where_they_may_have_changed(folder: Path) -> None:
    pytest.importorskip("aiohttp", reason="aiohttp is not installed")
    content, headers, downloads = (folder / "rows.jsonl").read_bytes(), {"ETag": '"one"'}, 0

    class Handler(BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            self.send_response(200)
            for name, value in {"content-length": str(len(content)), **headers}.items():
                self.send_header(name, value)
            self.end_headers()

        def do_GET(self) -> None:
            nonlocal downloads
            downloads += 1
            self.do_HEAD()
            self.wfile.write(content)

    def looked(hour: int) -> tuple[str, int]:
        project = Project.load(folder)
        (found,) = monitoring.look(project, clock=lambda: datetime(2031, 5, 1, tzinfo=UTC) + hour * ONE_HOUR).causes
        project.store.engine.dispose()
        return found.about, downloads

    with answering(ThreadingHTTPServer(("127.0.0.1", 0), Handler)) as url:
        data = yaml.safe_load((folder / "tunesmith.yaml").read_text())["data"]
        source = {**data["sources"][0], "path": f"{url}/rows.jsonl"}
        change(folder, data={**data, "sources": [source]}, retraining={"causes": ["rows"]})
        first = looked(0)
        assert first[1] >= 1
        assert looked(100) == first, "the server says that it is the same"
        content, headers = content + b"\n", {"ETag": '"two"'}
        second = looked(101)
        assert (second[0] != first[0], second[1] > first[1]) == (True, True)
        headers = {}
        third = looked(120)
        assert (third[0], third[1] > second[1], looked(143)) == (second[0], True, third), "asked once a day"


def test_a_cause_that_cannot_be_looked_for_hides_no_other(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(_seen: object) -> None:
        raise UsageError("the server of the rows does not answer")

    monkeypatch.setitem(CAUSES, "rows", Cause("", failing))
    change(folder, retraining={"causes": ["rows", "schedule"]})
    with pytest.raises(UsageError, match="rows does not answer"):
        look(folder)
    change(folder, retraining={"causes": ["rows", "schedule"], "every_days": 0.5})
    said: list[str] = []
    project = Project.load(folder)
    later = datetime.now(UTC) + timedelta(days=1)
    found = monitoring.look(project, by=project.actor(), clock=lambda: later, say=said.append)
    project.store.engine.dispose()
    assert [(each.cause, each.job) for each in found.causes] == [("schedule", 1)]
    assert "the cause rows could not be looked for: the server of the rows" in said[0]


def test_a_worker_deletes_texts_before_it_looks_for_causes(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[str] = []

    def failing(*_: object) -> None:
        raise UsageError("the project file cannot be read")

    monkeypatch.setattr(signal, "signal", lambda *_: None)
    monkeypatch.setattr(jobs, "look_again", failing)
    monkeypatch.setattr(jobs, "delete_expired", lambda _store: done.append("kept texts"))
    monkeypatch.setattr(jobs, "tidy", lambda _store: done.append("held answers"))
    result = CliRunner().invoke(app, ["worker", "--until-empty", "-C", str(folder)])
    assert done == ["kept texts", "held answers"]
    assert "nothing was added: the project file cannot be read" in result.stderr


def test_a_run_that_gives_the_champion_again_says_so(folder: Path) -> None:
    drifting(folder)
    change(folder, retraining={"causes": ["drift"]})
    project, said = Project.load(folder), list[str]()
    monitoring.look_again(folder, said.append)
    assert "job 1: queued because of drift" in said[0]
    lease = leases.claim(project.store, "w", ["run"], project="tiny")
    assert lease is not None
    perform_job(folder, lease)
    (job,) = jobs.list_jobs(looking(project)).jobs
    assert (job.state, job.error["code"], job.cause) == ("failed", "nothing_new", "drift: tiny@v1")
    result = CliRunner().invoke(app, ["retrain", "-C", str(folder)])
    assert result.exit_code == 0, result.output
    assert "drift: requests to tiny@v1 drifted" in result.stdout
    assert "(job 1)" in result.stdout


def test_a_successor_must_not_be_worse_than_the_champion_on_the_present_rows(folder: Path) -> None:
    add_rows(folder)
    candidates: dict[str, Any] = {"held": {**HELD, "max_tokens": 41}, "champion": CHAMPION}
    change(folder, candidates=candidates, gates=NOT_WORSE)
    kept = run(project := Project.load(folder))
    assert (kept.gate.verdict, kept.gate.candidate) == ("pass", "held")
    assert kept.registered is not None
    assert kept.registered.version == "tiny@v2"
    measured = project.store.record(kept.evaluate.evaluation, kind="evaluation").body["candidates"]
    assert measured["champion"]["metrics"]["json_valid"]["mean"] == 1.0
    change(folder, candidates={"plain": {"prompt": "prompt.txt", "max_tokens": 8}, "champion": CHAMPION})
    worse = run(Project.load(folder))
    assert (worse.gate.verdict, worse.gate.candidate) == ("fail", "plain"), "the champion is no candidate for release"


def test_a_champion_that_cannot_be_measured_is_refused_by_name(folder: Path, tmp_path: Path) -> None:
    change(folder, candidates={"held": HELD, "champion": CHAMPION}, gates=NOT_WORSE)
    write_model(folder / "other", seed=9)
    change(folder, base="other")
    with pytest.raises(Refused, match="tiny@v1 was made from another base") as refused:
        run(Project.load(folder))
    assert refused.value.where == "candidates.champion.version"
    write_project(tmp_path / "new", candidates={"held": HELD, "champion": CHAMPION}, gates=NOT_WORSE)
    with pytest.raises(UsageError, match="there is no version 'tiny@champion'") as missing:
        run(Project.load(tmp_path / "new"))
    assert "leave the candidate champion out" in str(missing.value.fix)
    write_project(tmp_path / "new", candidates={"held": HELD, "champion": CHAMPION}, release="champion")
    with pytest.raises(UsageError, match="'champion' is a version that is registered already"):
        Project.load(tmp_path / "new")
    write_project(tmp_path / "new", candidates={"champion": {**CHAMPION, "prompt": "prompt.txt"}})
    with pytest.raises(UsageError, match="a version answers as it was registered: remove prompt"):
        Project.load(tmp_path / "new")


def test_other_systems_hear_what_happened_to_a_project(folder: Path, receiver: Receiver) -> None:
    change(folder, webhooks={"ops": {"url": receiver.url, "secret": "HOOK_SECRET"}})
    project = Project.load(folder)
    with project.store.writing() as session:  # a webhook that has seen nothing yet
        session.add(WebhookRow(project="tiny", name="ops", seq=0))
    drifting(folder)
    look(folder)
    (version,) = list_versions(project.store, "tiny")
    approve(project.store, version, approver="ann", reason="private", decision="refuse")
    identities.add_user(project.store, "sue", ["steward"], actor="olive")
    cause = recalls.Cause(kind="version", value=version.digest)
    recalls.recall(project.store, cause, reason="private", actor="sue")
    with project.store.reading() as session:
        champions = list_champions(session, project.store)
    assert note_champions(project.store, champions)
    deliverer_of(project).turn()
    said = [json.loads(body) for _, body in receiver.got]
    assert [(each["type"], each["data"].get("version")) for each in said] == [
        ("version.waiting_for_approval", "tiny@v1"),
        ("version.approved", "tiny@v1"),
        ("rollout.promoted", "tiny@v1"),
        ("drift.detected", None),
        ("version.refused", "tiny@v1"),
        ("recall.started", None),
        ("champion.refused", "tiny@v1"),
    ]
    assert said[3]["data"] | {"tenant": "", "region": ""} == {
        "job": 1, "kind": "run", "project": "tiny", "tenant": "", "region": "", "cause": "drift: tiny@v1",
    }  # fmt: skip
    assert said[5]["data"]["versions"] == [{"version": "tiny@v1", "digest": version.digest}]
    assert said[5]["data"]["champions_stopped"] == [{"name": "tiny", "tenant": "", "region": ""}]
    assert "private" not in str(said)
    project.store.engine.dispose()
