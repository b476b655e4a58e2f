"""Dataset versions and the review queue in the browser: rows, two versions compared, a sign-off, decisions by keys."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from playwright.sync_api import Page, expect

from tests.console.conftest import OPERATOR, Login, check_page, follow
from tests.console.test_login import cookie_of, plain
from tests.data.review.test_review import project_in
from tests.data.rows import build, many_rows, row, settings, write_jsonl
from tests.fabricate import APPROVER, STEWARD, Scene
from tests.server.conftest import Served, running
from tests.server.fake_engine import FakeEngine
from tunesmith.data.building.signoff import sign_offs
from tunesmith.data.dataset import SPLITS
from tunesmith.data.quality.flags import examine_quality

HOSTILE = '<script>document.title="owned"</script>"><img src=x onerror=alert(1)> \u202e {{7*7}} javascript:alert(1) '
QUEUE = "/console/rows/review"


@pytest.fixture
def served(scene: Scene, engine: FakeEngine, tmp_path: Path) -> Iterator[Served]:
    """A server of a project."""
    project = project_in(tmp_path)
    project.store = scene.store
    with running(scene, engine, project=project) as server:
        yield server


def test_a_steward_reads_compares_and_signs(served: Served, login: Login, tmp_path: Path) -> None:
    store = served.scene.store
    rows = many_rows(80, subject="a-subject")
    rows[5] = row(f"hostile {HOSTILE}", HOSTILE + "x" * 10_000, subject=HOSTILE[:60])
    write_jsonl(tmp_path / "rows.jsonl", [*rows, row("said twice", "x"), row("said twice", "x")])
    first = build(tmp_path)
    rows[3]["messages"][1]["content"] = "another answer"
    write_jsonl(tmp_path / "rows.jsonl", [*rows[1:], row("an entirely new request", "new")])
    second = build(tmp_path, settings(split={"seed": 0}, attributes=["x"]))

    page = login(STEWARD, "/console/rows")
    expect(page.get_by_role("table").get_by_role("link")).to_have_count(3)
    follow(page.get_by_role("link", name=first.digest[7:19]))
    expect(page.get_by_role("cell", name="exact duplicate")).to_be_visible()
    page.get_by_label("Text").fill("HOSTILE")
    holds = (name for name in SPLITS for one in first.examples(name) if "hostile" in one.messages[0].text)
    page.get_by_role("combobox", name="Split").select_option(next(holds))
    page.get_by_role("button", name="Show").click()
    expect(page.locator("#rows .pager")).to_have_text("1 row")
    expect(page.get_by_text("⟨U+202E⟩ {{7*7}}").first).to_be_visible()
    assert "owned" not in page.title()
    check_page(page)
    page.get_by_role("combobox", name="Split").select_option("removed")
    page.get_by_label("Text").fill("")
    page.get_by_label("Left out because").select_option("exact duplicate")
    page.get_by_role("button", name="Show").click()
    expect(page.get_by_role("cell", name="rows.jsonl", exact=True)).to_be_visible()
    page.get_by_label("What did you check?").fill(f"looked at 50 rows {HOSTILE}")
    page.get_by_role("button", name="Verify and sign off").click()
    expect(page.get_by_text("looked at 50 rows")).to_be_visible()
    assert [one.steward for one in sign_offs(store, first.digest)] == [STEWARD]

    page.goto(f"{served.url}/console/rows/compare?before={first.digest[7:]}&after={second.digest[7:]}")
    for text in ("Changed rows (1)", "another answer", "Added rows (1)", "attributes.0"):
        expect(page.get_by_text(text)).to_be_visible()
    check_page(page)
    for name in (APPROVER, OPERATOR):
        with plain(served, cookie_of(served, name)) as http:
            text = http.get(f"/console/rows/{first.digest[7:]}").text
            assert "shown to engineers and stewards" in text
            assert not {"sign off", "a-subject"} & {word for word in ("sign off", "a-subject") if word in text}
            for wrong in ("0" * 64, "x", first.digest, served.scene.base[7:]):
                assert http.get(f"/console/rows/{wrong}").status_code == 404, wrong


def decide(page: Page, served: Served, choices: str) -> None:
    """Press keys alone: a accepts, e edits, r rejects; each is a decision on the next item."""
    for place, choice in enumerate(choices):
        expect(page.get_by_role("heading", level=1)).to_contain_text("Item")
        item = page.url  # read now, not before: a click returns before the page that it leads to is there
        page.keyboard.press(choice)
        if choice == "e":
            page.keyboard.press("Control+a")
            page.keyboard.type(f"a real answer {HOSTILE}")
            page.keyboard.press("Control+Enter")
        elif choice == "r":
            page.keyboard.type(f"refuses {HOSTILE}")
            page.keyboard.press("Enter")
        last = place == len(choices) - 1
        page.wait_for_url(f"{served.url}{QUEUE}" if last else lambda url, item=item: url != item)


def test_flagged_rows_are_decided_by_keys(served: Served, login: Login, tmp_path: Path) -> None:
    """What the next build makes of the decisions: data/review."""
    refusing = [
        row(f"{word} question about {word} person1@example.com {HOSTILE}", f"I'm sorry, I cannot help with {word}")
        for word in "abcdef"
    ]
    write_jsonl(tmp_path / "rows.jsonl", [*many_rows(60), *refusing])
    examine_quality(served.scene.store, build(tmp_path, settings(duplicates={"near": None})))
    page = login(STEWARD, QUEUE)
    expect(page.get_by_text("Nothing waits for you.")).to_be_visible()
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
    decide(page, served, "aaaeer")
    page.get_by_role("button", name="Write the decisions").click()
    expect(page.get_by_text("3 accepted, 2 edited, 1 rejected rows")).to_be_visible()
    assert (tmp_path / "review.jsonl").read_text().count("a real answer") == 2
