"""A finished project whose people go on in the browser alone: approve, roll out, watch, roll back, look at what was
lost, correct ten rows, and start the next run and watch it to its end.

No page is loaded again to see what changed.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from playwright.sync_api import Page, expect

from tests.console.conftest import Login, check_page, follow
from tests.fabricate import OPERATOR, Scene
from tests.server.conftest import HELLO, Served, running
from tests.server.fake_engine import FakeEngine
from tests.tiny_project import rows, settings, write_project
from tests.waiting import SECONDS
from tunesmith.data.building.summary import dataset_summary
from tunesmith.data.governance.difference import difference
from tunesmith.project import Project
from tunesmith.registry.aliases import get_alias
from tunesmith.registry.versions import list_versions
from tunesmith.services.evaluations import evaluation
from tunesmith.services.releases import rollouts, versions
from tunesmith.services.runs import training
from tunesmith.services.runs.own_worker import OwnWorker
from tunesmith.store.people.identities import add_user, ensure_owner
from tunesmith.store.store import Store

pytestmark = pytest.mark.slow
_LONG = SECONDS * 1000
STEPS = [
    {"setWeight": 50},
    {"analysis": {"metric": "json_valid", "worse_by_at_most": 0.5, "min_requests": 5}},
    {"pause": {}},
    {"setWeight": 80},
    {"pause": {}},
    {"setWeight": 100},
]
WRONG = 5  # rows whose request has another answer, too


def write(folder: Path) -> Project:
    """A project of two candidates, some rows of which contradict each other."""
    known, data = settings()["candidates"], settings()["data"]
    assert isinstance(known, dict)
    assert isinstance(data, dict)
    candidates = {name: known[name] for name in ("held", "tuned")}
    task = {"schema": "schema.json", "scorers": ["json_valid"]}
    data = {**data, "review": "review.jsonl"}
    write_project(folder, candidates=candidates, task=task, data=data, rollout={"steps": STEPS})
    wrong = [json.loads(json.dumps(row)) for row in rows()[:WRONG]]
    for row in wrong:
        answer = json.loads(row["messages"][1]["content"])
        row["messages"][1]["content"] = json.dumps({**answer, "on": not answer["on"]}, separators=(",", ":"))
    with (folder / "rows.jsonl").open("a") as stream:
        stream.writelines(json.dumps(row) + "\n" for row in wrong)
    return Project.load(folder)


@pytest.fixture
def served(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Served]:
    """A server and its worker. `held` serves as tiny@v1, and tiny@v2, the tuned candidate, waits for an approval."""
    monkeypatch.setenv("TUNESMITH_USER", "olive")
    project = write(tmp_path / "p")
    store = project.store
    ensure_owner(store)
    for name, role in (("amy", "engineer"), ("ada", "approver"), ("bob", "approver"), (OPERATOR, "operator")):
        add_user(store, name, [role], actor="olive")
    verdict = evaluation.gate(project, "held").digest
    versions.register(store, verdict, name="tiny", risk=None)
    versions.approve(store, "tiny@v1", actor="bob")
    rollouts.start(project, "tiny@v1")
    training.run(project)
    (base,) = store.records_of("base")
    with running(Scene(store, "", ""), FakeEngine(base), project=project) as found:
        worker = OwnWorker(project.root, print)
        try:
            yield found
        finally:
            worker.stop(60)


def champion(store: Store) -> str:
    """The label of the version that serves."""
    alias = get_alias(store, "tiny", "champion")
    return next(one.label for one in list_versions(store, "tiny") if alias is not None and one.digest == alias.version)


def confirm_dialogs(page: Page) -> Page:
    page.on("dialog", lambda dialog: dialog.accept())
    return page


def decide(page: Page, decision: str, reason: str) -> None:
    """Sign a decision on the version's page, and wait until it is listed."""
    page.get_by_label(f"{decision.capitalize()}:").check()
    page.get_by_label("Reason").fill(reason)
    page.get_by_role("button", name="Verify it and show what I sign").click()
    page.get_by_role("button", name="Sign and send").click()
    expect(page.locator("#state tbody tr").filter(has_text=reason)).to_be_visible()


def send_until(served: Served, page: Page, state: str) -> None:
    """Traffic until the page shows the rollout in a state."""
    badge = page.locator("#state .badge", has_text=re.compile(f"^{state}$")).first
    with served.http() as http:
        for _ in range(2000):
            if badge.is_visible():
                return
            answer = http.post("/v1/chat/completions", json={"model": "tiny", "messages": HELLO})
            assert answer.status_code == 200, answer.text
    raise AssertionError(f"the page never showed {state}")


def test_people_go_on_without_a_terminal(served: Served, login: Login) -> None:
    store = served.scene.store
    owner, ada = login("olive"), login("ada", "/console/keys")
    approve(owner, ada, served)
    assert champion(store) == "tiny@v1"
    olga = confirm_dialogs(login(OPERATOR, "/console/versions/tiny/2"))
    roll_out_and_back(served, olga)
    amy = confirm_dialogs(login("amy", olga.url.removeprefix(served.url)))
    look_at_lost_requests(amy)
    correct_ten_rows(served, amy)
    start_the_next_run(served, amy)
    cancel_and_forecast(served, amy)
    olga.goto(f"{served.url}/console/jobs/start")
    expect(olga.get_by_text("needs the role engineer")).to_be_visible()
    expect(olga.get_by_role("button", name="Start the run")).to_have_count(0)
    follow(owner.get_by_role("link", name="Home", exact=True))
    expect(owner.get_by_role("link", name=re.compile("^tiny@v3 waits for"))).to_be_visible()


def approve(owner: Page, ada: Page, served: Served) -> None:
    """The approver makes a key, the owner confirms it; the approver refuses, then approves."""
    ada.get_by_role("button", name="Make a key in this browser").click()
    told = re.sub(r"\s", "", ada.locator(".fingerprint").first.inner_text())
    follow(owner.get_by_role("link", name=re.compile("key of ada waits")))
    owner.get_by_label("Its fingerprint, as ada told it to you").fill(told[:20])
    owner.get_by_role("button", name="Confirm").click()
    expect(owner.get_by_text("None.", exact=True)).to_be_visible()
    follow(ada.get_by_role("link", name="Home", exact=True))
    follow(ada.get_by_role("link", name=re.compile("^tiny@v2 waits for")))
    decide(ada, "refuse", "its answers are no JSON")
    expect(ada.get_by_role("heading", level=1)).to_contain_text("refused")
    decide(ada, "approve", "a trial")
    expect(ada.get_by_role("heading", level=1)).to_contain_text("approved")
    assert served.url in ada.url


def roll_out_and_back(served: Served, page: Page) -> None:
    """The operator starts a rollout, watches it under traffic, resumes, promotes and rolls back."""
    store = served.scene.store
    follow(page.get_by_role("link", name="Start its rollout"))
    expect(page.get_by_label("Version")).to_have_value("tiny@v2")
    page.get_by_role("button", name="Start", exact=True).click()
    page.wait_for_url("**/console/rollouts/2")
    send_until(served, page, "paused")
    expect(page.get_by_role("img", name="Evidence (e-values, logarithmic)")).to_be_visible()
    expect(page.get_by_text("not worse", exact=True).first).to_be_visible()
    page.get_by_text("Resume", exact=True).click()
    page.get_by_role("button", name="Resume now").click()
    expect(page.locator("li[aria-current=step]")).to_contain_text("wait for a person")
    expect(page.locator("#state dd").first).to_contain_text("tiny@v2 80%")
    page.get_by_text("Promote", exact=True).click()
    page.get_by_role("button", name="Promote now").click()
    expect(page.get_by_text("tiny@v2 serves tiny")).to_be_visible()
    assert champion(store) == "tiny@v2"
    page.get_by_text("Roll back", exact=True).click()
    page.get_by_label("Why").fill("customers wait for JSON")
    page.get_by_role("button", name="Roll back now").click()
    expect(page.get_by_text("tiny@v1 serves tiny")).to_be_visible()
    expect(page.get_by_text("customers wait for JSON").first).to_be_visible()
    assert champion(store) == "tiny@v1"


def look_at_lost_requests(page: Page) -> None:
    """From the rollout, one click leads to the requests that the new version lost, a second opens one."""
    follow(page.get_by_role("link", name=re.compile(r"tiny@v2 lost against tiny@v1")))
    expect(page.get_by_label("Show")).to_have_value("losses")
    lost = page.locator(".matrix tbody tr")
    expect(lost.first).to_contain_text("loss")
    check_page(page)
    follow(lost.first.get_by_role("link"))
    expect(page.get_by_role("heading", name="tuned", exact=False).first).to_be_visible()


def correct_ten_rows(served: Served, page: Page) -> None:
    """Keys alone: what is right is accepted; of the wrong rows three are edited and two rejected."""
    page.goto(f"{served.url}/console/rows")
    follow(page.get_by_role("link", name="Review queue"))
    follow(page.get_by_role("button", name="Fill"))
    follow(page.get_by_role("link", name="Begin to review"))
    wrong = 0
    for place in range(2 * WRONG):
        here = page.url
        request, answer = (page.locator(".turns dd").nth(turn).inner_text() for turn in (0, 1))
        if json.loads(answer)["on"] is request.startswith("turn on"):
            page.keyboard.press("a")
        elif wrong < 3:
            wrong += 1
            page.keyboard.press("e")
            page.keyboard.press("Control+a")
            page.keyboard.type('{"on":true,"room":"attic","thing":"fan"}')
            page.keyboard.press("Control+Enter")
        else:
            page.keyboard.press("r")
            page.keyboard.type("the opposite of the request")
            page.keyboard.press("Enter")
        last = place == 2 * WRONG - 1
        page.wait_for_url(f"{served.url}/console/rows/review" if last else lambda url, here=here: url != here)
    page.get_by_role("button", name="Write the decisions").click()
    expect(page.get_by_text("5 accepted, 3 edited, 2 rejected rows")).to_be_visible()
    check_page(page)


def start_the_next_run(served: Served, page: Page) -> None:
    """The form refuses what is no setting; then the run is watched to its end."""
    store = served.scene.store
    before = store.records_of("dataset")[-1]
    follow(page.get_by_role("link", name="Start the next run"))
    expect(page.get_by_text("Nobody has made a forecast yet.")).to_be_visible()
    check_page(page)
    epochs = page.get_by_label("Epochs")
    epochs.fill("many")
    page.get_by_role("button", name="Start the run").click()
    expect(page.get_by_role("alert")).to_contain_text("epochs")
    expect(epochs).to_have_value("many")
    epochs.fill("2")
    page.get_by_role("button", name="Start the run").click()
    page.wait_for_url("**/console/jobs/1")
    title = page.get_by_role("heading", level=1)
    expect(page.get_by_text("tuned: epochs 2")).to_be_visible()
    expect(page.locator(".charts canvas")).to_have_count(1, timeout=_LONG)
    expect(title).to_contain_text("succeeded", timeout=_LONG)
    expect(page.get_by_role("link", name="tiny@v3", exact=True)).to_be_visible()
    after = store.records_of("dataset")[-1]
    summary = dataset_summary(store, after).review
    assert summary is not None
    assert (summary.accept, summary.edit, summary.reject) == (5, 3, 2)
    found = difference(store, before, after).rows
    assert (found["changed"], found["removed"]) == (3, 2)
    training_record = next(one for one in list_versions(store, "tiny") if one.number == 3)
    made = store.record(store.record(training_record.candidate).parents["training"])
    assert made.body["settings"]["epochs"] == 2


def cancel_and_forecast(served: Served, page: Page) -> None:
    """Another run is cancelled, and a forecast says why it cannot be made."""
    title = page.get_by_role("heading", level=1)
    page.goto(f"{served.url}/console/jobs/start")
    page.get_by_label("Epochs").fill("100")
    page.get_by_role("button", name="Start the run").click()
    page.wait_for_url("**/console/jobs/2")
    expect(title).to_contain_text("running", timeout=_LONG)
    page.get_by_role("button", name="Cancel").click()
    expect(title).to_contain_text("cancelled", timeout=_LONG)
    page.goto(f"{served.url}/console/jobs/start")
    page.get_by_role("button", name="Forecast it first").click()
    page.wait_for_url("**/console/jobs/3")
    expect(title).to_contain_text("Job 3: forecast")
    expect(title).to_contain_text("failed", timeout=_LONG)
    expect(page.get_by_text("What to do").first).to_be_visible()
