"""Two people review ten flagged rows by keys, and the next build changes exactly those rows."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import Page, expect

from tests.console.conftest import OWNER, Login, check_page, follow
from tests.console.test_login import cookie_of, plain
from tests.data.review.test_review import project_in
from tests.data.rows import build, many_rows, row, settings, write_jsonl
from tests.fabricate import APPROVER, STEWARD, Scene
from tests.server.conftest import Served, running
from tests.server.fake_engine import FakeEngine
from tunesmith.core.scope import Scope
from tunesmith.data.dataset import SPLITS
from tunesmith.data.governance.difference import difference
from tunesmith.data.quality.flags import examine_quality
from tunesmith.services.datasets import review
from tunesmith.store.people.identities import add_user

HOSTILE = '<script>document.title="owned"</script>"><img src=x onerror=alert(1)> \u202e {{7*7}} '
ALIKE: dict[str, Any] = {"duplicates": {"near": None}}  # the requests differ in a word only
QUEUE = "/console/rows/review"


@pytest.fixture
def served(scene: Scene, engine: FakeEngine, tmp_path: Path) -> Iterator[Served]:
    """A server of a project with ten flagged rows; eve also reviews."""
    words = "abcdefghij"
    refusing = [row(f"{word} question about {word} person1@example.com {HOSTILE}", refusal(word)) for word in words]
    write_jsonl(tmp_path / "rows.jsonl", [*many_rows(60), *refusing])
    project = project_in(tmp_path)
    project.store = scene.store
    examine_quality(scene.store, build(tmp_path, settings(**ALIKE)))
    add_user(scene.store, "eve", ["engineer"], actor=OWNER)
    with running(scene, engine, project=project) as server:
        yield server


def refusal(word: str) -> str:
    return f"I'm sorry, I cannot help with {word} {HOSTILE}"


def decide(page: Page, served: Served, choices: str) -> None:
    """Press keys alone: a accepts, e edits, r rejects; each is a decision on the next item."""
    for place, choice in enumerate(choices):
        expect(page.get_by_role("heading", level=1)).to_contain_text("Item")
        item = page.url  # read now, not before: a click returns before the page that it leads to is there
        if choice == "a":
            page.keyboard.press("a")
        elif choice == "e":
            page.keyboard.press("e")
            page.keyboard.press("Control+a")
            page.keyboard.type(f"a real answer {HOSTILE}")
            page.keyboard.press("Control+Enter")
        else:
            page.keyboard.press("r")
            page.keyboard.type(f"refuses {HOSTILE}")
            page.keyboard.press("Enter")
        last = place == len(choices) - 1
        page.wait_for_url(f"{served.url}{QUEUE}" if last else lambda url, item=item: url != item)


def test_ten_rows_by_keys_and_the_build_that_follows(served: Served, login: Login, tmp_path: Path) -> None:
    store = served.scene.store
    page = login(STEWARD, QUEUE)
    expect(page.get_by_text("Nothing waits for you.")).to_be_visible()
    page.get_by_label("Two people decide").check()
    follow(page.get_by_role("button", name="Fill the queue"))
    follow(page.get_by_role("link", name="Begin to review"))
    expect(page.get_by_text("refusing answer", exact=False).first).to_be_visible()
    expect(page.locator("mark")).to_have_text("person1@example.com")
    assert "owned" not in page.title()
    page.keyboard.press("?")
    expect(page.get_by_text("Single keys work on this page")).to_be_visible()
    check_page(page)
    first = page.url
    page.keyboard.press("j")
    page.wait_for_url(lambda url: url != first)
    page.keyboard.press("k")
    page.wait_for_url(first)
    decide(page, served, "aaaeeerrrr")

    other = login("eve", QUEUE)
    follow(other.get_by_role("link", name="Begin to review"))
    decide(other, served, "aaaeeerrra")
    expect(other.get_by_text("the same decision on 9 of 10 items")).to_be_visible()
    expect(other.get_by_text("Cohen's kappa 0.85")).to_be_visible()

    page.goto(f"{served.url}{QUEUE}")
    follow(page.get_by_role("link", name="Begin to review"))
    expect(page.get_by_text("in conflict")).to_be_visible()
    decide(page, served, "r")
    page.get_by_role("button", name="Write the decisions").click()
    expect(page.get_by_text("3 accepted, 3 edited, 4 rejected rows")).to_be_visible()

    before = store.records_of("dataset")[-1]
    after = build(tmp_path, settings(review="review.jsonl", **ALIKE))
    found = difference(store, before, after.digest)
    assert {name: found.rows[name] for name in ("added", "changed", "removed")} == {
        "added": 0,
        "changed": 3,
        "removed": 4,
    }
    answers = [one.answer for split in SPLITS for one in after.examples(split)]
    assert sum(answer.startswith("a real answer") for answer in answers) == 3
    assert sum(answer.startswith("I'm sorry") for answer in answers) == 3


def test_two_people_on_one_item_and_who_sees_none_of_it(served: Served, login: Login) -> None:
    store = served.scene.store
    review.fill(store, actor=STEWARD)
    number = review.next_item(store, actor=STEWARD)
    page = login(STEWARD, f"{QUEUE}/{number}")
    review.decide(store, number or 0, "accept", actor="eve")
    page.get_by_role("button", name="Reject", exact=False).first.click()
    page.keyboard.type("too late")
    page.keyboard.press("Enter")
    expect(page.get_by_role("alert")).to_contain_text("is decided: accept")
    add_user(store, "tia", ["steward"], actor=OWNER, scope=Scope("acme"))
    for name, status in (("tia", 404), (APPROVER, 403), (STEWARD, 404)):
        with plain(served, cookie_of(served, name)) as http:
            for path in (QUEUE, f"{QUEUE}/{number}") if name != STEWARD else (f"{QUEUE}/999999",):
                answer = http.get(path)
                assert (answer.status_code, "question about" in answer.text) == (status, False), (name, path)
