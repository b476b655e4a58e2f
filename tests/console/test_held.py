"""Reviewers decide on held answers in the browser."""

from collections.abc import Callable

import pytest
from playwright.sync_api import expect

from tests.console.conftest import Login, check_page, follow
from tests.console.test_login import cookie_of, plain
from tests.fabricate import OPERATOR
from tests.server.conftest import Served
from tests.server.test_held import STEWARD, held, hold

__all__ = ["hold"]
PAGE = "/console/operations/held"
HOSTILE = '<script>document.title = "taken"</script>"><img src=x onerror=alert(1)> {{7*7}} \u202etxt'


@pytest.fixture
def served(hold: Callable[..., Served]) -> Served:
    return hold()


def test_a_reviewer_edits_one_answer_and_refuses_another(served: Served, login: Login) -> None:
    call = {"id": "c", "type": "function", "function": {"name": "transfer", "arguments": "{}"}}
    first = held(served, messages=[{"role": "user", "content": HOSTILE}, {"role": "assistant", "tool_calls": [call]}])
    second = held(served)
    page = login(STEWARD)
    follow(page.get_by_role("link", name="2 held answers wait for a reviewer"))
    page.goto(f"{served.url}{PAGE}/{first['id']}")
    expect(page.locator("pre").first).to_contain_text('<script>document.title = "taken"</script>')
    expect(page.locator("pre").nth(1)).to_contain_text("transfer")
    check_page(page)
    page.get_by_label("Why it is edited").fill("the payee is unclear")
    page.get_by_label("Edited answer").fill("no JSON")
    page.get_by_role("button", name="Send the edited answer").click()
    expect(page.get_by_role("alert")).not_to_be_empty()
    page.get_by_label("Edited answer").fill('{"intent": "ask_back"}')
    page.get_by_role("button", name="Send the edited answer").click()
    page.wait_for_url(f"**{PAGE}")
    page.goto(f"{served.url}{PAGE}/{second['id']}")
    page.get_by_label("Reason").fill("no such account")
    page.get_by_role("button", name="Refuse").click()
    page.wait_for_url(f"**{PAGE}")
    assert sorted(page.locator("td .badge").all_inner_texts()) == ["refused", "replaced"]
    with served.http() as http:
        left = http.get(first["url"]).json()["completion"]["choices"][0]["message"]["content"]
        assert left == '{"intent": "ask_back"}'
        assert "completion" not in http.get(second["url"]).json()


@pytest.mark.attack("people", "held answers in the browser, by people who may not review them")
def test_who_may_not_review_sees_nothing(served: Served) -> None:
    """server/test_api.py asks as another tenant."""
    notice = held(served)
    with plain(served, cookie_of(served, OPERATOR)) as http:
        assert [http.get(path).status_code for path in (PAGE, f"{PAGE}/{notice['id']}")] == [403, 403]
        assert "held answer" not in http.get("/").text
    with plain(served, cookie_of(served, STEWARD)) as http:
        assert http.get(f"{PAGE}/{'0' * 32}").status_code == 404
