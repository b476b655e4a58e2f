"""Log in by a real identity provider in a process of its own, in a real browser; and what is refused."""

from __future__ import annotations

import contextlib
import json
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
import yaml
from playwright.sync_api import Browser, Page, expect

from tests.console.conftest import check_page, follow
from tests.fabricate import OPERATOR, Scene
from tests.server.conftest import CERTIFICATES, Served, running
from tests.server.fake_engine import FakeEngine
from tests.tiny_project import settings, write_project
from tests.waiting import until
from tunesmith.core.errors import UsageError
from tunesmith.project import Project, parse_settings
from tunesmith.server.console.people.session import COOKIE
from tunesmith.store.people.identities import deactivate

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
def served(scene: Scene, provider: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Served]:
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


def ask(page: Page, served: Served, person: str, where: str = "/") -> None:
    """Go to a page without a session, and be that person at the provider."""
    page.goto(served.url + where)
    follow(page.get_by_role("link", name="Log in with your organisation's account"))
    page.get_by_role("button", name=person, exact=True).click()


def test_a_person_of_the_provider_gets_to_the_page_that_they_wanted(served: Served, page: Page) -> None:
    page.goto(served.url)
    check_page(page)
    ask(page, served, "olga-at-work", "/console/rollouts")
    page.wait_for_url("**/console/rollouts")
    expect(page.get_by_text(OPERATOR, exact=True).first).to_be_visible()
    cookies = {cookie["name"]: cookie for cookie in page.context.cookies(served.url)}
    assert cookies[COOKIE]["sameSite"] == "Strict"
    assert "tunesmith-login" not in cookies, "what was remembered meanwhile is gone"


@pytest.mark.attack("people", "an e-mail address that the provider has not verified, and a stranger to this store")
def test_the_provider_knows_them_and_we_do_not(served: Served, page: Page) -> None:
    ask(page, served, "liar")
    expect(page.get_by_role("heading", level=1)).to_have_text("The provider has not verified your e-mail address.")
    ask(page, served, "stranger")
    expect(page.get_by_role("heading", level=1)).to_contain_text("you are no user here")
    deactivate(served.scene.store, OPERATOR, actor="ann")
    ask(page, served, "olga-at-work")
    expect(page.get_by_role("heading", level=1)).to_contain_text("deactivated")
    assert COOKIE not in {cookie["name"] for cookie in page.context.cookies()}


@pytest.mark.attack("people", "an answer of the provider that another browser asked for, or that was used")
def test_answers_that_nobody_here_asked_for(served: Served, page: Page) -> None:
    def done(**query: str) -> httpx.Response:
        return httpx.get(f"{served.url}/console/oidc/done", params=query, timeout=60, verify=CERTIFICATES)

    assert done().status_code == 403
    assert done(code="x", state="y").status_code == 403
    assert done(error="access_denied", state="y").status_code == 403
    answers: list[str] = []
    page.on("request", lambda request: answers.append(request.url) if "/oidc/done" in request.url else None)
    ask(page, served, "olga-at-work")
    page.wait_for_url(served.url + "/")
    (answer,) = answers
    with httpx.Client(timeout=60, verify=CERTIFICATES) as other:
        assert other.get(answer).status_code == 403, "another browser"
    page.context.clear_cookies(name=COOKIE)
    page.goto(answer)
    expect(page.get_by_role("heading", level=1)).to_contain_text("Log in again")


def test_a_provider_that_is_away(served: Served) -> None:
    project = served.serving.project
    assert project is not None
    login = project.settings.login
    assert login is not None
    gone = login.model_copy(update={"issuer": f"http://127.0.0.1:{free_port()}"})
    project.settings = project.settings.model_copy(update={"login": gone})
    with httpx.Client(base_url=served.url, timeout=60, verify=CERTIFICATES) as http:
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
