"""The first page and operations: what serves, moves and waits for whom; the audit log, people, drift and recalls."""

import hashlib
import re
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import yaml
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from playwright.sync_api import Page, expect
from sqlalchemy import text

from tests.acting import do, looking
from tests.console.conftest import Login, check_page, follow, statements
from tests.console.test_login import cookie_of, csrf, plain
from tests.fabricate import APPROVER, NAME, OPERATOR, OWNER, STEWARD, Scene, approve, put_requests
from tests.server.conftest import Served
from tests.tiny_project import settings
from tunesmith.core.clock import now
from tunesmith.core.messages import Message
from tunesmith.core.text.names import Scope
from tunesmith.monitoring.cases import Case, put_case
from tunesmith.project import Project, parse_settings
from tunesmith.registry.signing.keys import read_public_key
from tunesmith.registry.versions import Version
from tunesmith.rollout.commands import abort
from tunesmith.services import audit, home, monitoring, users
from tunesmith.services.actions import audit_words
from tunesmith.services.home import Home
from tunesmith.store import database
from tunesmith.store.people.identities import add_user, get_user
from tunesmith.store.people.proposed_keys import propose_key
from tunesmith.store.people.tokens import issue_token
from tunesmith.store.tables import AliasRow, DeliveryRow, JobRow

HOSTILE = '<script>alert(1)</script>"><img src=x onerror=alert(1)>\u202e{{7*7}} javascript:alert(1) ' + "x" * 10_000
HOOK = {"url": "https://hooks.example.org/x", "secret": "HOOK_SECRET", "events": ["rollout.started"]}


@pytest.fixture
def project(served: Served, tmp_path: Path) -> Project:
    """A project file for the served versions; its folder holds nothing."""
    stated = {**settings(), "name": NAME, "monitoring": {"min_requests": 50}, "webhooks": {"chat": HOOK}}
    found = Project(tmp_path, parse_settings(yaml.safe_dump(stated), "tunesmith.yaml"))
    found.store, served.serving.project = served.scene.store, found
    return found


def harmless(page: Page) -> None:
    """Nothing that strangers wrote became an element, and the page fits a phone."""
    assert page.locator("main script, main img").count() == 0
    check_page(page)


def test_an_admin_searches_and_verifies_the_audit_log(
    served: Served, versions: dict[int, Version], login: Login
) -> None:
    store = served.scene.store
    rollout = served.begin(versions[2], {"setWeight": 10}, {"pause": {}}, {"setWeight": 100})
    abort(store, rollout.id, actor=OPERATOR, reason=HOSTILE)
    for place in range(50):
        add_user(store, f"person-{place}", ["steward"], actor=OWNER)
    page = login(OWNER, "/console/operations/audit")
    rows = page.get_by_role("region", name="Entries").locator("tbody tr")
    expect(rows).to_have_count(50)
    expect(rows.nth(2)).to_contain_text("person-49")
    page.get_by_label("Search users").fill("Onerror")
    page.get_by_role("button", name="Search").click()
    expect(rows).to_have_count(1)
    expect(rows.first).to_contain_text("rollout.abort")
    expect(rows.first).to_contain_text("aborted the rollout")
    assert not [one for one in audit.show_audit(store).entries if audit_words(one.action) == one.action]
    rows.first.locator("summary").click()
    expect(rows.first).to_contain_text(OPERATOR)
    harmless(page)
    assert audit.show_audit(store, containing="100%").total == 0, "% is a character, not a wildcard"
    assert audit.show_audit(store, containing="person-4", limit=3).total == 11

    page.get_by_role("button", name="Verify the log now").click()
    expect(page.get_by_text("The log is unchanged.")).to_be_visible(timeout=60_000)
    with database.writing(store.engine) as session:
        session.execute(text("update audit set actor = 'nobody' where action = 'rollout.abort'"))
    page.get_by_role("button", name="Verify the log now").click()
    expect(page.get_by_text("The log is not as it was written.")).to_be_visible(timeout=60_000)
    expect(page.locator("#verified")).to_contain_text("was changed after it was written")


def test_an_admin_adds_a_person_changes_roles_ends_a_token_and_deactivates(served: Served, login: Login) -> None:
    store = served.scene.store
    page = login(OWNER, "/console/operations/people")
    page.on("dialog", lambda dialog: dialog.accept())
    page.get_by_text("Add a person").click()
    page.get_by_label("Name").fill("zoe")
    page.get_by_label("approver").first.check()
    page.get_by_label("Tenant").fill("acme")
    page.get_by_role("button", name="Add", exact=True).click()
    expect(page.get_by_role("heading", name="zoe")).to_be_visible(timeout=60_000)
    zoe = get_user(store, "zoe")
    assert (zoe.roles, zoe.tenant) == (("approver",), "acme")
    issue_token(store, "zoe", actor="zoe", name="laptop")
    page.reload()
    harmless(page)
    page.get_by_role("button", name="Revoke laptop of zoe").click()
    expect(page.get_by_role("button", name="Revoke laptop of zoe")).to_have_count(0, timeout=60_000)
    assert [token.status for token in users.list_tokens(looking(store), user="zoe").tokens] == ["revoked"]
    page.locator("summary", has_text="Roles of zoe").click()
    card = page.locator("section", has=page.get_by_role("heading", name="zoe"))
    card.get_by_label("operator").check()
    page.get_by_role("button", name="Set the roles of zoe").click()
    expect(card).to_contain_text("approver, operator", timeout=60_000)
    page.get_by_role("button", name="Deactivate zoe").click()
    expect(card).to_contain_text("deactivated", timeout=60_000)
    # The last admin cannot go; the page says why.
    page.get_by_role("button", name=f"Deactivate {OWNER}").click()
    expect(page.get_by_role("alert")).to_contain_text("without an admin")


def test_others_see_themselves_only(served: Served) -> None:
    """server/test_api.py sends every form as another tenant."""
    add_user(served.scene.store, "eve", ["admin", "operator"], actor=OWNER, scope=Scope("beta"))
    for name in ("eve", STEWARD):
        with plain(served, cookie_of(served, name)) as http:
            page = http.get("/console/operations/people").text
            assert re.findall(r"<h2[^>]*>\s*(\w+)", page) == [name]
            mine = f"/console/do/users/{name}/roles"
            assert http.post(mine, data={"csrf": csrf(page), "roles": "admin"}).status_code == 403
    # What concerns all tenants is no page for a user of one.
    with plain(served, cookie_of(served, "eve")) as http:
        assert http.get("/console/operations", follow_redirects=True).url.path == "/console/operations/people"
        for path in ("audit", "audit?search=home", "drift", "recall?cause=version+home@v1", "impact?base=tiny"):
            assert http.get(f"/console/operations/{path}").status_code == 404


def test_an_operator_sees_what_moved_what_was_recalled_and_what_did_not_arrive(
    served: Served, versions: dict[int, Version], project: Project, login: Login
) -> None:
    store = served.scene.store
    at, until = now() - timedelta(minutes=30), now() + timedelta(days=1)
    kept = hashlib.md5(b"kept", usedforsecurity=False).hexdigest()
    lengths = {f"r{place}": 700.0 + place for place in range(1, 200)} | {kept: 9000.0}
    asked = {"at": at.isoformat(timespec="microseconds")}
    rows = [{**asked, "id": each, "features": {"characters": length}} for each, length in lengths.items()]
    put_requests(store, versions[1].digest, rows)
    with database.writing(store.engine) as session:
        about = {"project": NAME, "webhook": "chat", "type": "rollout.started", "body": "{}", "due": 0.0}
        session.add(DeliveryRow(**about, event="evt_1", seq=1, attempts=8, given_up=True, error="HTTP 500"))
    stated: dict[str, Any] = {"version": versions[1].digest, "by": OPERATOR, "tenant": "", "region": "", "scores": {}}
    stated |= {"messages": (Message(role="user", content=HOSTILE),), "expected": None, "answer": HOSTILE}
    put_case(store, Case(request=kept, at=at.isoformat(), until=until.isoformat(), **stated))
    do(store, monitoring.recall, actor=OWNER, kind="version", value=f"{NAME}@v3", reason=HOSTILE[:2000])

    found = monitoring.drift(looking(project))
    assert found.report is not None
    assert found.report.verdict == "drift"
    assert [(one.feature, one.request) for one in found.examples] == [("characters", kept)]
    page = login(OPERATOR, "/console/operations")
    drift = page.locator("#drift")
    expect(drift).to_contain_text("characters moved by", timeout=60_000)
    expect(drift.locator("figure")).to_have_count(0)
    expect(drift).to_contain_text("Kept requests are shown to engineers and stewards.")
    reader = login(OWNER, "/console/operations")
    expect(reader.locator("#drift figure")).to_contain_text("<script>alert(1)</script>", timeout=60_000)
    harmless(reader)
    page.get_by_role("button", name="Check what is left").click()
    expect(page.get_by_text("nothing is left", exact=True)).to_be_visible(timeout=60_000)
    page.get_by_label("Base model, as the project file").fill("tiny")
    page.get_by_role("button", name="Show").click()
    expect(page.get_by_role("region", name="Versions on this base")).to_contain_text(f"{NAME}@v1", timeout=60_000)
    page.get_by_label("Base model, as the project file").fill("nothing of that name")
    page.get_by_role("button", name="Show").click()
    expect(page.get_by_role("alert")).not_to_be_empty(timeout=60_000)
    harmless(page)

    status = home.status(looking(project, OPERATOR))
    assert any("drifted" in one.says for one in status.waiting)
    assert any("1 delivery of the webhook chat" in one.says and one.mine for one in status.waiting)
    page.get_by_role("button", name="Retry chat").click()
    expect(page.get_by_role("button", name="Retry chat")).to_have_count(0, timeout=60_000)
    assert [hook.given_up for hook in monitoring.list_webhooks(project).webhooks] == [0]


def says(found: Home, *, mine: bool | None = None) -> list[str]:
    return [one.says for one in found.waiting if mine in (None, one.mine)]


def test_the_first_page_says_what_serves_what_is_rolled_out_and_what_needs_action(
    served: Served, versions: dict[int, Version], login: Login
) -> None:
    store = served.scene.store
    put_requests(store, versions[1].digest, [{"ok": place >= 2} for place in range(8)])
    earlier = (now() - timedelta(hours=2)).isoformat(timespec="microseconds")
    put_requests(store, versions[1].digest, [{"ok": False, "at": earlier}] * 5)
    page = login(APPROVER)
    serving = page.get_by_role("region", name="Serving now")
    expect(serving.get_by_role("row").nth(1)).to_contain_text(f"{NAME}@v1")
    expect(serving.get_by_role("row").nth(1)).to_contain_text("25.0%")
    waits = page.locator("#waiting")
    expect(waits).to_contain_text(f"{NAME}@v4 waits for 1 more approver")
    expect(waits.get_by_text("for you")).to_have_count(1)
    expect(page.get_by_text("database: answers")).to_be_visible()
    expect(page.get_by_text("controller: answers")).to_be_visible()

    # While the page is open, a rollout pauses and the version is approved.
    rollout = served.begin(versions[2], {"setWeight": 10}, {"pause": {}}, {"setWeight": 100})
    expect(page.get_by_role("link", name=f"{NAME}@v2 gets 10%")).to_be_visible(timeout=60_000)
    expect(waits).to_contain_text(f"rollout {rollout.id} of {NAME} is paused", timeout=60_000)
    check_page(page)
    approve(store, versions[4], approver=APPROVER)
    expect(waits).not_to_contain_text("@v4", timeout=60_000)

    mine = login(OPERATOR)
    first = mine.locator("#waiting li").first
    expect(first).to_contain_text("for you")
    follow(first.get_by_role("link", name="is paused"))
    mine.wait_for_url(f"{served.url}/console/rollouts/{rollout.id}")


def test_each_item_names_who_may_do_it(served: Served, versions: dict[int, Version]) -> None:
    store = served.scene.store
    rollout = served.begin(versions[2], {"setWeight": 10}, {"pause": {}}, {"setWeight": 100})
    served.until(rollout, lambda now: now.status == "paused")
    approver, operator, steward = (home.home(looking(store, name)) for name in (APPROVER, OPERATOR, STEWARD))
    assert ["@v4" in one for one in says(approver, mine=True)] == [True]
    assert ["paused" in one for one in says(operator, mine=True)] == [True]
    assert says(steward, mine=True) == []
    assert sorted(says(approver)) == sorted(says(operator)) == sorted(says(steward))
    assert "paused" in says(operator)[0], "what waits for the viewer comes first"
    pem = ec.generate_private_key(ec.SECP256R1()).public_key()
    text = pem.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
    propose_key(store, OPERATOR, read_public_key(text), actor=OPERATOR)
    assert f"a key of {OPERATOR} waits to be confirmed" in says(home.home(looking(store, OWNER)), mine=True)
    # Who registered a version may not approve it, whatever their roles.
    add_user(store, "max", ["approver"], actor=OWNER)
    assert says(home.home(looking(store, "max")), mine=True)
    assert not [one for one in home.home(looking(store, OWNER)).waiting if one.mine and "@v4" in one.says]


def test_a_tenant_sees_what_serves_it_and_only_its_own_requests(served: Served, versions: dict[int, Version]) -> None:
    store = served.scene.store
    add_user(store, "eve", ["operator", "approver"], actor=OWNER, scope=Scope("beta"))
    for tenant, count in (("acme", 8), ("beta", 3)):
        put_requests(store, versions[1].digest, [{"tenant": tenant, "ok": place > 0} for place in range(count)])
    served.begin(versions[1], scope=Scope("acme"))
    served.begin(versions[2], {"setWeight": 10}, {"pause": {}}, {"setWeight": 100}, scope=Scope("acme"))
    found = home.home(looking(store, "eve"))
    assert [(one.version, one.tenant, one.requests, one.failed) for one in found.serving] == [(f"{NAME}@v1", "", 3, 1)]
    assert found.moving == ()
    assert says(found) == []
    assert home.home(looking(store, OPERATOR)).moving != ()


def test_a_queue_that_nobody_works_on_is_not_well(served: Served) -> None:
    store = served.scene.store
    (worker,) = (each for each in home.home(looking(store, OPERATOR)).health if each.part == "worker")
    assert worker.ok
    empty = {"arguments": {}, "progress": {}, "result": {}, "error": {}}
    row = {"project": "p", "kind": "run", "state": "queued", "created_by": OWNER, "most_attempts": 3, **empty}
    with database.writing(store.engine) as session:
        session.add(JobRow(**row, due=time.time() - 600, created=time.time() - 600))
    (worker,) = (each for each in home.home(looking(store, OPERATOR)).health if each.part == "worker")
    assert (worker.ok, "no worker takes them" in worker.says) == (False, True)


def test_more_champions_take_no_more_queries_and_a_list_that_is_cut_says_so(
    scene: Scene, versions: dict[int, Version]
) -> None:
    store = scene.store
    row = {"name": NAME, "alias": "champion", "region": "", "revision": 1, "version": versions[1].digest}

    def looked(*tenants: str) -> tuple[Home, int]:
        with store.change(OWNER, "test.aliases", NAME, {}) as session:
            session.add_all(AliasRow(**row, tenant=tenant) for tenant in tenants)
        return home.home(looking(store, OWNER)), statements(store, lambda: home.home(looking(store, OWNER)))

    (few, before), (many, after) = looked("a", "b"), looked(*(f"t{number}" for number in range(48)))
    assert (len(few.serving), len(many.serving), after <= before) == (2, 50, True)
    assert all(one.refused == "" for one in many.serving)
    assert (few.champions, many.champions) == (None, None)
    cut, _ = looked("t-more")
    assert (cut.champions, len(cut.serving), cut.versions) == (50, 50, None)
