"""An engineer starts a run in the browser, and watches it while a real worker performs it; they cancel another.

The page is never loaded again meanwhile.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from playwright.sync_api import expect

from tests.console.conftest import Login, check_accessible, fits, take_pictures
from tests.fabricate import Scene
from tests.server.conftest import Served, running
from tests.server.fake_engine import FakeEngine
from tests.tiny_project import write_project
from tunesmith.project import Project
from tunesmith.services import jobs
from tunesmith.services.own_worker import OwnWorker
from tunesmith.store.identities import add_user, ensure_owner

pytestmark = pytest.mark.slow
_LONG = 300_000  # milliseconds, for a worker that starts and trains on a busy machine


@pytest.fixture
def served(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Served]:
    """A server of a tiny project, and its worker."""
    monkeypatch.setenv("TUNESMITH_USER", "olive")
    project = Project.load(write_project(tmp_path / "p"))
    ensure_owner(project.store)
    add_user(project.store, "amy", ["engineer"], actor="olive")
    add_user(project.store, "olga", ["operator"], actor="olive")
    with running(Scene(project.store, "", ""), FakeEngine(""), project=project) as found:
        worker = OwnWorker(project.root, print)
        try:
            yield found
        finally:
            worker.stop(60)


def test_an_engineer_starts_a_run_and_watches_it_and_cancels_another(served: Served, login: Login) -> None:
    store = served.scene.store
    page = login("amy", "/console/runs")
    page.get_by_role("link", name="Start a run").click()
    expect(page.get_by_text("Nobody has made a forecast yet.")).to_be_visible()
    check_accessible(page)
    take_pictures(page, "run-start")
    assert fits(page)
    epochs = page.get_by_label("Epochs")
    expect(epochs).to_have_value("1")
    epochs.fill("many")
    page.get_by_role("button", name="Start the run").click()
    expect(page.get_by_role("alert")).to_contain_text("epochs")
    expect(epochs).to_have_value("many")
    epochs.fill("2")
    page.get_by_role("button", name="Start the run").click()
    page.wait_for_url("**/console/runs/1")
    title = page.get_by_role("heading", level=1)
    expect(page.get_by_text("tuned: epochs 2")).to_be_visible()
    expect(title).to_contain_text("running", timeout=_LONG)
    expect(page.locator(".charts canvas")).to_have_count(1, timeout=_LONG)
    expect(title).to_contain_text("succeeded", timeout=_LONG)
    expect(page.get_by_text("tiny@v1", exact=True)).to_be_visible()
    expect(page.locator(".charts")).to_contain_text("tuned: loss")
    result = jobs.show(store, 1).result
    assert result["train"]["tuned"]["epochs"] == 2.0
    assert store.record(result["train"]["tuned"]["training"]).body["settings"]["epochs"] == 2

    page.goto(f"{served.url}/console/runs/start")
    page.get_by_label("Epochs").fill("100")
    page.get_by_role("button", name="Start the run").click()
    page.wait_for_url("**/console/runs/2")
    expect(title).to_contain_text("running", timeout=_LONG)
    page.once("dialog", lambda dialog: dialog.accept())
    page.get_by_role("button", name="Cancel").click()
    expect(title).to_contain_text("cancelled", timeout=_LONG)
    page.get_by_role("button", name="Compare").click()
    expect(page.get_by_role("row").filter(has_text="candidates.tuned.train.epochs")).to_contain_text("2")

    page.goto(f"{served.url}/console/runs/start")
    page.get_by_role("button", name="Forecast it first").click()
    page.wait_for_url("**/console/runs/3")
    expect(title).to_contain_text("Forecast 3")
    expect(title).to_contain_text("failed", timeout=_LONG)
    expect(page.get_by_text("What to do").first).to_be_visible()

    looking = login("olga", "/console/runs/start")
    expect(looking.get_by_text("needs the role engineer")).to_be_visible()
    expect(looking.get_by_role("button", name="Start the run")).to_have_count(0)
