"""An operator watches a canary get traffic, promotes it and rolls back; another tenant sees none of it."""

import re
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from playwright.sync_api import expect
from sqlalchemy import delete

from tests.acting import looking
from tests.console.conftest import Login, check_page, follow
from tests.console.test_login import cookie_of, csrf, plain
from tests.fabricate import APPROVER, NAME, OPERATOR, OWNER, Scene, put_requests
from tests.rollout.conftest import begin, champion
from tests.server.conftest import Served
from tunesmith.registry.versions import Version
from tunesmith.rollout import course
from tunesmith.rollout.commands import abort, promote
from tunesmith.rollout.controller import look
from tunesmith.rollout.state import get_rollout
from tunesmith.services import rollouts
from tunesmith.services import versions as version_service
from tunesmith.store import database
from tunesmith.store.tables import RequestRow

HOSTILE = '<script>alert(1)</script>"><img src=x onerror=alert(1)>\u202e{{7*7}} javascript:alert(1) ' + "x" * 1800
ANALYSIS: dict[str, Any] = {"analysis": {"metric": "json_valid", "min_requests": 500}}
STEPS = ({"setWeight": 50}, ANALYSIS, {"pause": {}}, {"setWeight": 100})


def test_an_operator_watches_a_canary_promotes_it_and_rolls_back(
    served: Served, versions: dict[int, Version], login: Login, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = served.scene.store
    rollout = served.begin(versions[2], *STEPS)
    served.until(rollout, lambda now: now.step == 1)
    (rolling,) = version_service.page_of_versions(looking(store, OWNER), state="rolling out").versions
    assert rolling.digest == versions[2].digest
    with plain(served, cookie_of(served, APPROVER)) as http:
        shown = http.get(f"/console/rollouts/{rollout.id}").text
        assert ("Steps" in shown, "Abort" in shown) == (True, False)
    page = login(OPERATOR, "/console/rollouts")
    page.on("dialog", lambda dialog: dialog.accept())
    follow(page.get_by_role("link", name=f"{rollout.id} · {NAME}"))
    expect(page.get_by_text("No request yet.")).to_be_visible()
    for _ in range(24):
        assert served.post().status_code == 200
    traffic = page.locator("figure", has_text="Requests per minute").first
    expect(traffic).to_be_visible(timeout=60_000)
    expect(page.get_by_role("img", name="Evidence (e-values, logarithmic)")).to_be_visible()
    expect(page.get_by_text("not decided", exact=True)).to_be_visible()
    found = rollouts.course(looking(store, OWNER), rollout.id)
    asked = [span for span in found.traffic.spans if span.stable.requests or span.canary.requests]
    assert sum(span.stable.requests + span.canary.requests for span in asked) == 24
    assert all(span.canary.score in (1.0, None) for span in asked)
    (evidence,) = found.evidence
    assert (evidence.points[-1].requests, evidence.whole) == (24, True)
    with monkeypatch.context() as patch:
        patch.setattr(course, "_DRAWN", 10)
        (first,) = rollouts.course(looking(store, OWNER), rollout.id).evidence
    assert (first.points[-1].requests, first.whole) == (10, False)
    decides = look(store, get_rollout(store, rollout.id))
    assert decides is not None
    newest, shown = evidence.points[-1], decides.evidence
    assert (newest.not_worse, newest.worse) == (shown["not_worse"], shown["worse"])
    page.get_by_text("The numbers").first.click()
    check_page(page)

    # An analysis that has not passed stops a promotion; the page says so and what to do.
    page.get_by_text("Promote", exact=True).click()
    page.get_by_role("button", name="Promote now").click()
    expect(page.get_by_role("alert")).to_contain_text("an analysis that has not passed yet")
    assert get_rollout(store, rollout.id).live

    boss = login(OWNER, f"/console/rollouts/{rollout.id}")
    boss.on("dialog", lambda dialog: dialog.accept())
    boss.get_by_text("Promote", exact=True).click()
    boss.get_by_label("Override, because").fill("the old version is broken")
    boss.get_by_role("button", name="Promote now").click()
    expect(boss.get_by_text("promoted", exact=True)).to_be_visible(timeout=60_000)
    assert champion(served.scene) == versions[2].digest

    page.reload()
    page.get_by_text("Roll back", exact=True).click()
    page.get_by_role("button", name="Roll back now").click()  # the browser asks for the reason first
    assert get_rollout(store, rollout.id).status == "promoted"
    page.get_by_label("Why").fill(HOSTILE)
    page.get_by_role("button", name="Roll back now").click()
    expect(page.get_by_text("rolled back", exact=True)).to_be_visible(timeout=60_000)
    assert champion(served.scene) == versions[1].digest
    who = page.locator("section", has=page.get_by_role("heading", name="History"))
    expect(who).to_contain_text("<script>alert(1)</script>")
    expect(who).to_contain_text("the old version is broken")
    assert page.locator("main script, main img").count() == 0
    page.goto(f"{served.url}/console/rollouts")
    assert page.locator("main script, main img").count() == 0
    expect(page.locator("details.fold")).to_contain_text("This server has no project")


def test_traffic_has_some_hundred_spans_however_long_it_lasts(scene: Scene, versions: dict[int, Version]) -> None:
    begin(scene, versions[1])
    rollout, ended = begin(scene, versions[2], {"setWeight": 50}, {"pause": {}}, {"setWeight": 100}), datetime.now(UTC)
    abort(scene.store, rollout.id, actor=OPERATOR, reason="enough")
    for hours, minutes in ((4, 1), (40, 10), (250, 60), (2000, 1440)):
        began = ended - timedelta(hours=hours)
        with database.writing(scene.store.engine) as session:
            session.execute(delete(RequestRow))
        times = [(began + (ended - began) * place / 50).isoformat(timespec="microseconds") for place in range(50)]
        rows = [{"at": at, "arm": ("stable", "canary")[n % 2], "ok": n % 5 != 0} for n, at in enumerate(times)]
        common = {"rollout": rollout.id, "scores": {"json_valid": 0.5}, "features": {"step": 1}}
        put_requests(scene.store, versions[2].digest, [{**common, **row} for row in rows])
        old = get_rollout(scene.store, rollout.id).model_copy(update={"started_at": began.isoformat()})
        found = course.traffic_of(scene.store, old)
        assert (found.minutes, 80 <= len(found.spans) <= 300) == (minutes, True)
        assert sum(span.canary.requests for span in found.spans) == 25
        assert sum(span.stable.failed + span.canary.failed for span in found.spans) == 10
        assert {span.canary.score for span in found.spans} == {None, 0.5}


@pytest.mark.attack("rollout", "a button of a page that shows an older step or another champion")
def test_a_button_changes_only_what_its_page_showed(served: Served, versions: dict[int, Version]) -> None:
    """By the fields of its form; server/test_rollouts.py sends them for every change."""
    pauses = ({"setWeight": 10}, {"pause": {}}, {"setWeight": 20}, {"pause": {}}, {"setWeight": 100})
    rollout, store = served.begin(versions[2], *pauses), served.scene.store
    served.until(rollout, lambda now: (now.step, now.status) == (1, "paused"))
    with plain(served, cookie_of(served)) as http:
        here = f"/console/rollouts/{rollout.id}"
        page = http.get(here).text
        fields = dict(re.findall(r'<input type="hidden" name="(step|champion|next)" value="([^"]*)">', page))
        assert fields == {"step": "1", "champion": versions[1].digest, "next": here}
        sent = {"csrf": csrf(page), **fields}
        assert http.post(f"/console/do{here.removeprefix('/console')}/resume", data=sent).status_code == 303
        served.until(rollout, lambda now: now.step == 3)
        refused = http.post(f"/console/do{here.removeprefix('/console')}/resume", data=sent)
        assert (refused.status_code, "went on meanwhile" in refused.text) == (409, True)
        assert get_rollout(store, rollout.id).step == 3
        promote(store, rollout.id, actor=OPERATOR)
        served.begin(versions[3], {"setWeight": 100})
        served.until(rollout, lambda _now: champion(served.scene) == versions[3].digest)
        assert "Roll back" not in http.get(here).text
