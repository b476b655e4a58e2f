"""The pages of versions and keys: what the list shows, decisions signed in the browser, lineage, verification."""

import html
import re
from urllib.parse import quote

import pytest
from playwright.sync_api import Page, expect

from tests.acting import looking
from tests.console.conftest import Login, check_page, follow, statements
from tests.console.evidence_rows import put_evaluation
from tests.console.test_login import cookie_of, csrf, plain
from tests.fabricate import APPROVER, NAME, OPERATOR, OWNER
from tests.server.conftest import Served
from tunesmith.core.text.names import Scope
from tunesmith.registry.approvals import require_approved
from tunesmith.registry.history import verify_log
from tunesmith.registry.registration import register
from tunesmith.registry.versions import Version
from tunesmith.services import lineage
from tunesmith.services import versions as service
from tunesmith.store import database
from tunesmith.store.people.identities import add_user, get_user
from tunesmith.store.people.proposed_keys import waiting_keys
from tunesmith.store.records import Record
from tunesmith.store.store import Store
from tunesmith.store.tables import VersionRow

Versions = dict[int, Version]
HOSTILE = '<script>alert(1)</script>"><img src=x onerror=alert(1)> {{7*7}} javascript:alert(1) \u202ex'


def decide(page: Page, decision: str, reason: str) -> None:
    """Prepare a decision on a version's page, look at what is signed, sign it and wait until it is listed."""
    page.get_by_label("Approve:" if decision == "approve" else "Refuse:").check()
    page.get_by_label("Reason").fill(reason)
    page.get_by_role("button", name="Verify it and show what I sign").click()
    expect(page.get_by_role("heading", name=f"You {decision} {NAME}@v1")).to_be_visible()
    expect(page.locator("#statement dl")).to_contain_text(reason)
    page.get_by_role("button", name="Sign and send").click()
    said = "approved" if decision == "approve" else "refused"
    expect(page.locator("#state tbody tr").filter(has_text=reason).filter(has_text=said)).to_be_visible()


def test_a_key_of_a_browser_is_confirmed_and_refuses_and_approves(
    served: Served, login: Login, versions: Versions
) -> None:
    store = served.scene.store
    add_user(store, "ada", ["approver"], actor=OWNER)
    ada = login("ada", "/console/keys")
    expect(ada.get_by_text("Keys of others")).to_have_count(0)
    ada.get_by_role("button", name="Make a key in this browser").click()
    waiting = ada.locator("section", has=ada.get_by_role("heading", name="Waiting for an admin"))
    expect(waiting.get_by_text("in this browser")).to_be_visible()
    told = re.sub(r"\s", "", waiting.locator(".fingerprint").inner_text())
    (proposed,) = waiting_keys(store, "ada")
    assert proposed.fingerprint == f"sha256:{told}"
    check_page(ada)

    # It does not count yet; the statement is shown before it is signed.
    ada.goto(f"{served.url}/console/versions/{NAME}/1")
    ada.get_by_label("Refuse:").check()
    ada.get_by_role("button", name="Verify it and show what I sign").click()
    expect(ada.get_by_role("alert")).to_contain_text("needs a reason")
    ada.get_by_label("Reason").fill(HOSTILE)
    ada.get_by_role("button", name="Verify it and show what I sign").click()
    expect(ada.get_by_text("No key of this browser counts for you")).to_be_visible()
    expect(ada.get_by_role("button", name="Sign and send")).to_be_disabled()
    for text in ("<script>alert(1)</script>", "⟨U+202E⟩"):
        expect(ada.locator("#statement")).to_contain_text(text)
    check_page(ada)
    by_file = f"tunesmith refuse {NAME}@v1 --server {served.url}"
    expect(ada.locator("pre", has_text="--key FILE")).to_contain_text(by_file)

    ann = login(OWNER, "/console/keys")
    expect(ann.locator("body")).not_to_contain_text(told[:20])
    expect(ann.get_by_text("in this browser", exact=True)).to_be_hidden()  # a key of hers, in a file
    field = ann.get_by_label("Its fingerprint, as ada told it to you")
    field.fill("0" * 64)
    ann.get_by_role("button", name="Confirm").click()
    expect(ann.locator("body")).to_contain_text("no key of ada waits under this fingerprint")
    ann.goto(f"{served.url}/console/versions/{NAME}/1")  # she registered it
    expect(ann.get_by_role("heading", name="Approve or refuse")).to_have_count(0)
    ann.goto(f"{served.url}/console/keys")
    ann.get_by_label("Its fingerprint, as ada told it to you").fill(told[:24])
    ann.get_by_role("button", name="Confirm").click()
    expect(ann.get_by_text("None.", exact=True)).to_be_visible()
    assert get_user(store, "ada").fingerprint == proposed.fingerprint

    assert served.post().status_code == 200
    ada.goto(f"{served.url}/console/versions/{NAME}/1")
    decide(ada, "refuse", "two answers name a customer")
    assert served.post().status_code == 404
    expect(ada.get_by_role("heading", level=1)).to_contain_text("refused")
    decide(ada, "approve", "they were made up")
    assert served.post().status_code == 200
    expect(ada.get_by_role("heading", level=1)).to_contain_text("serving")

    approval = require_approved(store, versions[1])
    assert (approval.approver, approval.reason) == ("ada", "they were made up")
    assert service.verify_offline(store, f"{NAME}@v1").ok
    assert verify_log(store) == []
    assert not list((store.root / "keys").glob("ada*"))


def test_what_else_a_record_was_used_for_is_shown_to_its_tenant_only(served: Served) -> None:
    """Nothing of another tenant's version: server/test_api.py."""
    version = served.scene.version(5, approved=False, name="acme-bot", scope=Scope("acme"))
    add_user(served.scene.store, "gus", ["approver"], actor=OWNER, scope=Scope("globex"))
    base = f"/console/versions/{NAME}/1/records/{served.scene.base}"
    for name, total, sees in (("gus", 4, False), (OPERATOR, 5, True)):
        with plain(served, cookie_of(served, name)) as http:
            listed = http.get("/console/versions").text
            assert (f"{total} versions" in listed, "acme-bot" in listed) == (True, sees), name
            assert (version.candidate[7:19] in http.get(base).text) == sees, name
            if not sees:  # nor through a version that both see: acme's records are not in its lineage
                assert http.get(f"/console/versions/{NAME}/1/records/{version.digest}").status_code == 404


def test_lineage_leads_to_a_licence_and_is_verified(
    served: Served, login: Login, versions: Versions, monkeypatch: pytest.MonkeyPatch
) -> None:
    page = login(OPERATOR, f"/console/versions/{NAME}/1")
    rows = page.get_by_role("region", name="Table of the lineage").locator("tbody tr")
    kinds = [each.split()[0] for each in rows.locator("th").all_inner_texts()]
    assert kinds.index("dataset") < kinds.index("training") < kinds.index("version") < kinds.index("approval")
    trained = rows.filter(has=page.get_by_role("rowheader", name="training"))
    follow(trained.get_by_role("link", name="dataset"))
    assert page.url == f"{served.url}/console/versions/{NAME}/1/records/{served.scene.dataset}"
    expect(page.get_by_role("heading", level=1)).to_contain_text("Dataset")
    expect(page.locator("section", has=page.get_by_role("heading", name="Rows"))).to_contain_text("Apache-2.0")
    expect(page.locator("main")).not_to_contain_text("switch")  # no row's text
    monkeypatch.setattr(lineage, "ROWS", 1)
    page.reload()
    follow(page.get_by_role("link", name="Next"))
    expect(page.locator(".pager")).to_contain_text("Page 2 of")
    page.get_by_label("Split").select_option("test")
    page.get_by_label("Search").fill("no such row")
    page.get_by_role("button", name="Show").click()
    expect(page.get_by_text("No row matches.")).to_be_visible()
    page.goto(f"{served.url}/console/versions/{NAME}/1/records/{versions[1].candidate}")
    expect(page.locator("main")).to_contain_text("Answer as tuned.")
    used = page.locator("section", has=page.get_by_role("heading", name="Used for"))
    follow(used.get_by_role("link", name="version").first)
    expect(page.get_by_role("heading", level=1)).to_contain_text("Version")

    page.goto(f"{served.url}/console/versions/{NAME}/1")
    page.get_by_role("button", name="Verify now").click()
    expect(page.locator("#verified")).to_contain_text(f"{NAME}@v1 verifies")
    scores = served.scene.store.record(versions[1].evaluation).blobs["scores.jsonl"]
    path = served.scene.store.blob_path(scores)
    path.chmod(0o644)
    path.write_bytes(path.read_bytes() + b"\n")
    page.get_by_role("button", name="Verify now").click()
    expect(page.locator("#verified")).to_contain_text("does not verify")
    expect(page.locator("#verified li")).to_contain_text(scores[9:])


def many(store: Store, version: Version, count: int) -> None:
    """Versions of other names that repeat the record of one, so that the list is long."""
    record = store.record(version.digest)
    with database.writing(store.engine) as session:
        for number in range(1, count + 1):
            body = {**record.body, "name": "bulk", "number": number}
            digest = store.put_record(
                Record(kind="version", parents=record.parents, blobs=record.blobs, body=body), session
            )
            session.add(VersionRow(name="bulk", number=number, digest=digest, key=get_user(store, OWNER).fingerprint))


def test_a_long_list_is_paged_and_searched(served: Served, login: Login, versions: Versions) -> None:
    store, ann = served.scene.store, looking(served.scene.store, OWNER)
    few = statements(store, lambda: service.page_of_versions(ann))
    many(store, versions[4], 200)
    assert statements(store, lambda: service.page_of_versions(ann)) == few
    page = login(OPERATOR, "/console/versions")
    expect(page.locator("main")).to_contain_text("Page 1 of 5, 204 versions")
    expect(page.locator("tbody tr")).to_have_count(50)
    follow(page.get_by_role("link", name="Next"))
    expect(page.locator("main")).to_contain_text("Page 2 of 5")
    page.get_by_label("Search").fill(f"{NAME}@v1")
    page.get_by_role("button", name="Show").click()
    expect(page.locator("tbody tr")).to_have_count(1)
    expect(page.locator("tbody")).to_contain_text("serving")
    found = {state: service.page_of_versions(ann, state=state).total for state in service.STATES}
    assert found == {**dict.fromkeys(service.STATES, 0), "serving": 1, "approved": 2, "waiting": 201}
    (one,) = service.page_of_versions(ann, text=versions[2].digest[7:19]).versions
    assert one.version == f"{NAME}@v2"
    with plain(served, cookie_of(served)) as http:
        for path, status in (
            ("?state=%3Cscript%3E", 409),
            ("?q=%25_'\"@v99999999999", 200),
            ("?q=%00%25_'\"@v99999999999", 400),
            (f"/{NAME}/0", 400),
            (f"/{NAME}/1/records/sha256:{'0' * 64}", 404),
            (f"/{NAME}/1/records/nonsense", 400),
        ):
            answer = http.get(f"/console/versions{path}")
            assert answer.status_code == status, path
            assert "<script>alert" not in answer.text


def test_what_is_no_decision_is_refused(served: Served) -> None:
    with plain(served, cookie_of(served, APPROVER)) as http:
        mark = {"csrf": csrf(http.get("/").text)}
        signed = {"signature": "A" * 88, "key": "sha256:" + "0" * 64}
        for statement in ("{", "{}", '"\\ud800"'):
            answer = http.post("/console/do/decisions", data={**mark, **signed, "statement": statement})
            assert answer.status_code == 409, (statement, answer.text)
        to = f"/console/do/keys/{quote(HOSTILE[:150].replace('/', ''))}/reject"
        answer = http.post(to, data={**mark, "fingerprint": HOSTILE[:150]})
        assert (answer.status_code, "<script>alert" in answer.text) == (409, False)


def test_documents_of_a_version(served: Served) -> None:
    store = served.scene.store
    register(store, name="desk", verdict=put_evaluation(served.scene).verdict, actor=OWNER)
    with plain(served, cookie_of(served)) as http, plain(served, cookie_of(served, OWNER)) as reader:
        lost = r'href="[^"]+/requests\?([^"]+)">the held-out requests that it lost against'
        assert not re.search(lost, http.get("/console/versions/desk/1").text), "an operator may not read rows"
        found = re.search(lost, reader.get("/console/versions/desk/1").text)
        assert found
        assert html.unescape(found[1]) == "focus=tuned&rival=remote&show=losses"
        report = http.get("/console/versions/desk/1/report.html")
        assert report.status_code == 200
        assert "desk@v1" in report.text
        assert "sandbox" in report.headers["content-security-policy"]
        assert 'id="examples"' not in report.text
        assert 'id="examples"' in reader.get("/console/versions/desk/1/report.html").text
        for name, said in (("report.md", "Verdict"), ("datasheet.md", "#"), ("NOTICE.md", "Notice for desk")):
            answer = http.get(f"/console/versions/desk/1/{name}")
            assert (answer.status_code, answer.headers["cache-control"]) == (200, "no-store")
            assert answer.headers["content-disposition"].startswith("attachment; filename=")
            assert said in answer.text
