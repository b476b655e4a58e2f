"""Log in by a link, stay logged in, log out; and what is refused."""

from __future__ import annotations

import httpx
import pytest
from playwright.sync_api import expect

from tests.console.conftest import Login, check_page
from tests.fabricate import OPERATOR, OWNER, Scene
from tests.server.conftest import CERTIFICATES, Served
from tunesmith.core.errors import Refused
from tunesmith.server.console.people.session import COOKIE, Viewer
from tunesmith.store.people import sessions
from tunesmith.store.people.identities import deactivate


def plain(served: Served, cookie: str = "") -> httpx.Client:
    cookies = {COOKIE: cookie} if cookie else {}
    return httpx.Client(base_url=served.url, cookies=cookies, timeout=60, verify=CERTIFICATES)


def cookie_of(served: Served, name: str = OPERATOR) -> str:
    store = served.scene.store
    found = sessions.follow_link(store, sessions.make_link(store, name, actor=name))
    assert found is not None
    assert found.secret is not None
    return found.secret


def test_a_person_logs_in_looks_and_logs_out(served: Served, login: Login) -> None:
    page = login()
    expect(page.get_by_role("heading", level=1)).to_have_text("Home")
    (cookie,) = page.context.cookies()
    assert (cookie["name"], cookie["httpOnly"], cookie["sameSite"]) == (COOKIE, True, "Strict")
    page.get_by_text(OPERATOR, exact=True).first.click()
    page.get_by_label("Dark").check()
    assert page.evaluate("document.documentElement.dataset.theme") == "dark"
    page.reload()
    assert page.evaluate("document.documentElement.dataset.theme") == "dark"
    page.get_by_text(OPERATOR, exact=True).first.click()
    page.get_by_role("button", name="Log out").click()
    page.wait_for_url("**/console/login")
    check_page(page)
    with plain(served, cookie["value"]) as http:
        assert http.get("/").status_code == 303, "the cookie of a session that was ended"


@pytest.mark.attack("people", "a login link that was used, has ended, or is made for somebody else")
def test_links(scene: Scene) -> None:
    store = scene.store
    link = sessions.make_link(store, OPERATOR, actor=OPERATOR, now=0)
    assert sessions.follow_link(store, link, now=sessions.LINK_SECONDS + 1) is None
    assert sessions.follow_link(store, link + "x", now=1) is None
    opened = sessions.follow_link(store, link, now=1)
    assert opened is not None
    assert opened.user.name == OPERATOR
    assert sessions.follow_link(store, link, now=1) is None, "used"
    with pytest.raises(Refused):
        sessions.make_link(store, OWNER, actor=OPERATOR)


@pytest.mark.attack("people", "an old cookie of a session, and the session of a user who was deactivated")
def test_a_session_ends(scene: Scene) -> None:
    store = scene.store

    def goes_on(secret: str | None, now: float) -> sessions.OpenSession | None:
        assert secret is not None
        return sessions.continue_session(store, secret, now=now)

    first = sessions.follow_link(store, sessions.make_link(store, OPERATOR, actor=OPERATOR, now=0), now=0)
    assert first is not None
    same = goes_on(first.secret, sessions.REPLACE_SECONDS - 1)
    assert same is not None
    assert same.secret is None
    second = goes_on(first.secret, sessions.REPLACE_SECONDS)
    assert second is not None
    assert second.secret not in (None, first.secret)
    assert goes_on(first.secret, sessions.REPLACE_SECONDS + sessions.BEFORE_SECONDS) is not None, "under way"
    assert goes_on(first.secret, sessions.REPLACE_SECONDS + sessions.BEFORE_SECONDS + 1) is None, "replaced"
    late = sessions.REPLACE_SECONDS + sessions.BEFORE_SECONDS + sessions.IDLE_SECONDS + 1
    assert goes_on(second.secret, late) is None, "nobody used it for two hours"
    third = sessions.follow_link(store, sessions.make_link(store, OPERATOR, actor=OPERATOR, now=0), now=0)
    assert third is not None
    secret, now = third.secret, 0.0
    while now + 3600 <= sessions.SESSION_SECONDS:
        now += 3600
        following = goes_on(secret, now)
        assert following is not None
        secret = following.secret
    assert goes_on(secret, sessions.SESSION_SECONDS + 1) is None, "twelve hours are over"
    fourth = sessions.follow_link(store, sessions.make_link(store, OPERATOR, actor=OPERATOR, now=0), now=0)
    assert fourth is not None
    deactivate(store, OPERATOR, actor=OWNER)
    assert goes_on(fourth.secret, 1) is None


@pytest.mark.attack("people", "forms of another site, without a session, and with another session's mark")
def test_forms_that_are_refused(served: Served) -> None:
    mine, other = cookie_of(served), cookie_of(served)
    found = sessions.continue_session(served.scene.store, other)
    assert found is not None
    mark = Viewer(found.user, found.id, served.serving, "/").csrf
    with plain(served, mine) as http:
        assert http.post("/console/logout").status_code == 403
        assert http.post("/console/logout", data={"csrf": mark}).status_code == 403
        assert http.post("/console/logout", headers={"Sec-Fetch-Site": "cross-site"}).status_code == 403
        assert http.post("/console/logout", headers={"Origin": "https://elsewhere.example"}).status_code == 403
        assert http.get("/").status_code == 200
    with plain(served) as http:
        assert http.post("/console/logout").status_code == 401
        assert http.get("/").headers["location"] == "/console/login?next=/"
        assert http.get("/console/none").status_code == 404
        assert http.get("/console/static/../session.py").status_code == 404
        link = sessions.make_link(served.scene.store, OPERATOR, actor=OPERATOR)
        found_at = http.post(f"/console/login/{link}", data={"next": "//elsewhere.example"})
        assert found_at.headers["location"] == "/"
    with plain(served, other) as http:
        done = http.post("/console/logout", data={"csrf": mark})
        assert done.headers["location"] == "/console/login"
        assert http.get("/", headers={"Cookie": f"{COOKIE}={other}"}).status_code == 303


def test_pages_may_not_be_kept_framed_or_scripted(served: Served) -> None:
    with plain(served, cookie_of(served)) as http:
        page = http.get("/")
        assert page.headers["cache-control"] == "no-store"
        policy = page.headers["content-security-policy"]
        assert "default-src 'none'" in policy
        assert "unsafe" not in policy
        assert "frame-ancestors 'none'" in policy
        assert "<script>" not in page.text
        assert "style=" not in page.text
