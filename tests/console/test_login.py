"""Log in by a link or at an identity provider, stay logged in, log out; what is refused; what strange addresses get."""

import asyncio
import contextlib
import getpass
import json
import random
import re
import socket
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml
from cryptography.hazmat.primitives.asymmetric import ec
from playwright.sync_api import Browser, Page, expect

from tests.acting import do
from tests.attack_table import Happened
from tests.console.conftest import Login, check_page, follow
from tests.fabricate import APPROVER, OPERATOR, OWNER, Scene
from tests.rollout.conftest import logged
from tests.server.conftest import CERTIFICATES, Served, running
from tests.server.fake_engine import FakeEngine
from tests.tiny_project import settings, write_project
from tests.waiting import SECONDS, until
from tunesmith.core.digests import digest_bytes
from tunesmith.core.errors import Inconclusive, Refused, UsageError
from tunesmith.core.text.names import Scope
from tunesmith.project import Project, parse_settings
from tunesmith.registry.signing.attestations import public_pem
from tunesmith.server.console import changes
from tunesmith.server.console.changes import Changes
from tunesmith.server.console.routing import COOKIE, SECURE_COOKIE, Viewer, local_page
from tunesmith.server.errors import not_stored, passes
from tunesmith.services import users
from tunesmith.store import audit, database
from tunesmith.store.people import sessions
from tunesmith.store.people.identities import add_user, deactivate


def plain(served: Served, cookie: str = "") -> httpx.Client:
    cookies = {COOKIE: cookie} if cookie else {}
    return httpx.Client(base_url=served.url, cookies=cookies, timeout=60, verify=CERTIFICATES)


def csrf(page: str) -> str:
    """What the forms of a session carry."""
    found = re.search(r'name="csrf" value="([0-9a-f]+)"', page)
    assert found
    return found[1]


def opened(scene: Scene, name: str = OPERATOR, by: str = "", now: float | None = None) -> str:
    """The secret of a session that a link opened. by: who made the link."""
    made = sessions.make_link(scene.store, name, actor=by or name, now=now)
    found = sessions.follow_link(scene.store, made, now=now)
    assert found is not None
    assert found.secret is not None
    return found.secret


def cookie_of(served: Served, name: str = OPERATOR) -> str:
    return opened(served.scene, name)


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
    found = sessions.follow_link(store, link, now=1)
    assert found is not None
    assert found.user.name == OPERATOR
    assert sessions.follow_link(store, link, now=1) is None, "used"
    with pytest.raises(Refused):
        sessions.make_link(store, OWNER, actor=OPERATOR)

    def newest() -> tuple[str, str, Any, Any]:
        with database.reading(store.engine) as session:
            entry = audit.entries(session)[-1]
        return entry.action, entry.actor, entry.detail.get("by"), entry.detail.get("account")

    opened(scene, OPERATOR, OWNER)
    assert newest()[:3] == ("session.open", OPERATOR, OWNER)
    do(store, users.make_link, actor=OPERATOR, url="http://127.0.0.1")
    assert newest() == ("session.link", OPERATOR, None, getpass.getuser())


@pytest.mark.attack("people", "an old cookie of a session, and the session of a user who was deactivated")
def test_a_session_ends(scene: Scene) -> None:
    replace, before, idle, whole = (
        getattr(sessions, f"{each}_SECONDS") for each in ("REPLACE", "BEFORE", "IDLE", "SESSION")
    )

    def goes_on(secret: str, now: float) -> tuple[bool, str | None]:
        """Whether it does, and the secret that replaces its own."""
        found = sessions.continue_session(scene.store, secret, now=now)
        return found is not None, found and found.secret

    first = opened(scene, now=0)
    assert goes_on(first, replace - 1) == (True, None)
    _, second = goes_on(first, replace)
    assert second not in (None, first)
    assert goes_on(first, replace + before)[0], "under way"
    assert not goes_on(first, replace + before + 1)[0], "replaced"
    assert not goes_on(second or "", replace + before + idle + 1)[0], "nobody used it for two hours"
    secret, now = opened(scene, now=0), 0
    while now + 3600 <= whole:
        now += 3600
        _, following = goes_on(secret, now)
        assert following is not None
        secret = following
    assert not goes_on(secret, whole + 1)[0], "twelve hours are over"
    left = opened(scene, now=0)
    deactivate(scene.store, OPERATOR, actor=OWNER)
    assert not goes_on(left, 1)[0]


@pytest.mark.attack("people", "forms of another site, without a session, and with another session's mark")
def test_forms_that_are_refused(served: Served) -> None:
    """Without their session's mark, and of another site: server/test_api.py sends every form."""
    mine, other = cookie_of(served), cookie_of(served)
    found = sessions.continue_session(served.scene.store, other)
    assert found is not None
    mark = Viewer(**served.serving.here, user=found.user, session=found.id, path="/").csrf
    with plain(served, mine) as http:
        assert http.post("/console/logout", data={"csrf": mark}).status_code == 403
        page = http.get("/")
        assert (page.status_code, page.headers["cache-control"]) == (200, "no-store")
        policy = page.headers["content-security-policy"]
        assert ("default-src 'none'" in policy, "frame-ancestors 'none'" in policy, "unsafe" in policy) == (1, 1, 0)
        assert "<script>" not in page.text
        assert "style=" not in page.text
    with plain(served) as http:
        assert http.post("/console/logout").status_code == 401
        assert http.get("/").headers["location"] == "/console/login?next=/"
        assert http.get("/console/none").status_code == 404
        assert http.get("/console/static/../session.py").status_code == 404
        link = sessions.make_link(served.scene.store, OPERATOR, actor=OPERATOR)
        found_at = http.post(f"/console/login/{link}", data={"next": "//elsewhere.example"})
        assert found_at.headers["location"] == "/"
        # The cookie goes over HTTPS only where people come by HTTPS.
        link = sessions.make_link(served.scene.store, OPERATOR, actor=OPERATOR)
        done = http.post(f"/console/login/{link}", headers={"Origin": served.url.replace("http:", "https:")})
        (cookie,) = done.headers.get_list("set-cookie")
        assert (cookie.startswith(f"{SECURE_COOKIE}="), "Secure" in cookie) == (True, True)
        secret = cookie.partition("=")[2].partition(";")[0]
        assert http.get("/", headers={"Cookie": f"{SECURE_COOKIE}={secret}"}).status_code == 200
    with plain(served, other) as http:
        done = http.post("/console/logout", data={"csrf": mark})
        assert done.headers["location"] == "/console/login"
        assert http.get("/", headers={"Cookie": f"{COOKIE}={other}"}).status_code == 303


@pytest.mark.attack("people", "a person of another region than the server's")
def test_a_person_of_another_region_sees_nothing(served: Served) -> None:
    add_user(served.scene.store, "rita", ["engineer"], actor=OWNER, scope=Scope("", "eu"))
    with plain(served, cookie_of(served, "rita")) as http:
        for path in ("/", "/console/evidence", "/console/versions", "/console/rollouts"):
            page = http.get(path)
            assert (page.status_code, "for the region eu" in page.text) == (403, True)


@pytest.mark.attack("input", "addresses and forms of the console with numbers and characters that nothing has")
def test_strange_addresses_are_no_faults_of_the_server(served: Served) -> None:
    strange = (
        "/console/rows/review/9223372036854775808",
        "/console/rollouts/9223372036854775808",
        "/console/rollouts/4000000000000000000",
        "/console/jobs/99999999999999999999",
        "/console/rollouts?page=9223372036854775808",
        "/console/rows/review?page=99999999999999999999999",
        "/console/versions?q=%00",
        "/console/versions/%00/1",
        "/console/jobs?by=%00",
        "/console/operations/recall?cause=x",
        "/console/operations/recall?cause=row%20",
        "/console/operations/impact?base=%FF",
        "/console/operations/audit?search=%00",
        "/console/evidence/zzz",
        "/console/evidence/zzz/matrix",
    )
    with plain(served, cookie_of(served, OWNER)) as http:
        for path in strange:
            assert http.get(path).status_code < 500, path
        answer = http.post("/console/logout", content=b"csrf=%00")
        assert answer.status_code in (400, 403)


@pytest.mark.attack("people", "live changes after the session has ended")
def test_changes_end_with_the_session(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(changes, "_ALIVE_SECONDS", 1.0)  # after so long the stream asks whether it may go on
    store, cookie = served.scene.store, cookie_of(served)
    found = sessions.continue_session(store, cookie)
    assert found is not None
    with plain(served, cookie) as http, http.stream("GET", "/console/changes", timeout=120) as stream:
        lines = stream.iter_lines()
        assert next(lines) == ": open"
        sessions.end_session(store, found.id, actor=OPERATOR)
        assert not any(line.startswith("event:") for line in lines), "it ends, and tells nothing more"


def test_who_leaves_takes_no_lock_along() -> None:
    """A client that leaves is cancelled again and again until its task has ended, also while a change is being told."""

    async def leave(together: int) -> bool:
        nothing: Any = None
        found = Changes(nothing, _task=asyncio.create_task(asyncio.sleep(60)))
        known = list(found.numbers)
        waiting = [asyncio.create_task(found.after(known)) for _ in range(together)]
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        async with found._changed:
            found.numbers[0] += 1
            found._changed.notify_all()
            for _ in range(5):
                for task in waiting[::2]:
                    task.cancel()
                await asyncio.sleep(0)
        ended = await asyncio.gather(*waiting, return_exceptions=True)
        assert all(isinstance(each, asyncio.CancelledError) for each in ended[::2]), ended
        assert all(each == found.numbers for each in ended[1::2]), ended
        assert await asyncio.wait_for(found.after(known), 5) == found.numbers, "others hear of it"
        return found._changed.locked()

    with ThreadPoolExecutor(1) as pool:  # Playwright has an event loop in the tests' own thread
        assert not pool.submit(asyncio.run, leave(8)).result(SECONDS)


def test_evidence_that_does_not_decide_is_no_trouble_of_the_database() -> None:
    assert not passes(Inconclusive("too few requests to say"))
    assert not_stored(Inconclusive("too few requests to say")).status == 409


@pytest.mark.attack("people", "an admin proposes a key as an approver, by a link of their own making, and confirms it")
def test_the_maker_of_a_link_confirms_no_key_of_its_session(served: Served) -> None:
    store = served.scene.store
    add_user(store, "amy", ["admin"], actor=OWNER)

    def proposed(cookie: str) -> str:
        pem = public_pem(ec.generate_private_key(ec.SECP256R1()).public_key())
        with plain(served, cookie) as http:
            fields = {"csrf": csrf(http.get("/console/keys").text), "public_key": pem}
            assert http.post("/console/do/keys", data=fields).status_code == 303
        return digest_bytes(pem.encode())

    def confirmed(cookie: str, fingerprint: str) -> bool:
        with plain(served, cookie) as http:
            fields = {"csrf": csrf(http.get("/console/keys").text), "fingerprint": fingerprint}
            answer = http.post(f"/console/do/keys/{APPROVER}/confirm", data=fields)
        assert answer.status_code == 303 or "the two take different people" in answer.text
        return answer.status_code == 303

    mine = proposed(opened(served.scene, APPROVER, OWNER))
    assert not confirmed(opened(served.scene, OWNER, OWNER), mine)
    with plain(served, cookie_of(served, OWNER)) as http, pytest.MonkeyPatch.context() as patched:
        patched.setattr("tunesmith.registry.signing.keys.private_keys", None)  # proposals need no private key
        page = http.get("/console/keys").text
        assert f"a link of {OWNER} opened" in page
        assert "another admin confirms this key" in page
    with pytest.raises(Refused, match=f"{OWNER} made the link"):
        do(store, users.confirm_key, actor=OWNER, user=APPROVER, fingerprint=mine)  # on the command line
    assert not confirmed(opened(served.scene, "amy", OWNER), mine)  # one person, by links for two
    assert confirmed(opened(served.scene, "amy", "amy"), mine)
    assert confirmed(opened(served.scene, OWNER, "amy"), proposed(opened(served.scene, APPROVER, APPROVER)))
    assert [detail["link_by"] for detail in logged(served.scene, "user.key.propose")] == [OWNER, APPROVER]


PEOPLE = (
    {"sub": "olga-at-work", "email": "olga@example.org", "email_verified": True},
    {"sub": "liar", "email": "olga@example.org", "email_verified": False},
    {"sub": "stranger", "email": "stranger@example.org", "email_verified": True},
)


@pytest.fixture(scope="module")
def provider() -> Iterator[str]:
    """The issuer of a provider that knows PEOPLE."""
    port = free_port()
    claims = [part for person in PEOPLE for part in ("--user-claims", json.dumps(person))]
    command = [sys.executable, "-W", "ignore", "-m", "oidc_provider_mock", "--port", str(port), *claims]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        issuer = f"http://127.0.0.1:{port}"
        until(lambda: _answers(f"{issuer}/.well-known/openid-configuration"))
        yield issuer
        process.kill()


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def _answers(url: str) -> bool:
    with contextlib.suppress(httpx.HTTPError):
        return httpx.get(url, timeout=60, verify=CERTIFICATES).status_code == 200
    return False


@pytest.fixture
def provided(scene: Scene, provider: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Served]:
    monkeypatch.setenv("PROVIDER_SECRET", "secret")
    login = {"issuer": provider, "client": "tunesmith", "secret": "PROVIDER_SECRET", "url": "http://127.0.0.1:1"}
    project = Project.load(write_project(tmp_path / "p", login={**login, "users": {"olga@example.org": OPERATOR}}))
    with running(scene, FakeEngine(scene.base), project=project) as server:
        found = project.settings.login
        assert found is not None
        own = found.model_copy(update={"url": server.url})
        project.settings = project.settings.model_copy(update={"login": own})
        yield server


@pytest.fixture
def page(browser: Browser) -> Iterator[Page]:
    context = browser.new_context()
    context.set_default_timeout(60_000)
    yield context.new_page()
    context.close()


def ask(page: Page, provided: Served, person: str, where: str = "/") -> None:
    """Go to a page without a session, and be that person at the provider."""
    page.goto(provided.url + where)
    follow(page.get_by_role("link", name="Log in with your organisation's account"))
    page.get_by_role("button", name=person, exact=True).click()


def test_a_person_of_the_provider_gets_to_the_page_that_they_wanted(provided: Served, page: Page) -> None:
    page.goto(provided.url)
    check_page(page)
    ask(page, provided, "olga-at-work", "/console/rollouts")
    page.wait_for_url("**/console/rollouts")
    expect(page.get_by_text(OPERATOR, exact=True).first).to_be_visible()
    cookies = {cookie["name"]: cookie for cookie in page.context.cookies(provided.url)}
    assert cookies[COOKIE]["sameSite"] == "Strict"
    assert "tunesmith-login" not in cookies, "what was remembered meanwhile is gone"


@pytest.mark.attack("people", "an e-mail address that the provider has not verified, and a stranger to this store")
def test_the_provider_knows_them_and_we_do_not(provided: Served, page: Page) -> None:
    ask(page, provided, "liar")
    expect(page.get_by_role("heading", level=1)).to_have_text("The provider has not verified your e-mail address.")
    ask(page, provided, "stranger")
    expect(page.get_by_role("heading", level=1)).to_contain_text("you are no user here")
    deactivate(provided.scene.store, OPERATOR, actor="ann")
    ask(page, provided, "olga-at-work")
    expect(page.get_by_role("heading", level=1)).to_contain_text("deactivated")
    assert COOKIE not in {cookie["name"] for cookie in page.context.cookies()}


@pytest.mark.attack("people", "an answer of the provider that another browser asked for, or that was used")
def test_answers_that_nobody_here_asked_for(provided: Served, page: Page) -> None:
    def done(**query: str) -> httpx.Response:
        return httpx.get(f"{provided.url}/console/oidc/done", params=query, timeout=60, verify=CERTIFICATES)

    assert done().status_code == 403
    assert done(code="x", state="y").status_code == 403
    assert done(error="access_denied", state="y").status_code == 403
    answers: list[str] = []
    page.on("request", lambda request: answers.append(request.url) if "/oidc/done" in request.url else None)
    ask(page, provided, "olga-at-work")
    page.wait_for_url(provided.url + "/")
    (answer,) = answers
    with httpx.Client(timeout=60, verify=CERTIFICATES) as other:
        assert other.get(answer).status_code == 403, "another browser"
    page.context.clear_cookies(name=COOKIE)
    page.goto(answer)
    expect(page.get_by_role("heading", level=1)).to_contain_text("Log in again")


def test_a_provider_that_is_away(provided: Served) -> None:
    project = provided.serving.project
    login = project and project.settings.login
    assert project is not None
    assert login is not None
    gone = login.model_copy(update={"issuer": f"http://127.0.0.1:{free_port()}"})
    project.settings = project.settings.model_copy(update={"login": gone})
    with httpx.Client(base_url=provided.url, timeout=60, verify=CERTIFICATES) as http:
        found = http.get("/console/oidc")
        assert (found.status_code, "does not answer" in found.text) == (503, True)
        project.settings = project.settings.model_copy(update={"login": None})
        assert http.get("/console/oidc").status_code == 404
        assert "organisation" not in http.get("/console/login").text


def test_settings_that_are_refused() -> None:
    login = {"issuer": "https://id.example.org", "client": "c", "secret": "S", "url": "https://here.example.org"}
    whole = {**login, "users": {"a@example.org": "ann"}}
    assert parse_settings(yaml.safe_dump({**settings(), "login": whole}), "page").login is not None
    wrong = ({"issuer": "http://id.example.org"}, {"url": "ftp://x"}, {"users": {}}, {"users": {"a": "No Name"}})
    for change in (*wrong, {"claim": "name"}):
        with pytest.raises(UsageError):
            parse_settings(yaml.safe_dump({**settings(), "login": {**whole, **change}}), "page")


# After a login the console goes to one of its own pages, whatever the address that was asked for looks like


FOREIGN = (
    "//evil.example", "/\t/evil.example", "/\n/evil.example", "/\r\n/evil.example", "/\\evil.example",
    "\\\\evil.example", "/\t\\evil.example", " //evil.example", "\x00//evil.example", "https://evil.example",
    "https:evil.example", "javascript:alert(1)", "/\u2028/evil.example", "///evil.example", "/\x0b/evil.example", "",
)  # fmt: skip
OWN = ("/", "/console/jobs?page=2", "/console/versions/intents/1#gates", "/console/rows?q=%2F%2Fx&a=b", "/%09/x")


@pytest.mark.attack("console", "an address of another site as the page after the login")
def test_the_page_after_a_login_is_always_ours(browser: Browser, happened: Happened) -> None:
    assert [local_page(where) for where in OWN] == list(OWN)
    assert {local_page(where) for where in FOREIGN} == {"/"}
    chance = random.Random(31)
    signs = [*"/\\\t\n\r .:@?#\x00\u3002\uff0f", "%09", "%2f", "evil.example"]
    tried = ["".join(chance.choices(signs, k=chance.randint(1, 7))) for _ in range(3000)]
    page = browser.new_page()
    hosts = page.evaluate(
        "all => all.map(where => new URL(where, 'https://ours.example/login').origin)", list(map(local_page, tried))
    )
    page.close()
    assert set(hosts) == {"https://ours.example"}
    happened("ours", len(tried) + len(FOREIGN))
