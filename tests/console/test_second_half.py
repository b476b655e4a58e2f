"""A finished project whose engineer goes on in the browser alone: looks at lost requests, corrects ten rows by keys,
and starts the next run, with a real worker.

No page is loaded again to see what changed.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from playwright.sync_api import Page, expect

from tests.console.conftest import Login, follow
from tests.fabricate import OPERATOR, Scene
from tests.server.conftest import Served, running
from tests.server.fake_engine import FakeEngine
from tests.tiny_project import rows, settings, write_project
from tests.waiting import SECONDS
from tunesmith.data.building.summary import dataset_summary
from tunesmith.data.governance.difference import difference
from tunesmith.project import Project
from tunesmith.registry.versions import list_versions
from tunesmith.services.evaluations import evaluation
from tunesmith.services.releases import versions
from tunesmith.services.runs import training
from tunesmith.services.runs.own_worker import OwnWorker
from tunesmith.store.people.identities import add_user, ensure_owner

pytestmark = pytest.mark.slow
_LONG = SECONDS * 1000
WRONG = 5  # rows whose request has another answer, too


def write(folder: Path) -> Project:
    """A project of two candidates, some rows of which contradict each other."""
    known, data = settings()["candidates"], settings()["data"]
    assert isinstance(known, dict)
    assert isinstance(data, dict)
    candidates = {name: known[name] for name in ("held", "tuned")}
    task = {"schema": "schema.json", "scorers": ["json_valid"]}
    data = {**data, "review": "review.jsonl"}
    write_project(folder, candidates=candidates, task=task, data=data)
    wrong = [json.loads(json.dumps(row)) for row in rows()[:WRONG]]
    for row in wrong:
        answer = json.loads(row["messages"][1]["content"])
        row["messages"][1]["content"] = json.dumps({**answer, "on": not answer["on"]}, separators=(",", ":"))
    with (folder / "rows.jsonl").open("a") as stream:
        stream.writelines(json.dumps(row) + "\n" for row in wrong)
    return Project.load(folder)


@pytest.fixture
def served(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Served]:
    """A server and its worker. `held` is tiny@v1, and tiny@v2, the tuned candidate, waits for an approval."""
    monkeypatch.setenv("TUNESMITH_USER", "olive")
    project = write(tmp_path / "p")
    store = project.store
    ensure_owner(store)
    for name, role in (("amy", "engineer"), (OPERATOR, "operator")):
        add_user(store, name, [role], actor="olive")
    verdict = evaluation.gate(project, "held").digest
    versions.register(store, verdict, name="tiny", risk=None)
    training.run(project)
    (base,) = store.records_of("base")
    with running(Scene(store, "", ""), FakeEngine(base), project=project) as found:
        worker = OwnWorker(project.root, print)
        try:
            yield found
        finally:
            worker.stop(60)


def test_an_engineer_goes_on_without_a_terminal(served: Served, login: Login) -> None:
    page = login("amy", "/console/versions/tiny/2")
    page.on("dialog", lambda dialog: dialog.accept())
    look_at_lost_requests(page)
    correct_ten_rows(served, page)
    start_the_next_run(served, page)
    cancel_and_forecast(served, page)
    olga = login(OPERATOR, "/console/jobs/start")
    expect(olga.get_by_text("needs the role engineer")).to_be_visible()
    expect(olga.get_by_role("button", name="Start the run")).to_have_count(0)


def look_at_lost_requests(page: Page) -> None:
    """From the version, one click leads to the requests that it lost, a second opens one."""
    follow(page.get_by_role("link", name=re.compile("it lost against held")))
    expect(page.get_by_label("Show")).to_have_value("losses")
    lost = page.locator(".matrix tbody tr")
    expect(lost.first).to_contain_text("loss")
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


def start_the_next_run(served: Served, page: Page) -> None:
    """The form refuses what is no setting; then the run is watched to its end."""
    store = served.scene.store
    before = store.records_of("dataset")[-1]
    follow(page.get_by_role("link", name="Start the next run"))
    expect(page.get_by_text("Nobody has made a forecast yet.")).to_be_visible()
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
