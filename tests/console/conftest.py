"""A real Chromium that looks at a real server's console."""

import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import Browser, BrowserContext, Locator, Page, expect, sync_playwright
from sqlalchemy import event

from tests.fabricate import OPERATOR, OWNER, Scene
from tests.programs import program
from tests.server.conftest import Served, engine, made, running, scene, versions
from tests.server.fake_engine import FakeEngine
from tunesmith.registry.versions import Version
from tunesmith.store.people.sessions import make_link
from tunesmith.store.store import Store

__all__ = ["engine", "made", "scene", "served", "versions"]

Login = Callable[..., Page]
WIDTHS = {"phone": 360, "laptop": 1280}
# By theme: the rules of WCAG 2.2 AA and what axe recommends beside them; and those about colours, which are all that a
# theme changes (static/console.css). Only what is wrong is told with every element.
_RULES: dict[str, dict[str, Any]] = {
    "light": {"runOnly": ["wcag2a", "wcag2aa", "wcag21a", "wcag21aa", "wcag22aa", "best-practice"]},
    "dark": {"runOnly": {"type": "rule", "values": ["color-contrast", "link-in-text-block"]}},
}

expect.set_options(timeout=60_000)  # milliseconds: a machine that is not idle is the normal case


@pytest.fixture
def served(scene: Scene, versions: dict[int, Version], engine: FakeEngine) -> Iterator[Served]:
    """A server whose champion is version 1. It looks at rollouts less often than those of short tests."""
    with running(scene, engine, check_seconds=0.2) as server:
        server.begin(versions[1])
        yield server


# Of one module: while Playwright runs, no test of this process can start an event loop of its own.
@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    path = program("chromium")
    flags = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking"]
    flags += ["--disable-component-update", "--disable-sync", "--disable-dev-shm-usage"]
    with sync_playwright() as playwright:
        found = playwright.chromium.launch(executable_path=path, args=flags)
        yield found
        found.close()


@pytest.fixture
def login(browser: Browser, served: Served) -> Iterator[Login]:
    """Opens a browser of its own for a person and logs them in: `login("ada", "/console/jobs")`.

    After the test no page may have logged an error, such as a file that the page's own policy refuses.
    """
    contexts: list[BrowserContext] = []
    said: list[str] = []

    def opened(name: str = OPERATOR, path: str = "/", **settings: Any) -> Page:
        context = browser.new_context(**{"viewport": {"width": WIDTHS["laptop"], "height": 900}, **settings})
        context.set_default_timeout(60_000)
        contexts.append(context)
        page = context.new_page()
        page.on("pageerror", lambda error: said.append(str(error)))
        page.on("console", lambda message: said.append(message.text) if message.type == "error" else None)
        link = make_link(served.scene.store, name, actor=name)
        page.goto(f"{served.url}/console/login/{link}?next={path}")
        page.get_by_role("button", name="Log in").click()
        page.wait_for_url(served.url + path)
        return page

    yield opened
    for context in contexts:
        context.close()
    # An answer of 4xx is one that a test asked for.
    refused = [line for line in said if "status of 4" not in line and "Error Code 4" not in line]
    assert not refused, refused


def follow(link: Locator) -> None:
    """Click something that leads to a page, and wait until that is loaded.

    A click returns before that, and a page shows its text before its scripts run: keys that a test presses then go to a
    page that does not listen yet.
    """
    with link.page.expect_navigation():
        link.click()


def check_accessible(page: Page) -> None:
    """axe finds nothing wrong with the page, in both themes."""
    for theme, rules in _RULES.items():
        page.evaluate("name => { document.documentElement.dataset.theme = name }", theme)
        found = Axe().run(page, options={"resultTypes": ["violations"], **rules})
        told = [(each["id"], [node["html"] for node in each["nodes"]][:3]) for each in found.response["violations"]]
        assert not told, (theme, told)


def check_page(page: Page) -> None:
    """The page is accessible, and fits a phone."""
    check_accessible(page)
    assert fits(page)
    page.set_viewport_size({"width": WIDTHS["laptop"], "height": 900})


def fits(page: Page) -> bool:
    """Whether nothing is wider than the screen of a phone. Charts are drawn anew a moment after it has changed."""
    page.set_viewport_size({"width": WIDTHS["phone"], "height": 740})
    for _ in range(100):
        if page.evaluate("document.documentElement.scrollWidth <= window.innerWidth"):
            return True
        page.wait_for_timeout(50)
    return False


def statements(store: Store, call: Callable[[], object]) -> int:
    """How many statements a call sends to the database. The server, in another thread, uses the same one."""
    sent: list[str] = []
    own = threading.get_ident()

    def note(*arguments: object) -> None:
        if threading.get_ident() == own:
            sent.append(str(arguments[2]))

    event.listen(store.engine, "before_cursor_execute", note)
    call()
    event.remove(store.engine, "before_cursor_execute", note)
    return len(sent)


__all__ += ["OPERATOR", "OWNER"]
