"""After a login the console goes to one of its own pages, whatever the address that was asked for looks like."""

from __future__ import annotations

import random

import pytest
from playwright.sync_api import Browser

from tests.attack_table import Happened
from tunesmith.server.console.routing import local_page

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
