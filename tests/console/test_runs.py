"""Jobs in the console: the list, one job, and what another tenant's browser sees of them."""

from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import expect

from tests.console.conftest import Login, check_page, follow
from tests.console.test_login import cookie_of, csrf, plain
from tests.fabricate import OPERATOR, OWNER, Scene, put_training
from tests.server.conftest import Served
from tests.tiny_project import write_project
from tunesmith.core.progress import SILENT
from tunesmith.core.text.names import Scope
from tunesmith.jobs import leases, queue
from tunesmith.jobs.leases import Lease
from tunesmith.jobs.performing import JobProgress
from tunesmith.jobs.queue import Curve, JobError
from tunesmith.project import Project
from tunesmith.store.people.identities import add_user
from tunesmith.store.store import Store

HOSTILE = '<script>alert(1)</script>"><img src=x onerror=alert(2)>\u202e{{7*7}} javascript:alert(3) ' + "x" * 10_000


def added(store: Store, kind: str = "run", scope: Scope = Scope(), **arguments: Any) -> int:
    return queue.add(store, kind, arguments, project="p", actor=OWNER, scope=scope).id


def claimed(store: Store) -> Lease:
    lease = leases.claim(store, "host:1", ["run", "fine_tuning"], project="p", seconds=600)
    assert lease is not None
    return lease


def curve(steps: int, slope: float = 28.0) -> dict[str, Curve]:
    """A training of so many steps, validated and scored at every tenth, beside a candidate with 60%."""
    made = Curve({"expected_seconds": 95.0, "expected_memory_bytes": 1.6e9, "beside:rag": 0.6})
    for step in range(1, steps + 1):
        loss = 0.08 + 2.0 * 2.718 ** (-step / slope)
        values = {"step": step, "loss": loss * (1 + 0.05 * (step % 3)), "memory_bytes": 1.7e9}
        if step % 10 == 0:
            score = 1 - 0.9 * 2.718 ** (-step / slope)
            values |= {"validation_loss": loss * 1.1, "validation_score": score, "difference": score - 0.6}
            values |= {"difference_low": score - 0.68, "difference_high": score - 0.52}
        made.add(values)
    return {"tuned": made}


def progress(done: float = 30.0) -> dict[str, Any]:
    note = "loss 0.412, 1.7 GB, 880 tokens/s, 61% of peak"
    return {"step": "training", "done": done, "total": 120.0, "note": note, "seconds": 20.0, "seconds_left": 60.0}


def interval(mean: float) -> dict[str, float]:
    return {"mean": mean, "low": mean - 0.04, "high": mean + 0.04}


def result(scene: Scene, *, seed: int, mean: float, verdict: str = "pass") -> dict[str, Any]:
    """A run's result, with a training that the store has."""
    digest = put_training(scene.store, scene.base, scene.dataset, seed=seed)
    body = scene.store.record(digest).body
    gate = {"name": "better", "outcome": verdict, "reason": "0.12 over plain, at least 0.05", "bound": 0.05}
    return {
        "train": {"tuned": {**body, "training": digest, "score": {"metric": "exact_match", "rows": 60}}},
        "evaluate": {
            "n": 400,
            "primary": "exact_match",
            "candidates": {"plain": {"exact_match": interval(0.61)}, "tuned": {"exact_match": interval(mean)}},
        },
        "gate": {"verdict": verdict, "candidate": "tuned", "gates": [gate], "reason": None},
        **({"register": {"version": f"home@v{seed}", "digest": "sha256:0"}} if verdict == "pass" else {}),
    }


def test_the_list_and_one_run_while_it_trains(served: Served, login: Login) -> None:
    store = served.scene.store
    for kind in ("run", "fine_tuning"):
        added(store, kind)
    lease = claimed(store)
    for _ in range(110):
        leases.log(store, lease, "more")
    leases.renew(store, lease, progress(), curve(30))
    page = login(path="/console/jobs")
    expect(page.get_by_role("row")).to_have_count(3)
    row = page.get_by_role("row").filter(has_text="running")
    expect(row).to_contain_text("training 25%")
    expect(row).to_contain_text("60 s")
    page.get_by_label("State").select_option("running")
    page.get_by_role("button", name="Filter").click()
    expect(page.get_by_role("row")).to_have_count(2)
    check_page(page)
    follow(page.get_by_role("link", name=str(lease.job), exact=True))
    expect(page.get_by_text("60 s, for this stage")).to_be_visible()
    expect(page.get_by_text("tuned: exact_match")).to_have_count(0)
    expect(page.get_by_text("tuned: score on validation rows")).to_be_visible()
    expect(page.locator(".charts canvas")).to_have_count(2)
    expect(page.locator(".charts")).to_contain_text("at step 30.")
    expect(page.locator(".charts")).to_contain_text("rag, untuned: 60.0% at step 0, 60.0% at step 30.")
    better = "tuned: from step 30 on the tuned model is better than rag: the interval of the difference is above zero"
    expect(page.get_by_text(better)).to_be_visible()
    expect(page.locator(".log li").first).to_contain_text("more")
    leases.log(store, lease, "half of it is done")
    leases.renew(store, lease, progress(61.0), curve(60))
    expect(page.locator(".log li").first).to_contain_text("half of it is done")
    expect(page.locator(".charts")).to_contain_text("at step 60.")
    expect(page.get_by_text("training 51%")).to_be_visible()
    page.get_by_text("The numbers").click()
    expect(page.get_by_role("row").filter(has_text="60")).to_have_count(1)
    check_page(page)
    follow(page.get_by_role("link", name="Older lines"))
    expect(page.locator(".log li").last).to_contain_text("started by host:1")


def test_a_person_cancels_pauses_and_resumes(served: Served, login: Login) -> None:
    store = served.scene.store
    first, second = added(store), added(store)
    lease = claimed(store)
    page = login(path=f"/console/jobs/{second}")
    page.get_by_role("button", name="Pause").click()
    expect(page.get_by_role("heading", level=1)).to_contain_text("paused")
    page.get_by_role("button", name="Resume").click()
    expect(page.get_by_role("heading", level=1)).to_contain_text("queued")
    page.goto(f"{served.url}/console/jobs/{first}")
    page.once("dialog", lambda dialog: dialog.dismiss())
    page.get_by_role("button", name="Cancel").click()
    assert queue.get(store, first).wanted == ""
    page.once("dialog", lambda dialog: dialog.accept())
    page.get_by_role("button", name="Cancel").click()
    expect(page.get_by_text("will be cancelled", exact=True)).to_be_visible()
    leases.stop(store, lease, "asked")
    expect(page.get_by_role("heading", level=1)).to_contain_text("cancelled")
    expect(page.get_by_role("button", name="Cancel")).to_have_count(0)
    add_user(store, "avi", ["approver"], actor=OWNER)
    with plain(served, cookie_of(served, "avi")) as http:
        looking = http.get(f"/console/jobs/{second}").text
        assert ("queued" in looking, "Cancel" in looking) == (True, False)


def test_a_run_that_ended(served: Served, login: Login) -> None:
    scene, store = served.scene, served.scene.store
    number = added(store)
    lease = claimed(store)
    leases.renew(store, lease, progress(), curve(240))
    leases.finish(store, lease, result(scene, seed=1, mean=0.73))
    page = login(path=f"/console/jobs/{number}")
    expect(page.get_by_text("home@v1")).to_be_visible()
    expect(page.get_by_text("0.12 over plain, at least 0.05")).to_be_visible()
    expect(page.get_by_text("tuned: exact_match on validation rows")).to_be_visible()
    expect(page.get_by_role("region", name="Candidates").get_by_role("row").filter(has_text="tuned")).to_contain_text(
        "0.730 0.690 to 0.770"
    )
    check_page(page)


def test_a_run_is_started_from_the_form(served: Served, login: Login, tmp_path: Path) -> None:
    store = served.scene.store
    project = Project.load(write_project(tmp_path / "p"))
    project.store, served.serving.project = store, project
    page = login(OWNER, "/console/jobs/start")
    check_page(page)
    epochs = page.get_by_label("Epochs")
    epochs.fill("many")
    page.get_by_role("button", name="Start the run").click()
    expect(page.get_by_role("alert")).to_contain_text("epochs")
    expect(epochs).to_have_value("many")
    epochs.fill("2")
    page.get_by_role("button", name="Start the run").click()
    page.wait_for_url("**/console/jobs/1")
    expect(page.get_by_text("tuned: epochs 2")).to_be_visible()
    with plain(served, cookie_of(served, OPERATOR)) as http:
        start = http.get("/console/jobs/start").text
        assert ("it takes engineer" in start, "Start the run" in start) == (True, False)


@pytest.mark.attack("console", "markup, hidden characters and templates in every field of a job")
def test_hostile_texts(served: Served, login: Login) -> None:
    scene, store = served.scene, served.scene.store
    number = added(store, cause=HOSTILE, changes={HOSTILE: {HOSTILE: HOSTILE}})
    lease = claimed(store)
    leases.log(store, lease, HOSTILE)
    curves = {HOSTILE[:256]: curve(30)["tuned"]}
    leases.renew(store, lease, {**progress(), "step": HOSTILE, "note": HOSTILE}, curves)
    page = login(path="/console/jobs")
    expect(page.get_by_role("row").filter(has_text="running")).to_have_count(1)
    page.goto(f"{served.url}/console/jobs/{number}")
    expect(page.locator(".charts canvas")).to_have_count(2)
    found = result(scene, seed=1, mean=0.7)
    found["gate"]["gates"][0] |= {"name": HOSTILE, "reason": HOSTILE}
    found["gate"]["candidate"] = HOSTILE
    found["evaluate"]["candidates"][HOSTILE] = {"exact_match": interval(0.5)}
    found["evaluate"]["primary"] = "exact_match"
    found["register"]["version"] = HOSTILE
    leases.finish(store, lease, found, JobError(code="x", what=HOSTILE, where=HOSTILE, fix=HOSTILE))
    expect(page.get_by_role("heading", level=1)).to_contain_text("failed")
    assert page.locator("main script, main img").count() == 0
    assert "\u202e" not in page.content()
    assert "{{7*7}}" in page.get_by_role("region", name="Gates").inner_text()


@pytest.mark.attack("console", "another tenant's runs by their addresses")
def test_another_tenant_sees_and_starts_nothing(served: Served) -> None:
    """server/test_api.py sends every form."""
    store = served.scene.store
    others, everybodys = added(store, scope=Scope("globex")), added(store)
    added(store, scope=Scope("acme"))
    add_user(store, "amy", ["engineer", "operator"], actor=OWNER, scope=Scope("acme"))
    with plain(served, cookie_of(served, "amy")) as http:
        page = http.get("/console/jobs").text
        assert (page.count("<tr>"), "for users of all tenants" in page) == (2, True)
        for number in (others, everybodys, 999_999):
            assert http.get(f"/console/jobs/{number}").status_code == 404
        assert http.post("/console/do/jobs", data={"csrf": csrf(page)}).status_code == 403
        assert http.get("/console/jobs?state=gone").status_code == 409


def test_curves_are_bounded_and_keep_what_was_validated() -> None:
    progress = JobProgress(None, None, SILENT)  # type: ignore[arg-type]
    for step in range(1, 50_001):
        values = {"step": step, "loss": 1 / step} | ({"validation_loss": 0.5} if step % 999 == 0 else {})
        progress.measured("tuned", values)
    points = progress.changed_curves()["tuned"].points
    assert len(points) <= 400 + 50
    assert points[-1]["step"] == 50_000
    assert [point["step"] for point in points] == sorted({point["step"] for point in points})
    assert sum("validation_loss" in point for point in points) == 50
    assert progress.changed_curves() == {}
    for number in range(200):
        progress.measured(f"{number}", {"step": 1, "loss": 1.0})
    assert len(progress.changed_curves()) == 49
